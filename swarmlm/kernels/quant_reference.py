"""Weight-only quantisation in plain torch: what the kernels of `dequant_triton` are tested against.

- int8: one float32 scale for each output row, codes -127 to 127.
- nf4 ("4-bit NormalFloat", Dettmers et al. 2023): blocks of 64 along the input size, one float32 scale for each, and 16
  levels at the quantiles of a normal distribution. Two codes a byte, the first in the high half, as bitsandbytes packs.

Activations stay as they are. May be called by whoever loads or runs quantised layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

NF4_BLOCK = 64  # weights that share a scale
INT8_TOP = 127  # -128 is not used, so that codes are symmetric
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Int8Weight:
    """`codes` [out, in] int8; `scales` [out] float32. weight = codes x scales[:, None]."""

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[out, in] in `dtype`."""
        return (self.codes.float() * self.scales[:, None]).to(dtype)


@dataclass(frozen=True)
class NF4Weight:
    """`codes` [out, blocks x 32] uint8; `scales` [out, blocks] float32, the largest size in each block of 64.

    `inputs` is the input size: the last block is filled up with zeros.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.inputs

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[out, in] in `dtype`."""
        codes = torch.stack((self.codes >> 4, self.codes & 15), -1).flatten(1).int()
        blocks = nf4_levels(codes.device)[codes].view(len(codes), -1, NF4_BLOCK)
        return (blocks * self.scales[:, :, None]).flatten(1)[:, : self.inputs].to(dtype)


def nf4_levels(device: torch.device | None = None) -> torch.Tensor:
    """The 16 levels, float32."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def quantise_int8(weight: torch.Tensor) -> Int8Weight:
    """Of [out, in]. The error of a weight is at most half its row's scale."""
    wide = weight.detach().float()
    scales = wide.abs().amax(1) / INT8_TOP
    codes = (wide / scales.masked_fill(scales == 0, 1)[:, None]).round_().clamp_(-INT8_TOP, INT8_TOP)
    return Int8Weight(codes.to(torch.int8), scales)


def quantise_nf4(weight: torch.Tensor) -> NF4Weight:
    """Of [out, in]: each weight goes to the nearest level of its block."""
    outputs, inputs = weight.shape
    blocks = F.pad(weight.detach().float(), (0, -inputs % NF4_BLOCK)).view(outputs, -1, NF4_BLOCK)
    scales = blocks.abs().amax(2)
    levels = nf4_levels(weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales.masked_fill(scales == 0, 1)[:, :, None], between).to(torch.uint8)
    pairs = codes.view(outputs, -1, 2)
    return NF4Weight(pairs[:, :, 0] << 4 | pairs[:, :, 1], scales, inputs)


def matmul(rows: torch.Tensor, weight: Int8Weight | NF4Weight) -> torch.Tensor:
    """[..., in] -> [..., out] in the dtype of `rows`: rows times the transposed weight."""
    if isinstance(weight, Int8Weight):  # scales come after the product, and codes times rows overflow float16
        return (F.linear(rows.float(), weight.codes.float()) * weight.scales).to(rows.dtype)
    return F.linear(rows, weight.dequantise(rows.dtype))
