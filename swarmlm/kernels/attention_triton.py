"""`attention.attend` on a GPU: flash decoding over rows that live in separate slabs. Called by `attention` only.

A table of base addresses and strides, one line a row, is all that the kernel is told about where keys and values are,
so a batch of sessions costs one small copy to the device however long they are. Each row's keys are cut into `splits`
stretches so that few and long rows still fill the GPU: `_attend` leaves every stretch's maximum, sum and weighted
values, and `_combine` merges them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from swarmlm.kernels.backend import launching_on

TABLE = 8  # int64 a row: key and value address, head and token strides of each in items, first and end slot
STEP_BYTES = 2**14  # bytes of keys read at a step: with queries and values it fits the 64 KB of the smallest SMs
MAX_STEP = 64  # keys a step
MIN_QUERIES = 16  # rows of the smallest matrix product of tensor cores: smaller groups of query heads are padded
MAX_SPLITS = 64  # stretches of a row: `_combine` holds a row's all in registers
PROGRAMS_PER_SM = 2  # so that one program computes while another waits for memory

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query,
    table,
    sums,
    peaks,
    weights,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    TABLE: tl.constexpr,
    STORED: tl.constexpr,
    PRODUCT: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    line = table + row * TABLE
    key_base = tl.load(line).to(tl.pointer_type(STORED)) + kv_head * tl.load(line + 2)
    key_step = tl.load(line + 3)
    value_base = tl.load(line + 1).to(tl.pointer_type(STORED)) + kv_head * tl.load(line + 4)
    value_step = tl.load(line + 5)
    first = tl.load(line + 6)
    end = tl.load(line + 7)
    stretch = tl.cdiv(tl.cdiv(end - first, SPLITS), KEYS) * KEYS
    low = first + split * stretch
    high = tl.minimum(low + stretch, end)

    member = tl.arange(0, QUERIES)
    column = tl.arange(0, WIDTH)
    value_column = tl.arange(0, VALUE_WIDTH)
    head = (row * KV_HEADS + kv_head) * GROUP + member
    q = tl.load(
        query + head[:, None] * SIZE + column[None, :],
        mask=(member[:, None] < GROUP) & (column[None, :] < SIZE),
        other=0.0,
    ).to(PRODUCT)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    total = tl.zeros((QUERIES, VALUE_WIDTH), tl.float32)
    for start in range(low, high, KEYS):
        slot = start + tl.arange(0, KEYS)
        here = slot < high
        k = tl.load(
            key_base + slot[:, None] * key_step + column[None, :],
            mask=here[:, None] & (column[None, :] < SIZE),
            other=0.0,
        ).to(PRODUCT)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(here[None, :], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        share = tl.exp(score - new_peak[:, None])
        fade = tl.exp(peak - new_peak)
        weight = weight * fade + tl.sum(share, 1)
        v = tl.load(
            value_base + slot[:, None] * value_step + value_column[None, :],
            mask=here[:, None] & (value_column[None, :] < VALUE_SIZE),
            other=0.0,
        ).to(PRODUCT)
        total = total * fade[:, None] + tl.dot(share.to(PRODUCT), v, input_precision="ieee")
        peak = new_peak
    part = head * SPLITS + split
    tl.store(peaks + part, peak, mask=member < GROUP)
    tl.store(weights + part, weight, mask=member < GROUP)
    tl.store(
        sums + part[:, None] * VALUE_SIZE + value_column[None, :],
        total,
        mask=(member[:, None] < GROUP) & (value_column[None, :] < VALUE_SIZE),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    sums,
    peaks,
    weights,
    out,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
) -> None:
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, PARTS)
    column = tl.arange(0, VALUE_WIDTH)
    part = head * SPLITS + split
    peak = tl.load(peaks + part, mask=split < SPLITS, other=float("-inf"))
    share = tl.exp(peak - tl.max(peak, 0))  # 0 for a stretch without keys
    weight = tl.sum(share * tl.load(weights + part, mask=split < SPLITS, other=0.0), 0)
    total = tl.load(
        sums + part[:, None] * VALUE_SIZE + column[None, :],
        mask=(split[:, None] < SPLITS) & (column[None, :] < VALUE_SIZE),
        other=0.0,
    )
    mean = tl.sum(share[:, None] * total, 0) / weight
    tl.store(out + head * VALUE_SIZE + column, mean.to(out.dtype.element_ty), mask=column < VALUE_SIZE)


def ragged_decode_attention(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    spans: Sequence[tuple[int, int]],
    scale: float,
    splits: int | None = None,
) -> torch.Tensor:
    """As `attention.attend`; shapes have been checked. `splits` is chosen to fill the GPU if None."""
    rows, heads, size = query.shape
    kv_heads, value_size = keys[0].shape[0], values[0].shape[-1]
    group = heads // kv_heads
    if splits is None:
        splits = _splits(query.device, rows * kv_heads, max(end - first for first, end in spans))
    query = query.contiguous()
    sums = query.new_empty((rows, heads, splits, value_size), dtype=torch.float32)
    peaks = query.new_empty((rows, heads, splits), dtype=torch.float32)
    weights = torch.empty_like(peaks)
    out = query.new_empty(rows, heads, value_size)
    with launching_on(query.device):
        _attend[(rows, kv_heads, splits)](
            query,
            row_table(keys, values, spans).to(query.device),
            sums,
            peaks,
            weights,
            scale,
            KV_HEADS=kv_heads,
            GROUP=group,
            SPLITS=splits,
            SIZE=size,
            VALUE_SIZE=value_size,
            QUERIES=max(MIN_QUERIES, triton.next_power_of_2(group)),
            WIDTH=max(16, triton.next_power_of_2(size)),
            VALUE_WIDTH=max(16, triton.next_power_of_2(value_size)),
            KEYS=step_keys(query),
            TABLE=TABLE,
            STORED=_DTYPES[query.dtype],
            PRODUCT=product_dtype(query.dtype),
        )
        _combine[(rows * heads,)](
            sums,
            peaks,
            weights,
            out,
            SPLITS=splits,
            PARTS=triton.next_power_of_2(splits),
            VALUE_SIZE=value_size,
            VALUE_WIDTH=max(16, triton.next_power_of_2(value_size)),
        )
    return out


def row_table(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], spans: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """[rows, TABLE] int64 on the CPU: where each row is and what it sees. The tensors must outlive the kernel."""
    lines = []
    for key, value, span in zip(keys, values, spans, strict=True):
        if key.stride(2) != 1 or value.stride(2) != 1:
            raise ValueError("keys and values must be contiguous along the head size")
        strides = key.stride(0), key.stride(1), value.stride(0), value.stride(1)
        lines.append((key.data_ptr(), value.data_ptr(), *strides, *span))
    return torch.tensor(lines, dtype=torch.int64)


def step_keys(query: torch.Tensor) -> int:
    """Keys that a program reads at once: a power of two, at least the 16 that a matrix product takes."""
    width: int = triton.next_power_of_2(query.shape[-1])
    return max(16, min(MAX_STEP, STEP_BYTES // (width * query.element_size())))


def product_dtype(stored: torch.dtype) -> Any:
    """What products run in: the stored dtype, but float32 for bfloat16 in Triton's interpreter, which has none."""
    if stored is torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return _DTYPES[stored]


def _splits(device: torch.device, programs: int, longest: int) -> int:
    if device.type != "cuda":
        return 1
    wanted = PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    useful = min(wanted // programs, -(-longest // MAX_STEP), MAX_SPLITS)
    return 1 << max(0, useful.bit_length() - 1)  # a power of two: every count is a kernel to compile
