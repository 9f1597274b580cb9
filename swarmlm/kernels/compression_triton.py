"""`compression.pack_int8` and `unpack_int8` as a GPU kernel each, byte for byte the same. Called by `compression` only.

One program packs or unpacks BLOCKS blocks of a row. The arithmetic is spelled out where GPUs would round otherwise:
division to nearest, no fused multiply-add, bfloat16 by its bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from swarmlm.kernels.backend import launching_on
from swarmlm.kernels.compression import BLOCK, MIN_SCALE, PER_CODE, hidden_size, packed_size

BLOCKS = 32  # blocks a program: 1024 values, 8 a thread with four warps
ROUNDING = 12_582_912.0  # 1.5 x 2^23: adding and subtracting it rounds a float32 below 2^22 to the nearest even integer


@triton.jit  # type: ignore[untyped-decorator]
def _pack(  # type: ignore[no-untyped-def]
    values,
    packed,
    row_stride,
    hidden,
    blocks,
    width,
    PER_CODE: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(values + row * row_stride + column, mask=column < hidden, other=0.0).to(tl.float32)
    size = tl.abs(x)
    broken = tl.max((~(size < float("inf"))).to(tl.int32), 1)  # tl.max drops NaNs
    scale = tl.maximum(tl.max(size, 1) * PER_CODE, MIN_SCALE)
    bits = scale.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to the nearest bfloat16, ties to even
    stored = (bits << 16).to(tl.float32, bitcast=True)
    inverse = tl.math.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), stored)
    scaled = tl.where(broken[:, None] == 0, x * inverse[:, None], 0.0)
    code = ((scaled + ROUNDING) - ROUNDING).to(tl.int32)
    base = packed + row * width
    tl.store(base + column, (code & 0xFF).to(tl.uint8), mask=column < hidden)
    bits = tl.where(broken == 0, bits, 0x7FC0)  # a NaN, which `is_exact_enough` finds
    tl.store(base + hidden + 2 * block, (bits & 0xFF).to(tl.uint8), mask=block < blocks)
    tl.store(base + hidden + 2 * block + 1, (bits >> 8).to(tl.uint8), mask=block < blocks)


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(  # type: ignore[no-untyped-def]
    packed, values, hidden, blocks, width, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    base = packed + row * width
    low = tl.load(base + hidden + 2 * block, mask=block < blocks, other=0).to(tl.int32)
    high = tl.load(base + hidden + 2 * block + 1, mask=block < blocks, other=0).to(tl.int32)
    scale = ((high << 24) | (low << 16)).to(tl.float32, bitcast=True)
    code = tl.load(base + column, mask=column < hidden, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    tl.store(values + row * hidden + column, code * scale[:, None], mask=column < hidden)


def pack_int8(values: torch.Tensor) -> torch.Tensor:
    """[..., hidden] of any float dtype -> [..., packed_size(hidden)] uint8 on the same device."""
    hidden = values.shape[-1]
    rows = values.reshape(-1, hidden)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    blocks, width = -(-hidden // BLOCK), packed_size(hidden)
    packed = rows.new_empty((len(rows), width), dtype=torch.uint8)
    with launching_on(rows.device):
        _pack[(len(rows), triton.cdiv(blocks, BLOCKS))](
            rows,
            packed,
            rows.stride(0),
            hidden,
            blocks,
            width,
            PER_CODE=PER_CODE,
            MIN_SCALE=MIN_SCALE,
            ROUNDING=ROUNDING,
            BLOCKS=BLOCKS,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
    return packed.view(*values.shape[:-1], width)


def unpack_int8(packed: torch.Tensor) -> torch.Tensor:
    """[..., packed_size(hidden)] uint8 -> [..., hidden] float32. Raises `BadStep` for a width that no row packs to."""
    width = packed.shape[-1]
    hidden = hidden_size(width)
    rows = packed.reshape(-1, width).contiguous()
    blocks = -(-hidden // BLOCK)
    values = rows.new_empty((len(rows), hidden), dtype=torch.float32)
    with launching_on(rows.device):
        _unpack[(len(rows), triton.cdiv(blocks, BLOCKS))](
            rows, values, hidden, blocks, width, BLOCKS=BLOCKS, BLOCK=BLOCK
        )
    return values.view(*packed.shape[:-1], hidden)
