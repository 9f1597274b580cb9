"""Attention of one new token a row over rows of different lengths that live apart, without gathering or padding them.

Used where sessions are decoded together: each row's keys and values stay in that session's own slab
(`SlabCache`, [batch, kv heads, max_length, head size]; a row is `slab[b]`), and nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from swarmlm.errors import BadStep
from swarmlm.kernels.backend import runs_triton


def ragged_decode_attention(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    lengths: Sequence[int],
    padding: Sequence[int] | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """[rows, heads, value head size]: softmax(query keys^T x scale) values, row by row.

    `query` is [rows, heads, head size], one token a row; `keys[r]` and `values[r]` are [kv heads, max_length, head
    size] views of row r's slabs, contiguous along the head size. Query head h reads kv head h // (heads / kv heads).
    Row r sees its slots [padding[r], lengths[r]), the new token's own key included; with `window`, only the last
    `window` of them. `scale` is 1 / sqrt(head size) if None. Raises `BadStep` for rows that do not fit together or that
    see nothing.
    """
    spans = visible(query, keys, values, lengths, padding, window)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if runs_triton(query):
        from swarmlm.kernels import attention_triton

        return attention_triton.ragged_decode_attention(query, keys, values, spans, scale)
    return attend(query, keys, values, spans, scale)


def attend(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    spans: Sequence[tuple[int, int]],
    scale: float,
) -> torch.Tensor:
    """The reference, on any device: a fused attention a row. A group's query heads stand in for query tokens."""
    rows, heads, head_size = query.shape
    kv_heads = keys[0].shape[0]
    grouped = query.reshape(rows, 1, kv_heads, heads // kv_heads, head_size)
    out = query.new_empty(rows, kv_heads, heads // kv_heads, values[0].shape[-1])
    for row, (first, end) in enumerate(spans):
        out[row] = F.scaled_dot_product_attention(
            grouped[row], keys[row][None, :, first:end], values[row][None, :, first:end], scale=scale
        )[0]
    return out.flatten(1, 2)


def visible(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    lengths: Sequence[int],
    padding: Sequence[int] | None,
    window: int | None,
) -> list[tuple[int, int]]:
    """The slots [first, end) that each row sees. Raises `BadStep` where shapes or lengths contradict each other."""
    rows, heads, head_size = query.shape
    pads = [0] * rows if padding is None else padding
    if not rows == len(keys) == len(values) == len(lengths) == len(pads) or rows == 0:
        raise BadStep(f"{rows} queries for {len(keys)} keys, {len(values)} values and {len(lengths)} lengths")
    if window is not None and window < 1:
        raise BadStep(f"a window of {window} tokens shows nothing")
    kv_heads = keys[0].shape[0]
    if heads % kv_heads:
        raise BadStep(f"{heads} query heads cannot share {kv_heads} kv heads evenly")
    spans = []
    for row, (key, value, length, pad) in enumerate(zip(keys, values, lengths, pads, strict=True)):
        if key.shape != (kv_heads, key.shape[1], head_size) or value.shape[:2] != key.shape[:2]:
            raise BadStep(f"row {row} has keys {tuple(key.shape)} and values {tuple(value.shape)}: unlike its query")
        if value.shape[2] != values[0].shape[2] or not key.dtype == value.dtype == query.dtype:
            raise BadStep(f"row {row} has keys or values of another size or dtype than the batch")
        first = pad if window is None else max(pad, length - window)
        if not 0 <= pad <= first < length <= key.shape[1]:
            raise BadStep(f"row {row} sees slots {first}:{length} of {key.shape[1]}")
        spans.append((first, length))
    return spans
