"""Linear layers for few rows: float32 weights in the blocked layout of torch's oneDNN.

The usual row-major product is slow at one row and poor at a few: on the machines measured, packed weights are read 1.4
to 1.9 times as fast for 1 to 32 rows, and are no slower for hundreds. The packed weights replace the others, so memory
does not grow; a backward pass, which needs them row-major, unpacks them for the moment.

Reference: `torch.nn.functional.linear` on the same weights.
"""

from __future__ import annotations

import bisect
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

PACKED_ROWS = 16  # the row count that the layout is chosen for: blocked for small batches, good at all others
ROW_COUNTS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # that products are computed for: oneDNN makes
# and keeps code for each count and shape, half a MB; below four rows its other kernel is slower than four rows of this
SKINNY_ROWS = 8  # rows: more are computed the usual way
SURE = 0.9  # times the usual product's time: less is not worth another way
TURNS = 8  # of each product measured: the best of them is one that nobody disturbed
TRIED_ROWS = (1, 4, 16, 64)  # a decode step, small and large batches of them, a slice of a prompt


class PackedLinear(nn.Module):
    """`weight` is [out features, in features] float32 on the CPU. Frozen: gradients flow to the input only."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACKED_ROWS)
        self._bias = bias.detach() if bias is not None else None

    @property
    def nbytes(self) -> int:
        return self.out_features * self.in_features * 4

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What `swarmlm.models.scripted` computes with."""
        return [self._packed]

    @property
    def bias(self) -> torch.Tensor | None:
        return self._bias

    def dense(self) -> torch.Tensor:
        """The weight row-major, a copy."""
        weight: torch.Tensor = self._packed.to_dense()
        return weight

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and given.requires_grad:
            output: torch.Tensor = _Frozen.apply(given, self)  # type: ignore[no-untyped-call]
            return output
        return self.product(given)

    def product(self, given: torch.Tensor) -> torch.Tensor:
        rows = given.numel() // self.in_features
        flat = given.reshape(rows, self.in_features)
        if rows <= ROW_COUNTS[-1]:
            output = _product(filled(flat), self._packed, self._bias)[:rows]
        else:
            pieces = torch.split(flat, ROW_COUNTS[-1])
            output = torch.cat([_product(filled(piece), self._packed, self._bias)[: len(piece)] for piece in pieces])
        return output.view(*given.shape[:-1], self.out_features)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, linear: Any) -> torch.Tensor:
        ctx.linear = linear
        output: torch.Tensor = linear.product(given)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.linear.dense(), None


def _product(given: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(given, packed, bias, "none", [], "")
    return output


def filled(rows: torch.Tensor) -> torch.Tensor:
    """`rows` [count, features], and zeros up to the next of `ROW_COUNTS`."""
    count = rows.shape[0]
    place = bisect.bisect_left(ROW_COUNTS, count)
    if place == len(ROW_COUNTS) or ROW_COUNTS[place] == count:
        return rows
    return torch.cat((rows, rows.new_zeros(ROW_COUNTS[place] - count, rows.shape[1])))


def skinny_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`rows` [few, in features] times the usual row-major `weight` [out features, in features]: [few, out features].

    Computed the other way round, with two rows at least: some libraries read the weights twice as fast like that.
    """
    if rows.shape[0] > 1:
        return (weight @ rows.t()).t()
    return (weight @ torch.cat((rows, rows)).t())[:, :1].t()


def skinny_pays(weight: torch.Tensor) -> bool:
    """Whether this machine computes `skinny_product` faster than the usual one, up to SKINNY_ROWS rows."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    with torch.inference_mode():
        for count in (1, SKINNY_ROWS):
            rows = torch.ones(count, weight.shape[1])
            skinny, usual = (functools.partial(work, rows, weight) for work in (skinny_product, nn.functional.linear))
            if _compare(skinny, usual, turns=2) > SURE:
                return False
    return True


def packing_pays(weight: torch.Tensor) -> bool:
    """Whether packed products of this machine beat the usual ones over the row counts that hosts see. About 50 ms."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    try:
        packed = PackedLinear(weight)
        with torch.inference_mode():
            ratios = []
            for rows in TRIED_ROWS:
                given = torch.ones(rows, weight.shape[1])
                usual = functools.partial(nn.functional.linear, given, weight)
                ratios.append(_compare(functools.partial(packed.product, given), usual))
    except (RuntimeError, NotImplementedError, AttributeError):
        return False  # a torch built without oneDNN
    return sum(ratios) < len(ratios)


def _compare(one: Callable[[], object], other: Callable[[], object], turns: int = TURNS) -> float:
    """The time of `one` over that of `other`: their best of several turns, since others may be using the machine."""
    best = [math.inf, math.inf]
    for _ in range(turns):
        for side, work in enumerate((one, other)):
            started = time.perf_counter()
            work()
            best[side] = min(best[side], time.perf_counter() - started)
    return best[0] / best[1]
