"""Key-value caches of sessions, and how one forward of a family's own layers uses the caches of several.

A session's `SlabCache` is one preallocated slab a layer, [batch, kv heads, max_length, head size], filled up to
`position`. Rolling back is lowering `position`. `StepCache` is what transformers sees during one forward:

- one session: new keys are written in place and views of the slabs returned, nothing is copied;
- a decode batch: each row goes to its own slab, and keys are handed out right-aligned to the longest row, with the
  padding masked, so that the family's own mask code (causal, sliding window, alibi) is right for every row.

Sliding-window layers keep all tokens; the mask is the window. Families whose state is no plain list of keys and values
(recurrent, linear attention) use `DynamicState` instead: transformers' own cache, one session at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from swarmlm.errors import BadStep


class SlabCache:
    """One session's keys and values for the layers of a span that it uses."""

    def __init__(self, batch: int, max_length: int) -> None:
        self.batch = batch
        self.max_length = max_length
        self.position = 0
        self._slabs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def slabs(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's slabs, allocated at first use in the shape and dtype of what is written."""
        if layer not in self._slabs:
            self._slabs[layer] = (self._allocate(keys), self._allocate(values))
        return self._slabs[layer]

    def written(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The slabs of a layer that has been used."""
        return self._slabs[layer]

    def spread(self, first: int, last: int, like: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values of layers [first, last) by layer number, made where there are none yet.

        `like` is [batch, kv heads, any, head size]; it also stands for the layers before `first`.
        """
        pairs = [self.slabs(layer, like, like) if layer >= first else (like, like) for layer in range(last)]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(self.batch, like.shape[1], self.max_length, like.shape[3])

    def roll_back(self, position: int) -> None:
        self.position = min(self.position, position)

    def reorder(self, rows: torch.Tensor) -> None:
        for layer, (keys, values) in self._slabs.items():
            self._slabs[layer] = (keys.index_select(0, rows), values.index_select(0, rows))

    def advance(self, position: int) -> None:
        self.position = position

    @property
    def layer_bytes(self) -> dict[int, int]:
        """Bytes per token and row of each layer used so far."""
        return {
            layer: sum(slab.shape[1] * slab.shape[3] * slab.element_size() for slab in slabs)
            for layer, slabs in self._slabs.items()
        }


class _StepLayer(CacheLayerMixin):  # type: ignore[misc]
    def __init__(self, index: int, step: StepCache) -> None:
        super().__init__()
        self._index = index
        self._step = step
        self.is_sliding = False
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        return None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._step.write(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._step.past + query_length, 0

    def get_seq_length(self) -> int:
        return self._step.past

    def get_max_length(self) -> int:
        return -1


class StepCache(Cache):  # type: ignore[misc]
    """The caches of the sessions in one forward, as one transformers `Cache`. `past` is the longest row's length."""

    def __init__(self, caches: Sequence[SlabCache], layers: int) -> None:
        self._caches = caches
        self.past = max(cache.position for cache in caches)
        super().__init__(layers=[_StepLayer(index, self) for index in range(layers)])

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self._caches) == 1:
            cache = self._caches[0]
            end = cache.position + keys.shape[2]
            slabs = cache.slabs(layer, keys, values)
            for slab, new in zip(slabs, (keys, values), strict=True):
                slab[:, :, cache.position : end] = new
            return slabs[0][:, :, :end], slabs[1][:, :, :end]
        rows, length = keys.shape[0], self.past + 1
        padded = (
            keys.new_zeros(rows, keys.shape[1], length, keys.shape[3]),
            values.new_zeros(rows, values.shape[1], length, values.shape[3]),
        )
        row = 0
        for cache in self._caches:
            held, own = cache.position, slice(row, row + cache.batch)
            slabs = cache.slabs(layer, keys, values)
            for slab, new, out in zip(slabs, (keys, values), padded, strict=True):
                slab[:, :, held : held + 1] = new[own]
                out[own, :, length - held - 1 :] = slab[:, :, : held + 1]
            row += cache.batch
        return padded


class DynamicState:
    """transformers' own cache of one session, for families that keep more than keys and values."""

    def __init__(self, config: Any, batch: int, max_length: int) -> None:
        self._config = config
        self.batch = batch
        self.max_length = max_length
        self.position = 0
        self.cache = self._fresh()

    def _fresh(self) -> DynamicCache:
        cache = DynamicCache(config=copy.deepcopy(self._config))
        cache.activate_past_recording()
        return cache

    def roll_back(self, position: int) -> None:
        """Raises `BadStep` where the family cannot forget; going back to 0 always works."""
        if position >= self.position:
            return
        if position == 0:
            self.cache = self._fresh()
        else:
            try:
                self.cache.crop(position - self.position)
            except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
                raise BadStep(f"this model cannot roll back to token {position} ({error}); replay it from 0") from None
        self.position = position

    def reorder(self, rows: torch.Tensor) -> None:
        self.cache.reorder_cache(rows)

    def advance(self, position: int) -> None:
        self.position = position
        self.cache.crop(0)

    @property
    def nbytes(self) -> int:
        """Bytes of all state tensors now."""
        seen: dict[int, int] = {}
        for layer in self.cache.layers:
            for value in vars(layer).values():
                for tensor in value.values() if isinstance(value, dict) else (value,):
                    if isinstance(tensor, torch.Tensor):
                        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return sum(seen.values())


def keeps_plain_keys(config: Any) -> bool:
    """Whether every layer of the family caches just keys and values."""
    layers = DynamicCache(config=copy.deepcopy(config)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
