"""The fast path: blocks of the llama shape, computed with few operations and without copying a cache.

`FusedBlocks.of(...)` looks at a loaded span and returns the fast path if every block has exactly the known shape, else
None; `Span` switches it on after comparing it with the family's own code on random tokens. Jobs of any lengths run in
one pass: linear layers see all tokens of all jobs as rows of one matrix, attention looks at one session at a time, in
its own slabs. Nothing is allocated for keys, no mask is built for a single token, rotary angles are computed once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from swarmlm.kernels.attention import ragged_decode_attention
from swarmlm.kernels.backend import runs_triton
from swarmlm.kernels.int8 import KERNEL_ROWS, Int8Linear
from swarmlm.kernels.linear import PackedLinear, filled
from swarmlm.models.cache import SlabCache
from swarmlm.models.packing import FusedPart
from swarmlm.models.scripted import compiled

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}  # those whose blocks were compared, in tests, with their own code
ROTARY = {"default", "linear", "llama3", "yarn"}  # whose angles depend on nothing but the position


@dataclass(frozen=True)
class FusedJob:
    """`tokens` new tokens for each row of `cache`, after the `cache.position` that it holds."""

    cache: SlabCache
    tokens: int
    padding: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return self.cache.batch * self.tokens


@dataclass(frozen=True)
class _Block:
    before_attention: torch.Tensor
    qkv: nn.Module
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    out: nn.Module
    before_mlp: torch.Tensor
    gate_up: nn.Module
    down: nn.Module

    @property
    def norms(self) -> list[torch.Tensor]:
        """Before attention and MLP, then of queries and keys if there are any."""
        both = [norm for norm in (self.query_norm, self.key_norm) if norm is not None]
        return [norm.detach() for norm in (self.before_attention, self.before_mlp, *both)]


class FusedBlocks:
    def __init__(self, blocks: list[_Block], rotary: nn.Module, config: Any, head_size: int, eps: float) -> None:
        self._blocks = blocks
        self._rotary = rotary
        self._heads = int(config.num_attention_heads)
        self._kv_heads = int(config.num_key_value_heads)
        self._head_size = head_size
        self._eps = eps
        self._sizes = [self._heads, self._kv_heads, head_size]
        norms = [[*block.norms] for block in blocks]
        linears = [(block.qkv, block.out, block.gate_up, block.down) for block in blocks]
        weights = [[_tensors(linear) for linear in four] for four in linears]
        self._weights = (norms, weights, [[linear.bias for linear in four] for four in linears])
        self._packed = any(isinstance(block.qkv, PackedLinear) for block in blocks)
        self._most_rows = KERNEL_ROWS if any(isinstance(block.qkv, Int8Linear) for block in blocks) else sys.maxsize
        on_cpu = norms[0][0].device.type == "cpu" and norms[0][0].dtype == torch.float32
        self._script = compiled() if on_cpu else None

    @classmethod
    def of(cls, config: Any, layers: nn.ModuleList, rotary: nn.Module | None) -> FusedBlocks | None:
        """The fast path of `layers`, whose linears `models.packing` has fused; None if any is of another shape."""
        if config.model_type not in FAMILIES or rotary is None or config.hidden_act != "silu":
            return None
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            return None
        if config.model_type == "mistral" and config.sliding_window is not None:
            return None
        if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") not in ROTARY:
            return None
        blocks = [_block(layer) for layer in layers]
        found = [block for block in blocks if block is not None]
        if not found or len(found) < len(blocks):
            return None
        first: Any = layers[0]
        head_size, eps = int(first.self_attn.head_dim), float(first.input_layernorm.variance_epsilon)
        return cls(found, rotary, config, head_size, eps)

    def run(self, jobs: Sequence[FusedJob], hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Blocks [first, last) of the span on `hidden` [rows of all jobs, hidden size]; the same shape comes out.

        Within a job the rows go batch by batch. Caches are written, but their `position` is left to the caller.
        """
        few = hidden.shape[0] <= self._most_rows and all(job.tokens == 1 and not job.padding for job in jobs)
        if self._script is not None and few:
            return self._decode(jobs, hidden, first, last)
        parts = self._parts(jobs, hidden)
        rows = hidden.shape[0]
        hidden = filled(hidden) if self._packed else hidden
        positions = torch.cat([*(part.positions for part in parts), hidden.new_zeros(len(hidden) - rows).long()])
        cos, sin = (table[0].unsqueeze(1) for table in self._rotary(hidden, positions[None]))
        for index in range(first, last):
            hidden = self._run_block(index, self._blocks[index], hidden, parts, cos, sin)
        return hidden[:rows]

    def _decode(self, jobs: Sequence[FusedJob], hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """One token a row, all blocks in one call."""
        assert self._script is not None
        rows = hidden.shape[0]
        hidden = filled(hidden) if self._packed else hidden
        held = [job.cache.position for job in jobs]
        places = [place for job, place in zip(jobs, held, strict=True) for _ in range(job.cache.batch)]
        places += places[:1] * (hidden.shape[0] - rows)
        cos, sin = (table[0].unsqueeze(1) for table in self._rotary(hidden, torch.tensor([places])))
        slabs = [job.cache.spread(first, last, self._like(job.cache.batch, hidden)) for job in jobs]
        keys, values = [pair[0] for pair in slabs], [pair[1] for pair in slabs]
        batches = [job.cache.batch for job in jobs]
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # optimising would start anew whenever a length changes
            output: torch.Tensor = self._script(
                hidden, *self._weights, keys, values, batches, held, cos, sin, self._sizes, self._eps, first, last
            )
        return output[:rows]

    def _like(self, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.new_empty(batch, self._kv_heads, 0, self._head_size)

    def _run_block(
        self, index: int, block: _Block, hidden: torch.Tensor, parts: list[_Part], cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        rows, size = hidden.shape
        heads, kv_heads = self._heads, self._kv_heads
        given = rms_norm(hidden, (size,), block.before_attention, self._eps)
        qkv = block.qkv(given).view(rows, heads + 2 * kv_heads, self._head_size)
        turning = qkv[:, : heads + kv_heads]
        if block.query_norm is not None and block.key_norm is not None:
            turning = torch.cat(
                (
                    rms_norm(qkv[:, :heads], (self._head_size,), block.query_norm, self._eps),
                    rms_norm(qkv[:, heads : heads + kv_heads], (self._head_size,), block.key_norm, self._eps),
                ),
                dim=1,
            )
        turned = _rotated(turning, cos, sin)
        for part in parts:
            part.write(index, turned[part.where, heads:], qkv[part.where, heads + kv_heads :])
        if runs_triton(hidden) and all(part.is_decode for part in parts):
            attended = _attend_together(index, parts, turned[:, :heads])
        else:
            attended = turned.new_zeros(rows, heads * self._head_size)
            for part in parts:
                part.attend(index, turned[part.where, :heads], attended[part.where])
        hidden = hidden + block.out(attended)
        given = rms_norm(hidden, (size,), block.before_mlp, self._eps)
        gate, up = block.gate_up(given).chunk(2, dim=-1)
        output: torch.Tensor = hidden + block.down(silu(gate).mul_(up))
        return output

    def _parts(self, jobs: Sequence[FusedJob], hidden: torch.Tensor) -> list[_Part]:
        parts, row = [], 0
        for job in jobs:
            where = slice(row, row + job.rows)
            parts.append(_Part(job, where, self._heads, self._kv_heads, self._head_size, hidden.device))
            row += job.rows
        return parts


class _Part:
    """One job's share of a pass: where its rows are, and what its tokens may look at."""

    def __init__(
        self, job: FusedJob, where: slice, heads: int, kv_heads: int, head_size: int, device: torch.device
    ) -> None:
        self.where = where
        self._cache = job.cache
        self._pads = job.padding
        self._batch, self._tokens, self._held = job.cache.batch, job.tokens, job.cache.position
        self._heads, self._kv_heads, self._head_size = heads, kv_heads, head_size
        self._group = heads // kv_heads
        ahead = torch.arange(self._held, self._held + job.tokens, device=device)
        if job.padding:
            pads = torch.tensor(job.padding, device=device)[:, None]
            self.positions = (ahead - pads).clamp_min_(0).reshape(-1)
        else:
            self.positions = ahead.repeat(self._batch) if self._batch > 1 else ahead
        self._mask = self._visible(job, ahead, device)

    def _visible(self, job: FusedJob, ahead: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        """[batch or 1, 1, group x tokens, held + tokens], True where a token may look; None: at everything."""
        if job.tokens == 1 and not job.padding:
            return None
        columns = torch.arange(self._held + job.tokens, device=device)
        mask = (columns <= ahead[:, None]).repeat(self._group, 1)[None, None]
        if job.padding:
            pads = torch.tensor(job.padding, device=device)[:, None]
            real = (columns >= pads)[:, None, None, :]
            itself = (columns == ahead[:, None]).repeat(self._group, 1)  # a pad token sees itself: no row is empty
            mask = (mask & real) | itself
        return mask

    @property
    def is_decode(self) -> bool:
        return self._tokens == 1

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put new keys and values [rows, kv heads, head size] into the session's slabs."""
        shape = (self._batch, self._tokens, self._kv_heads, self._head_size)
        keys, values = keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)
        key_slab, value_slab = self._cache.slabs(layer, keys, values)
        key_slab.narrow(2, self._held, self._tokens).copy_(keys)
        value_slab.narrow(2, self._held, self._tokens).copy_(values)

    def slabs(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [batch, kv heads, max length, head size]; beyond `end` there is nothing yet."""
        return self._cache.written(layer)

    @property
    def end(self) -> int:
        return self._held + self._tokens

    @property
    def pads(self) -> tuple[int, ...]:
        """Left padding of each row."""
        return self._pads or (0,) * self._batch

    def attend(self, layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
        """`query` is [rows, heads, head size]; the result goes to `out`."""
        batch, tokens, kv_heads, size = self._batch, self._tokens, self._kv_heads, self._head_size
        keys, values = self.slabs(layer)
        query = query.view(batch, tokens, kv_heads, self._group, size)
        query = query.permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, self._group * tokens, size)
        seen = scaled_dot_product_attention(
            query, keys.narrow(2, 0, self.end), values.narrow(2, 0, self.end), attn_mask=self._mask
        )
        seen = seen.view(batch, kv_heads, self._group, tokens, size).permute(0, 3, 1, 2, 4)
        out.view(batch, tokens, kv_heads, self._group, size).copy_(seen)


def _attend_together(layer: int, parts: Sequence[_Part], query: torch.Tensor) -> torch.Tensor:
    """One kernel for a decode batch of sessions of any lengths: [rows, heads x head size]."""
    slabs = [part.slabs(layer) for part in parts]
    keys, values = ([row for pair in slabs for row in pair[which]] for which in (0, 1))
    lengths = [part.end for part in parts for _ in part.pads]
    padding = [pad for part in parts for pad in part.pads]
    return ragged_decode_attention(query, keys, values, lengths, padding).flatten(1)


def _tensors(linear: Any) -> list[torch.Tensor]:
    return linear.tensors if isinstance(linear, PackedLinear | Int8Linear) else [linear.weight.detach()]


def _rotated(given: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = given.shape[-1] // 2
    turned = given * cos
    turned[..., :half].addcmul_(given[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(given[..., :half], sin[..., half:])
    return turned


def _block(layer: Any) -> _Block | None:
    try:
        attention, mlp = layer.self_attn, layer.mlp
        qkv, gate_up = attention.q_proj, mlp.gate_proj
        if not isinstance(qkv, FusedPart) or not isinstance(gate_up, FusedPart):
            return None
        norms = [getattr(getattr(attention, name, None), "weight", None) for name in ("q_norm", "k_norm")]
        return _Block(
            layer.input_layernorm.weight,
            qkv.fused.product,
            norms[0],
            norms[1],
            attention.o_proj,
            layer.post_attention_layernorm.weight,
            gate_up.fused.product,
            mlp.down_proj,
        )
    except AttributeError:
        return None
