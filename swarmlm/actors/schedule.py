"""What a device computes next: steps of many sessions in, batches out. Plain data for the batcher; nothing waits here.

- Every decode step (one token a row) that waits goes into the next batch, at most `MAX_ROWS` rows.
- Long steps (prompts, replays) are cut into slices. While others decode, a batch carries one slice of `SLICE_ROWS`
  rows beside their tokens, so that a long prompt costs them a fraction of a step; alone, it gets `WHOLE_ROWS` at once.
- Long steps of several clients take turns, a slice each, and a client's own among themselves. When more rows decode
  than a batch takes, clients take turns, too: one with many sessions does not crowd out one with a single one.
- Steps of one session run in the order of their tickets, and at most one of them is in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from swarmlm.actors.core import Request
from swarmlm.models.span import SpanCache, SpanJob
from swarmlm.protocol import SessionId, Step, Tensor

MAX_ROWS = 64  # rows of decode steps in one batch: past this a step gets slower than people read
SLICE_ROWS = 16  # rows of a long step beside decode steps: about as much computing as a batch of ten of those
WHOLE_ROWS = 512  # rows of a long step alone: what is waited for by a decode step that comes just after it started
DECODING_SECONDS = 1.0  # somebody who decoded that recently is about to send the next step


@dataclass(eq=False)
class Held:
    """One session on this device. Times are trio's, in seconds."""

    cache: SpanCache
    epoch: int
    used: float  # the last step
    client: str = ""  # the peer whose session it is
    decoded: float = float("-inf")  # the last decode step
    done: int = 0  # ticket of the last step that was completed
    expected: dict[int, Pending] = field(default_factory=dict)  # by ticket: steps whose hidden states will be pushed
    parked: dict[int, Tensor] = field(default_factory=dict)  # by ticket: pushed before their step came


@dataclass(eq=False)
class Pending:
    """A step on its way through the device, perhaps in slices."""

    request: Request
    step: Step
    held: Held
    hidden: torch.Tensor | None
    arrived: float  # by time.perf_counter, as all that is measured
    taken: int = 0  # tokens computed
    compute_ms: float = 0.0
    outputs: list[torch.Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.hidden.shape[1] if self.hidden is not None and self.hidden.dim() == 3 else 0

    @property
    def rows(self) -> int:
        return self.hidden.shape[0] if self.hidden is not None else 0

    @property
    def is_decode(self) -> bool:
        return self.tokens == 1

    def whole(self) -> SpanJob:
        """The step as one job: what is checked before its first slice."""
        assert self.hidden is not None
        step = self.step
        return SpanJob(self.held.cache, self.hidden, step.position, step.padding, step.hypo_ids)

    def slice(self, tokens: int) -> SpanJob:
        """The next `tokens` tokens as a job. The first slice reaches past all padding: no row is empty."""
        assert self.hidden is not None
        if self.taken == 0 and self.step.padding:
            tokens = max(tokens, max(self.step.padding) + 1 - self.step.position)
        part = self.hidden[:, self.taken : self.taken + tokens]
        hypo_ids = self.step.hypo_ids if self.taken == 0 else ()
        return SpanJob(self.held.cache, part, self.step.position + self.taken, self.step.padding, hypo_ids)


class Schedule:
    """The steps that can be computed, oldest first. `sessions` is the batcher's own table of them."""

    def __init__(self, sessions: Mapping[SessionId, Held]) -> None:
        self._sessions = sessions
        self._waiting: list[Pending] = []
        self._turns: dict[str, int] = {}  # of each client with long steps: the number of its last turn

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Pending]:
        return iter(self._waiting)

    def add(self, pending: Pending) -> None:
        self._waiting.append(pending)

    def remove(self, pending: Pending) -> None:
        self._waiting.remove(pending)

    def of(self, held: Held) -> int:
        """How many steps of a session wait."""
        return sum(pending.held is held for pending in self._waiting)

    def decoding(self, now: float) -> int:
        """How many sessions have decoded lately."""
        return sum(now - held.decoded < DECODING_SECONDS for held in self._sessions.values())

    def holds(self, held: Held, ticket: int) -> bool:
        """Whether that step of the session is waiting here."""
        return any(pending.held is held and pending.step.ticket == ticket for pending in self._waiting)

    def choose(self, now: float) -> list[tuple[Pending, int]]:
        """(step, tokens of it to compute now) for one batch; empty if nothing can run. Chosen steps stay waiting."""
        ready = self._ready()
        chosen: list[tuple[Pending, int]] = []
        rows = 0
        for pending in _by_turns([pending for pending in ready if pending.is_decode]):
            if not chosen or rows + pending.rows <= MAX_ROWS:
                chosen.append((pending, 1))
                rows += pending.rows
        waiting = [pending for pending in ready if not pending.is_decode]
        long = min(waiting, key=lambda pending: self._turns.get(pending.held.client, 0), default=None)
        if long is not None:
            budget = SLICE_ROWS if chosen or self._others_decode(long, now) else WHOLE_ROWS
            chosen.append((long, max(1, budget // max(1, long.rows))))
        return chosen

    def thin(self, now: float) -> bool:
        """Whether a little patience would bring company: decode steps wait, alone, but fewer than half of those due."""
        ready = self._ready()
        return bool(ready) and 2 * len(ready) < self.decoding(now) and all(pending.is_decode for pending in ready)

    def took_turn(self, pending: Pending) -> None:
        """A slice of it was computed: other long steps come first now."""
        self._waiting.remove(pending)
        self._waiting.append(pending)
        clients = {other.held.client for other in self._waiting}
        self._turns = {client: turn for client, turn in self._turns.items() if client in clients}
        self._turns[pending.held.client] = 1 + max(self._turns.values(), default=0)

    def _others_decode(self, long: Pending, now: float) -> bool:
        return any(held is not long.held and now - held.decoded < DECODING_SECONDS for held in self._sessions.values())

    def _ready(self) -> list[Pending]:
        """At most one step a session: its first in ticket order, if what it comes after is done."""
        first: dict[int, Pending] = {}
        for pending in self._waiting:
            known = first.get(id(pending.held))
            if known is None or pending.step.ticket < known.step.ticket:
                first[id(pending.held)] = pending
        return [
            pending
            for pending in self._waiting
            if first[id(pending.held)] is pending and pending.held.done >= pending.step.after
        ]


def _by_turns(pending: list[Pending]) -> list[Pending]:
    """The first of each client, then the second of each, and so on; a client's own in the order they came."""
    rank: dict[str, int] = {}
    ranked = []
    for one in pending:
        rank[one.held.client] = rank.get(one.held.client, -1) + 1
        ranked.append((rank[one.held.client], one))
    return [one for _, one in sorted(ranked, key=lambda pair: pair[0])]
