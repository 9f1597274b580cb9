"""A span: consecutive blocks of any transformers decoder, run by the family's own code.

The family's base model is built without weights; the layers that are not ours, the embeddings and the norms become
stubs, and only our tensors are read. In a forward, the hidden state enters at our first block and is taken out after
our last, so nothing the family does before or after its layers (scaling, positions, norms) touches it.

A session may run a part of the span (a route can enter at any block): the other blocks pass its hidden state by.

That is the generic path, right for every family. After loading, its linear layers are packed (`models.packing`), and
families of a known shape get a fast path beside it (`models.fused`). Both are compared with the generic path on random
tokens before anybody is served; what does not agree is not used.
"""

from __future__ import annotations

import copy
import functools
import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from swarmlm.config import Quant
from swarmlm.errors import BadSpan, BadStep, ContextTooLong, ModelUnsupported
from swarmlm.models.cache import DynamicState, SlabCache, StepCache, keeps_plain_keys
from swarmlm.models.fused import FusedBlocks, FusedJob
from swarmlm.models.jobs import SpanCache as SpanCache
from swarmlm.models.jobs import SpanJob as SpanJob
from swarmlm.models.loading import Progress, build_meta_model, decoder_layers, decoder_of, layers_name, load_into
from swarmlm.models.packing import FusedLinear, pack_linears
from swarmlm.models.selfcheck import cuts_matter, differs, sample
from swarmlm.models.source import Source
from swarmlm.models.stubs import rebase, stub_all_but

log = logging.getLogger("swarmlm.models")

MEASURED_STEPS = 5  # one-token steps timed after warm-up; the median is announced


class _Disagrees(Exception):
    """A faster way of computing gave other numbers."""


@dataclass
class _Pass:
    """What the blocks of a running forward need to know."""

    start: int
    end: int
    hidden: torch.Tensor
    output: torch.Tensor | None = None


class Span:
    """Blocks [start, end) of a model, ready to run. Made by `Span.load`; calls from several threads take turns."""

    def __init__(
        self, model: Any, source: Source, start: int, end: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._pass: _Pass | None = None
        self._returns_tuple = False
        self.name = source.name
        self.fingerprint = source.fingerprint
        self.blocks = source.num_blocks
        self.context_length = source.context_length
        self.start, self.end = start, end
        self.dtype, self.device = dtype, device
        self.hidden_size = int(source.config.hidden_size)
        self.weight_bytes = sum(weight.nbytes for weight in model.parameters())
        self._plain = keeps_plain_keys(model.config)
        self._fused: FusedBlocks | None = None
        self.quant: Quant = "none"
        self._one_by_one = False  # tokens after a prefix: the family's code gets several at once wrong
        for index, layer in enumerate(decoder_layers(model)):
            layer.forward = self._guard(layer.forward, index)
        self._token_bytes, self._fixed_bytes = self._probe()

    @classmethod
    def load(
        cls,
        source: Source,
        start: int,
        end: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        quant: Quant = "none",
        fast: bool = True,
        progress: Progress | None = None,
    ) -> Span:
        """Read blocks [start, end) of `source` and nothing else. Raises `BadSpan`, `CheckpointCorrupt`,
        `ModelUnsupported`.

        `fast` lets the span use packed weights and the fast path where they agree with the generic one; `quant`
        changes the weights themselves.
        """
        span = cls._read(source, start, end, dtype, device, progress)
        span._one_by_one = cuts_matter(span)
        if fast or quant != "none":
            try:
                span._speed_up(quant)
            except (AttributeError, RuntimeError, _Disagrees) as error:
                if quant != "none":
                    raise ModelUnsupported(f"{source.name} does not run with {quant} weights: {error}") from error
                log.warning("%s runs without packed weights: %s", source.name, error)
                span, cuts = cls._read(source, start, end, dtype, device, progress), span._one_by_one
                span._one_by_one = cuts
        return span

    @classmethod
    def _read(
        cls,
        source: Source,
        start: int,
        end: int,
        dtype: torch.dtype,
        device: str | torch.device,
        progress: Progress | None,
    ) -> Span:
        blocks = source.num_blocks
        if not 0 <= start < end <= blocks:
            raise BadSpan(f"blocks {start}:{end} are no span of {source.name}, which has {blocks} blocks (0:{blocks})")
        model = build_meta_model(copy.deepcopy(source.config), dtype=dtype)
        decoder, name = decoder_of(model), layers_name(model)
        layers = getattr(decoder, name)
        for index in range(blocks):
            if not start <= index < end:
                layers[index] = nn.Identity()
        stub_all_but(model, decoder, name, int(source.config.hidden_size))
        load_into(model, source, dtype=dtype, device=device, progress=progress)
        setattr(decoder, name, nn.ModuleList(list(layers)[start:end]))
        rebase(model, getattr(decoder, name), start, end, blocks)
        return cls(model, source, start, end, dtype, torch.device(device))

    @property
    def plain(self) -> bool:
        """Whether sessions keep nothing but keys and values."""
        return self._plain

    @property
    def fast(self) -> bool:
        """Whether the fast path is in use."""
        return self._fused is not None

    def _speed_up(self, quant: Quant) -> None:
        """Pack the weights, and switch the fast path on if it computes what the family's own code does."""
        usual = sample(self)
        layers = decoder_layers(self._model)
        self.weight_bytes = pack_linears(layers, quant)
        self.quant = quant
        packed = sample(self)
        if quant == "none" and differs(packed, usual, self.dtype):
            raise _Disagrees("packed weights compute something else")
        if not self._plain:
            return
        rotary = getattr(decoder_of(self._model), "rotary_emb", None)
        self._fused = FusedBlocks.of(self._model.config, layers, rotary)
        if self._fused is not None and differs(sample(self), packed, self.dtype, rough=quant != "none"):
            log.warning("%s runs without its fast path, which computes something else", self.name)
            self._fused = None

    # ---- sessions --------------------------------------------------------------------------------------------------

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of KV per token, row and block, rounded up."""
        return -(-sum(self._token_bytes) // len(self._token_bytes))

    def cache_bytes(self, batch: int, max_length: int, *, start: int | None = None, end: int | None = None) -> int:
        """Bytes that a session over blocks [start, end) keeps. The whole span by default."""
        first, last = self._local(start, end)
        tokens = sum(self._token_bytes[first:last]) * batch * max_length
        return tokens + self._fixed_bytes * batch * (last - first) // len(self._token_bytes)

    def open(self, batch: int, max_length: int, *, start: int | None = None, end: int | None = None) -> SpanCache:
        """An empty cache; its memory is taken as tokens come."""
        first, last = self._local(start, end)
        state = SlabCache(batch, max_length) if self._plain else DynamicState(self._model.config, batch, max_length)
        nbytes = self.cache_bytes(batch, max_length, start=start, end=end)
        return SpanCache(self.start + first, self.start + last, state, nbytes)

    def _local(self, start: int | None, end: int | None) -> tuple[int, int]:
        first = 0 if start is None else start - self.start
        last = self.end - self.start if end is None else end - self.start
        if not 0 <= first < last <= self.end - self.start:
            raise BadSpan(f"blocks {start}:{end} are not within {self.start}:{self.end}")
        return first, last

    def check(self, job: SpanJob) -> None:
        """Raises `BadStep` or `ContextTooLong` for a step that cannot run; the session is untouched."""
        hidden, cache = job.hidden, job.cache
        if hidden.dim() != 3 or hidden.shape[0] != cache.batch or hidden.shape[2] != self.hidden_size:
            raise BadStep(
                f"hidden states of shape {tuple(hidden.shape)} instead of ({cache.batch}, tokens, {self.hidden_size})"
            )
        if not hidden.is_floating_point():
            raise BadStep(f"hidden states of dtype {str(hidden.dtype).removeprefix('torch.')}")
        if hidden.shape[1] == 0:
            raise BadStep("a step without tokens")
        if job.position > cache.position:
            raise BadStep(f"the step starts at token {job.position}, the session holds {cache.position}")
        if job.position + hidden.shape[1] > cache.max_length:
            raise ContextTooLong(
                f"{job.position + hidden.shape[1]} tokens are more than the {cache.max_length} this session reserved"
            )
        if job.padding and (len(job.padding) != cache.batch or max(job.padding) >= job.position + hidden.shape[1]):
            raise BadStep(f"padding {job.padding} does not fit {cache.batch} rows")
        if job.hypo_ids and (len(job.hypo_ids) != cache.batch or max(job.hypo_ids) >= cache.batch):
            raise BadStep(f"hypo_ids {job.hypo_ids} do not name rows of a batch of {cache.batch}")
        if not bool(torch.isfinite(hidden).all()):
            raise BadStep("hidden states that are not finite (NaN or infinity)")

    # ---- computing -------------------------------------------------------------------------------------------------

    def run(self, jobs: Sequence[SpanJob]) -> list[torch.Tensor]:
        """The outputs [batch, n, hidden size] of `jobs`, in order, of different sessions.

        Jobs over the same blocks run together: all of them on the fast path, those of one token on the generic one.
        Raises `BadStep`, with nothing done, where a cache cannot roll back to where its job starts.
        """
        outputs: list[torch.Tensor | None] = [None] * len(jobs)
        together: dict[tuple[int, int], list[int]] = {}
        with self._lock, torch.inference_mode():
            for job in jobs:
                job.cache.state.roll_back(job.position)  # raises before anything has changed that matters
            for index, job in enumerate(jobs):
                if job.hypo_ids:
                    job.cache.state.reorder(torch.tensor(job.hypo_ids, device=self.device))
                if self._fused is not None or (self._plain and job.hidden.shape[1] == 1):
                    together.setdefault((job.cache.start, job.cache.end), []).append(index)
                elif self._one_by_one and job.position > 0:
                    outputs[index] = torch.cat([self._forward([one]) for one in job.singly()], dim=1)
                else:
                    outputs[index] = self._forward([job])
            for indices in together.values():
                chosen = [jobs[index] for index in indices]
                parts = self._run_fused(chosen) if self._fused is not None else self._run_decodes(chosen)
                for index, part in zip(indices, parts, strict=True):
                    outputs[index] = part
        return [output for output in outputs if output is not None]

    def _run_fused(self, jobs: Sequence[SpanJob]) -> Sequence[torch.Tensor]:
        assert self._fused is not None
        plans = []
        for job in jobs:
            assert isinstance(job.cache.state, SlabCache)
            plans.append(FusedJob(job.cache.state, job.hidden.shape[1], job.padding if any(job.padding) else ()))
        flat = [job.hidden.reshape(-1, self.hidden_size) for job in jobs]
        hidden = (torch.cat(flat) if len(flat) > 1 else flat[0]).to(self.device, self.dtype)
        first, last = jobs[0].cache.start - self.start, jobs[0].cache.end - self.start
        output = self._fused.run(plans, hidden, first, last)
        for job in jobs:
            job.cache.state.advance(job.position + job.hidden.shape[1])
        parts = torch.split(output, [plan.rows for plan in plans])
        return [part.view(job.hidden.shape) for part, job in zip(parts, jobs, strict=True)]

    def _run_decodes(self, jobs: Sequence[SpanJob]) -> Sequence[torch.Tensor]:
        return torch.split(self._forward(jobs), [job.cache.batch for job in jobs])

    def _forward(self, jobs: Sequence[SpanJob]) -> torch.Tensor:
        states = [job.cache.state for job in jobs]
        slabs = [state for state in states if isinstance(state, SlabCache)]
        cache = StepCache(slabs, self.end - self.start) if slabs else states[0].cache  # type: ignore[union-attr]
        hidden = torch.cat([job.hidden for job in jobs]) if len(jobs) > 1 else jobs[0].hidden
        hidden = hidden.to(self.device, self.dtype)
        mask, positions = self._mask(jobs, hidden.shape[1])
        first, last = jobs[0].cache.start, jobs[0].cache.end
        output = self._generic(hidden, first, last, mask, positions, past_key_values=cache, use_cache=True)
        for state, job in zip(states, jobs, strict=True):
            state.advance(job.position + hidden.shape[1])
        return output

    def _mask(self, jobs: Sequence[SpanJob], tokens: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(attention mask [rows, longest] or None if all tokens count, position ids [rows, tokens])."""
        longest = max(job.position for job in jobs) + tokens
        blank: list[int] = []  # masked tokens before each row's first real one, right-aligned
        first: list[int] = []  # position of each row's first new token
        for job in jobs:
            padding = job.padding or (0,) * job.cache.batch
            blank += [longest - job.position - tokens + pad for pad in padding]
            first += [job.position - pad for pad in padding]
        ahead = torch.arange(tokens, device=self.device)
        positions = (torch.tensor(first, device=self.device)[:, None] + ahead).clamp_min(0)
        if not any(blank):
            return None, positions
        columns = torch.arange(longest, device=self.device)
        return (columns >= torch.tensor(blank, device=self.device)[:, None]).long(), positions

    def differentiable(self, hidden: torch.Tensor, start: int, end: int, padding: tuple[int, ...] = ()) -> torch.Tensor:
        """Blocks [start, end) over whole sequences `hidden` [rows, tokens, hidden size], without a cache.

        With gradients enabled, the output leads back to `hidden` where that asks for its gradient; weights never do.
        """
        hidden = hidden.to(self.device, self.dtype)
        pads = torch.tensor(padding or (0,) * hidden.shape[0], device=self.device)[:, None]
        columns = torch.arange(hidden.shape[1], device=self.device)
        mask = (columns >= pads).long() if any(padding) else None
        with self._lock:
            return self._generic(hidden, start, end, mask, (columns - pads).clamp_min(0), use_cache=False)

    def _generic(
        self,
        hidden: torch.Tensor,
        start: int,
        end: int,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
        **cache: Any,
    ) -> torch.Tensor:
        """Blocks [start, end) by the family's own code. What it does with its input before them is thrown away."""
        first, last = self._local(start, end)
        self._pass = running = _Pass(first, last, hidden)
        try:
            self._model(inputs_embeds=hidden.detach(), attention_mask=mask, position_ids=positions, **cache)
        except BaseException:
            for module in self._model.modules():
                if isinstance(module, FusedLinear):
                    module.forget()
            raise
        finally:
            self._pass = None
        assert running.output is not None
        return running.output

    def weights(self) -> Iterator[torch.Tensor]:
        """Every parameter and buffer held."""
        yield from self._model.parameters()
        yield from self._model.buffers()

    def _guard(self, forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        """A block's forward, between taking the hidden state in (our first) and putting the output out (our last)."""

        @functools.wraps(forward)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            running = self._pass
            assert running is not None, "blocks run inside Span.run only"
            if not running.start <= index < running.end:
                given = args[0] if args else kwargs["hidden_states"]
                return (given,) * 2 if self._returns_tuple else given
            if index == running.start:
                if args:
                    args = (running.hidden, *args[1:])
                else:
                    kwargs["hidden_states"] = running.hidden
            output = forward(*args, **kwargs)
            self._returns_tuple = isinstance(output, tuple)
            if index == running.end - 1:
                running.output = output[0] if isinstance(output, tuple) else output
            return output

        return guarded

    def _probe(self) -> tuple[list[int], int]:
        """Run two tokens: (bytes per token and row of each block, bytes of state that does not grow)."""
        count = self.end - self.start
        sizes: list[int] = []
        state: SlabCache | DynamicState
        for tokens in (1, 2):
            state = SlabCache(1, tokens) if self._plain else DynamicState(self._model.config, 1, tokens)
            cache = SpanCache(self.start, self.end, state, 0)
            self.run([SpanJob(cache, torch.zeros(1, tokens, self.hidden_size), 0)])
            if isinstance(state, SlabCache):
                layer_bytes = state.layer_bytes
                return [layer_bytes.get(layer, 0) for layer in range(count)], 0
            sizes.append(state.nbytes)
        grown = sizes[1] - sizes[0]
        return [-(-grown // count)] * count, max(0, sizes[0] - grown)

    def measure(self) -> float:
        """Milliseconds of one token through one block, at batch 1."""
        cache = self.open(1, MEASURED_STEPS + 2)
        times = []
        for position in range(MEASURED_STEPS + 2):
            started = time.perf_counter()
            self.run([SpanJob(cache, torch.zeros(1, 1, self.hidden_size), position)])
            times.append(time.perf_counter() - started)
        return statistics.median(times[2:]) * 1e3 / (self.end - self.start)
