"""Weight-only int8: one byte a weight and a scale an output feature.

A few rows go through torch's int8 kernel with bfloat16 activations; more rows through the weights dequantised for the
moment, because that kernel computes poorly where it no longer waits for memory. bfloat16 activations cost about as
much accuracy as the rounding of the weights; both are measured against float32 in the benchmarks.

Reference: `torch.nn.functional.linear` on `dense()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from swarmlm.kernels.backend import runs_triton
from swarmlm.kernels.quant_reference import Int8Weight

KERNEL_ROWS = 16  # rows: measured on AVX-512, above it dequantising and a float32 product are faster
LEVELS = 127  # codes are -127 .. 127: symmetric, so that zero stays zero


class Int8Linear(nn.Module):
    """Made from `weight` [out features, in features]. Frozen: gradients flow to the input only."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._codes, self._scales = quantize(weight.detach())
        self._bias = bias.detach() if bias is not None else None

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What `swarmlm.models.scripted` computes with."""
        return [self._codes, self._scales]

    @property
    def bias(self) -> torch.Tensor | None:
        return self._bias

    def dense(self) -> torch.Tensor:
        """The weight as float32, a copy."""
        return self._codes.float().mul_(self._scales.float()[:, None])

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and given.requires_grad:
            output: torch.Tensor = _Frozen.apply(given, self)  # type: ignore[no-untyped-call]
            return output
        return self.product(given)

    def product(self, given: torch.Tensor) -> torch.Tensor:
        rows = given.numel() // self.in_features
        if runs_triton(given) and self._bias is None:
            from swarmlm.kernels import dequant_triton

            output = dequant_triton.matmul(given.reshape(rows, self.in_features), Int8Weight(self._codes, self._scales))
            return output.to(given.dtype).view(*given.shape[:-1], self.out_features)
        if rows > KERNEL_ROWS or given.device.type != "cpu":
            return nn.functional.linear(given, self.dense().to(given.dtype), self._bias)
        flat = given.reshape(rows, self.in_features).to(torch.bfloat16)
        output = torch._weight_int8pack_mm(flat, self._codes, self._scales).to(given.dtype)
        if self._bias is not None:
            output += self._bias
        return output.view(*given.shape[:-1], self.out_features)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, linear: Any) -> torch.Tensor:
        ctx.linear = linear
        output: torch.Tensor = linear.product(given)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.linear.dense().to(grad.dtype), None


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [out, in], scales bfloat16 [out]): weight is about codes * scales, by rounding to the nearest."""
    widest = weight.float().abs().amax(1)
    scales = (widest / LEVELS).to(torch.bfloat16)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = (weight.float() / scales.float()[:, None]).round_().clamp_(-LEVELS, LEVELS)
    return codes.to(torch.int8), scales
