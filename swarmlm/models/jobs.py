"""What a span is given to compute: a step of a session, and the session's cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swarmlm.models.cache import DynamicState, SlabCache


@dataclass
class SpanCache:
    """One session's state for blocks [start, end), numbered in the whole model."""

    start: int
    end: int
    state: SlabCache | DynamicState
    nbytes: int

    @property
    def position(self) -> int:
        """Tokens held."""
        return self.state.position

    @property
    def batch(self) -> int:
        return self.state.batch

    @property
    def max_length(self) -> int:
        return self.state.max_length


@dataclass
class SpanJob:
    """One step of one session. `hidden` is [batch, n, hidden size]; `padding` the left-pad tokens of each row."""

    cache: SpanCache
    hidden: torch.Tensor
    position: int
    padding: tuple[int, ...] = ()
    hypo_ids: tuple[int, ...] = ()

    def singly(self) -> list[SpanJob]:
        """The same step, a token at a time, once its rows are in order."""
        tokens = range(self.hidden.shape[1])
        return [
            SpanJob(self.cache, self.hidden[:, token : token + 1], self.position + token, self.padding)
            for token in tokens
        ]
