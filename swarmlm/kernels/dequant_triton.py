"""Products of a few rows with int8 or nf4 weights on a GPU, which reads the weights once and in their small form.

Decoding is bound by the bytes of weights read, so dequantising in registers makes it as much faster as weights are
smaller. More than FEW_ROWS (a prefill) are dequantised for and multiplied as usual. One program makes OUTPUTS outputs
of up to ROWS rows. May be called by whoever runs quantised layers; the reference is `quant_reference.matmul`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from swarmlm.kernels.attention_triton import product_dtype
from swarmlm.kernels.backend import launching_on
from swarmlm.kernels.quant_reference import NF4_BLOCK, Int8Weight, NF4Weight, nf4_levels

ROWS = 16  # rows a program: the smallest matrix product of tensor cores
OUTPUTS = 32  # outputs a program: 4096 outputs are 128 programs, about one for each SM of a large GPU
INPUTS = 128  # weights of an output that a program reads at once: 128 bytes of int8, one cache line
FEW_ROWS = (
    64  # rows: beyond them a product is bound by arithmetic, and dequantising once before it costs less; unmeasured
)


@triton.jit  # type: ignore[untyped-decorator]
def _int8(  # type: ignore[no-untyped-def]
    rows,
    codes,
    scales,
    out,
    count,
    inputs,
    outputs,
    row_stride,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PRODUCT: tl.constexpr,
) -> None:
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows += row[:, None].to(tl.int64) * row_stride
    codes += output[:, None].to(tl.int64) * inputs
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        column = start + tl.arange(0, INPUTS)[None, :]
        x = tl.load(rows + column, mask=(row[:, None] < count) & (column < inputs), other=0.0)
        w = tl.load(codes + column, mask=(output[:, None] < outputs) & (column < inputs), other=0)
        total += tl.dot(x.to(PRODUCT), tl.trans(w.to(PRODUCT)), input_precision="ieee")
    scale = tl.load(scales + output, mask=output < outputs, other=0.0)
    tl.store(
        out + row[:, None].to(tl.int64) * outputs + output[None, :],
        (total * scale[None, :]).to(out.dtype.element_ty),
        mask=(row[:, None] < count) & (output[None, :] < outputs),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _nf4(  # type: ignore[no-untyped-def]
    rows,
    codes,
    scales,
    levels,
    out,
    count,
    inputs,
    blocks,
    outputs,
    row_stride,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRODUCT: tl.constexpr,
) -> None:
    PAIRS: tl.constexpr = BLOCK // 2
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows += row[:, None].to(tl.int64) * row_stride
    codes += output[:, None].to(tl.int64) * blocks * PAIRS
    scales += output.to(tl.int64) * blocks
    pair = tl.arange(0, PAIRS)[None, :]
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for block in range(0, blocks):
        first = block * BLOCK + 2 * pair  # the column of a byte's high half; its low half is the next one
        x_first = tl.load(rows + first, mask=(row[:, None] < count) & (first < inputs), other=0.0)
        x_second = tl.load(rows + first + 1, mask=(row[:, None] < count) & (first + 1 < inputs), other=0.0)
        both = tl.load(codes + block * PAIRS + pair, mask=output[:, None] < outputs, other=0).to(tl.int32)
        scale = tl.load(scales + block, mask=output < outputs, other=0.0)[:, None]
        w_first = tl.load(levels + (both >> 4)) * scale
        w_second = tl.load(levels + (both & 15)) * scale
        total += tl.dot(x_first.to(PRODUCT), tl.trans(w_first.to(PRODUCT)), input_precision="ieee")
        total += tl.dot(x_second.to(PRODUCT), tl.trans(w_second.to(PRODUCT)), input_precision="ieee")
    tl.store(
        out + row[:, None].to(tl.int64) * outputs + output[None, :],
        total.to(out.dtype.element_ty),
        mask=(row[:, None] < count) & (output[None, :] < outputs),
    )


def matmul(rows: torch.Tensor, weight: Int8Weight | NF4Weight) -> torch.Tensor:
    """[..., in] -> [..., out] in the dtype of `rows` (float32, float16, bfloat16): rows times the transposed weight.

    Sums are float32. nf4 weights are rounded to the dtype of `rows` before the product, as the reference does.
    """
    outputs, inputs = weight.shape
    flat = rows.reshape(-1, inputs)
    if len(flat) > FEW_ROWS:
        return F.linear(rows, weight.dequantise(rows.dtype))
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    out = flat.new_empty(len(flat), outputs)
    grid = (triton.cdiv(outputs, OUTPUTS), triton.cdiv(len(flat), ROWS))
    product = product_dtype(rows.dtype)
    codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
    if isinstance(weight, Int8Weight):
        with launching_on(rows.device):
            _int8[grid](
                flat,
                codes,
                scales,
                out,
                len(flat),
                inputs,
                outputs,
                flat.stride(0),
                ROWS=ROWS,
                OUTPUTS=OUTPUTS,
                INPUTS=INPUTS,
                PRODUCT=product,
            )
    else:
        with launching_on(rows.device):
            _nf4[grid](
                flat,
                codes,
                scales,
                nf4_levels(rows.device),
                out,
                len(flat),
                inputs,
                scales.shape[1],
                outputs,
                flat.stride(0),
                ROWS=ROWS,
                OUTPUTS=OUTPUTS,
                BLOCK=NF4_BLOCK,
                PRODUCT=product,
            )
    return out.view(*rows.shape[:-1], outputs)
