"""A `BlockingSession` in this process: real spans, no network."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarmlm.models.span import Span, SpanJob


class LocalSession:
    """All blocks of a model, by one span after the other. `steps` records (position, tokens) of each step."""

    def __init__(self, spans: Sequence[Span], batch: int, max_length: int) -> None:
        self._spans = spans
        self._caches = [span.open(batch, max_length) for span in spans]
        self.steps: list[tuple[int, int]] = []
        self.closed = False

    @property
    def position(self) -> int:
        return self._caches[0].position

    def step(
        self, hidden: torch.Tensor, *, position: int, padding: tuple[int, ...] = (), hypo_ids: tuple[int, ...] = ()
    ) -> torch.Tensor:
        assert not self.closed
        self.steps.append((position, hidden.shape[1]))
        for span, cache in zip(self._spans, self._caches, strict=True):
            job = SpanJob(cache, hidden, position, padding, hypo_ids)
            span.check(job)
            hidden = span.run([job])[0]
        return hidden

    def close(self) -> None:
        self.closed = True
