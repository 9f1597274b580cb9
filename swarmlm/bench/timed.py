"""A session like those of `Node.session` whose tokens and steps are timed one by one. For this package only.

async with open_timed_session(node, model, client, max_length=600) as session:
    answer = await session.generate(ids, tokens=16)
    answer.gaps, answer.steps
"""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trio

from swarmlm.bench.reference import gaps
from swarmlm.bridge import Bridge
from swarmlm.models.client import load_client_model
from swarmlm.models.generation import TextSession
from swarmlm.models.remote import BlockingSession
from swarmlm.node import Node
from swarmlm.routing.session import open_session
from swarmlm.view import SwarmView


@dataclass(frozen=True)
class TimedAnswer:
    """Seconds: `first` from asking to the first token, `gaps` between tokens, `steps` of those in the remote blocks."""

    ids: list[int]
    first: float
    gaps: list[float]
    steps: list[float]

    @property
    def client(self) -> list[float]:
        """Seconds of each gap that were the client's own: embedding, head, choosing."""
        return [gap - step for gap, step in zip(self.gaps, self.steps, strict=True)]


class _Timing:
    """A `BlockingSession` that notes how long each step took."""

    def __init__(self, session: BlockingSession) -> None:
        self._session = session
        self.seconds: list[float] = []

    @property
    def position(self) -> int:
        return self._session.position

    def step(
        self, hidden: torch.Tensor, *, position: int, padding: tuple[int, ...] = (), hypo_ids: tuple[int, ...] = ()
    ) -> torch.Tensor:
        started = time.perf_counter()
        output = self._session.step(hidden, position=position, padding=padding, hypo_ids=hypo_ids)
        self.seconds.append(time.perf_counter() - started)
        return output

    def close(self) -> None:
        self._session.close()


class TimedSession:
    """Made by `open_timed_session`."""

    def __init__(self, text: TextSession, timing: _Timing) -> None:
        self._text = text
        self._timing = timing

    async def generate(self, ids: Sequence[int], *, tokens: int) -> TimedAnswer:
        """Greedily, from an empty cache: what was generated before is forgotten."""
        self._text.reset()
        self._timing.seconds.clear()
        times = [time.perf_counter()]
        generate = functools.partial(
            self._text.generate, list(ids), max_new_tokens=tokens, on_token=lambda _: times.append(time.perf_counter())
        )
        answer = await trio.to_thread.run_sync(generate)
        return TimedAnswer(answer, times[1] - times[0], gaps(times[1:]), self._timing.seconds[1:])


async def endless_client(node: Node, model: str) -> Any:
    """The client's half of `model` for `open_timed_session`, and no end-of-text token: answers are of full length."""
    source = await node.source(model)
    load = functools.partial(load_client_model, source, open_session=_none)
    client = await trio.to_thread.run_sync(load)
    client.generation_config.eos_token_id = None
    return client


@asynccontextmanager
async def open_timed_session(node: Node, model: str, client: Any, *, max_length: int) -> AsyncIterator[TimedSession]:
    """`max_length` tokens of KV are reserved on each host. Raises what `routing.session.open_session` raises."""
    source = await node.source(model)
    async with open_session(
        SwarmView(node, source.name),
        model=source.name,
        fingerprint=source.fingerprint,
        blocks=source.num_blocks,
        max_length=max_length,
    ) as session:
        timing = _Timing(Bridge(session, trio.lowlevel.current_trio_token(), lambda: None))
        text = TextSession(client, None, timing, context_length=source.context_length, max_length=max_length)
        yield TimedSession(text, timing)


def _none(batch: int, max_length: int) -> Any:
    raise AssertionError("sessions are opened by open_timed_session")
