"""Attention over rows of different lengths: the reference against float64, and against a padded, masked batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from swarmlm.errors import BadStep
from swarmlm.kernels.attention import ragged_decode_attention
from swarmlm.models.cache import SlabCache, StepCache

KV_HEADS, GROUP, SIZE = 2, 3, 8
ROOM = 40  # tokens


def slabs(rows: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(KV_HEADS, ROOM + row, SIZE).to(dtype) for row in range(rows)]


def exact(
    query: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], shown: Sequence[Sequence[int]]
) -> torch.Tensor:
    """In float64, one query head after another; `shown` are the slots that each row sees."""
    out = torch.zeros(*query.shape[:2], values[0].shape[-1], dtype=torch.float64)
    for row, slots in enumerate(shown):
        for head in range(query.shape[1]):
            key = keys[row][head // GROUP, list(slots)].double()
            value = values[row][head // GROUP, list(slots)].double()
            out[row, head] = torch.softmax(key @ query[row, head].double() * SIZE**-0.5, 0) @ value
    return out


@given(st.data())
def test_every_row_sees_its_own_slots(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, ROOM), min_size=1, max_size=5))
    padding = [data.draw(st.integers(0, length - 1)) for length in lengths]
    window = data.draw(st.none() | st.integers(1, ROOM))
    keys, values = slabs(len(lengths)), slabs(len(lengths))
    query = torch.randn(len(lengths), KV_HEADS * GROUP, SIZE)
    shown = [
        [slot for slot in range(pad, length) if window is None or slot >= length - window]
        for length, pad in zip(lengths, padding, strict=True)
    ]
    found = ragged_decode_attention(query, keys, values, lengths, padding, window=window)
    torch.testing.assert_close(found.double(), exact(query, keys, values, shown), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(dtype: torch.dtype) -> None:
    keys, values, lengths = slabs(3, dtype), slabs(3, dtype), [40, 7, 1]
    query = torch.randn(3, KV_HEADS * GROUP, SIZE).to(dtype)
    found = ragged_decode_attention(query, keys, values, lengths)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), exact(query, keys, values, [range(length) for length in lengths]), rtol=2e-2, atol=2e-2
    )


def test_it_equals_the_padded_batch_of_the_step_cache() -> None:
    """Three sessions, the second a batch of two, decode one token: as StepCache with a mask, without its copies."""
    held = (5, 17, 11)
    caches = [SlabCache(batch, ROOM) for batch in (1, 2, 1)]
    for cache, position in zip(caches, held, strict=True):
        past = torch.randn(cache.batch, KV_HEADS, position, SIZE), torch.randn(cache.batch, KV_HEADS, position, SIZE)
        StepCache([cache], 1).write(0, *past)
        cache.advance(position)
    new = torch.randn(4, KV_HEADS, 1, SIZE), torch.randn(4, KV_HEADS, 1, SIZE)
    query = torch.randn(4, KV_HEADS * GROUP, SIZE)
    keys, values = StepCache(caches, 1).write(0, *new)
    lengths = [position + 1 for cache, position in zip(caches, held, strict=True) for _ in range(cache.batch)]
    slots = keys.shape[2]
    mask = torch.arange(slots) >= slots - torch.tensor(lengths)[:, None]
    padded = F.scaled_dot_product_attention(
        query[:, :, None], keys, values, attn_mask=mask[:, None, None], enable_gqa=True
    )
    own = [cache.slabs(0, *new) for cache in caches]
    found = ragged_decode_attention(
        query,
        [row for slab, _ in own for row in slab],
        [row for _, slab in own for row in slab],
        lengths,
    )
    torch.testing.assert_close(found, padded[:, :, 0], rtol=1e-5, atol=1e-6)


def test_values_may_have_another_size() -> None:
    query, keys = torch.randn(2, KV_HEADS * GROUP, SIZE), slabs(2)
    values = [torch.randn(KV_HEADS, key.shape[1], 5) for key in keys]
    found = ragged_decode_attention(query, keys, values, [9, 40])
    torch.testing.assert_close(found.double(), exact(query, keys, values, [range(9), range(40)]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lengths": [3, ROOM + 1]}, "sees slots 0:41 of 40"),
        ({"lengths": [3, 0]}, "sees slots 0:0"),
        ({"padding": [3, 0]}, "sees slots 3:3"),
        ({"padding": [-1, 0]}, "sees slots -1:3"),
        ({"lengths": [3]}, "2 queries for 2 keys, 2 values and 1 lengths"),
        ({"window": 0}, "a window of 0 tokens"),
        ({"query": torch.zeros(2, 5, SIZE)}, "5 query heads cannot share 2 kv heads"),
        ({"query": torch.zeros(2, 6, SIZE + 1)}, "unlike its query"),
        ({"query": torch.zeros(2, 6, SIZE, dtype=torch.float16)}, "another size or dtype"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change: dict[str, object], text: str) -> None:
    rows = [torch.zeros(KV_HEADS, ROOM, SIZE)] * 2
    given: dict[str, object] = {"query": torch.zeros(2, KV_HEADS * GROUP, SIZE), "keys": rows, "values": rows}
    with pytest.raises(BadStep, match=text):
        ragged_decode_attention(**{**given, "lengths": [3, 4], **change})  # type: ignore[arg-type]
