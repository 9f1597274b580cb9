"""Steps that go from batcher to batcher: what is pushed, early, late, twice or never, gives the same hidden states."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest
import torch
import trio
import trio.testing

from swarmlm.actors.batcher import Batcher, Release, Reserve
from swarmlm.actors.core import Ref, open_supervisor
from swarmlm.errors import BadStep, StaleEpoch, UnknownSession
from swarmlm.kernels.kv_pool import KVPool
from swarmlm.kernels.wire import from_wire, to_wire
from swarmlm.models.source import open_source
from swarmlm.models.span import Span, SpanJob
from swarmlm.protocol import BatcherRole, Hop, PeerId, Push, Step, StepDone
from tests.tiny import HIDDEN, tiny_llama

LENGTH = 32
FIRST, SECOND = b"1" * 16, b"2" * 16


@pytest.fixture(scope="module")
def spans(tmp_path_factory: pytest.TempPathFactory) -> tuple[Span, Span]:
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    tiny_llama(folder)
    source = open_source(str(folder))
    return Span.load(source, 0, 2), Span.load(source, 2, 4)


class Pair:
    """Two hosts' batchers. What the first pushes goes through `carry`, which a test may replace."""

    def __init__(self, spans: tuple[Span, Span]) -> None:
        self.spans = spans
        self.batchers: list[Ref[BatcherRole]] = []
        self.carry: Callable[[Push], Awaitable[bool]] = self.at_once
        self.pushes: list[Push] = []

    async def at_once(self, push: Push) -> bool:
        await self.batchers[1].cast(push)
        return True

    async def push(self, peer: PeerId, push: Push) -> bool:
        assert peer == "second"
        self.pushes.append(push)
        return await self.carry(push)

    async def start(self, supervisor: Any) -> None:
        for span, session in zip(self.spans, (FIRST, SECOND), strict=True):
            pool = KVPool(span.cache_bytes(1, LENGTH))

            def make(span: Span = span, pool: KVPool = pool) -> Batcher:
                return Batcher(span, pool, push=self.push)

            batcher = await supervisor.start(make, name=f"batcher {span.start}")
            await batcher.call(Reserve(session, 0, span.start, span.end, 1, LENGTH), deadline=5)
            self.batchers.append(batcher)

    def step(self, which: int, hidden: torch.Tensor | None, position: int, ticket: int, after: int = 0) -> Step:
        onward = (Hop("second", SECOND, 0),) if which == 0 else ()
        wire = to_wire(hidden) if hidden is not None else None
        session = (FIRST, SECOND)[which]
        return Step(session, 0, position, wire, ticket=ticket, after=after, next_hops=onward)

    async def run(self, hidden: torch.Tensor, position: int, ticket: int) -> torch.Tensor:
        """Through both, as a client sends it."""
        done: list[StepDone] = []

        async def second() -> None:
            done.append(await self.batchers[1].call(self.step(1, None, position, ticket), deadline=5))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(second)
            first = await self.batchers[0].call(self.step(0, hidden, position, ticket), deadline=5)
            if not first.pushed:
                await self.batchers[1].cast(Push(SECOND, 0, ticket, first.hidden))
        return from_wire(done[0].hidden)


@pytest.fixture
async def pair(spans: tuple[Span, Span]) -> AsyncIterator[Pair]:
    pair = Pair(spans)
    async with open_supervisor() as supervisor:
        await pair.start(supervisor)
        yield pair


class Whole:
    """Both spans, one after another, here."""

    def __init__(self, spans: tuple[Span, Span]) -> None:
        self._spans = spans
        self._caches = [span.open(1, LENGTH) for span in spans]

    def run(self, hidden: torch.Tensor, position: int) -> torch.Tensor:
        for span, cache in zip(self._spans, self._caches, strict=True):
            [hidden] = span.run([SpanJob(cache, hidden, position)])
        return hidden


def tokens(count: int) -> torch.Tensor:
    return torch.randn(1, count, HIDDEN, generator=torch.Generator().manual_seed(secrets.randbelow(2**30)))


async def test_a_step_goes_from_host_to_host(pair: Pair, spans: tuple[Span, Span]) -> None:
    whole = Whole(spans)
    position = 0
    for ticket, count in enumerate((7, 1, 1, 3), start=1):
        hidden = tokens(count)
        assert torch.allclose(await pair.run(hidden, position, ticket), whole.run(hidden, position), atol=1e-5)
        position += count
    assert [push.ticket for push in pair.pushes] == [1, 2, 3, 4]


async def test_a_host_that_cannot_push_says_so(pair: Pair, spans: tuple[Span, Span]) -> None:
    async def never(push: Push) -> bool:
        return False

    pair.carry = never
    hidden = tokens(4)
    assert torch.allclose(await pair.run(hidden, 0, 1), Whole(spans).run(hidden, 0), atol=1e-5)


async def test_what_comes_twice_or_late_is_ignored(pair: Pair, spans: tuple[Span, Span]) -> None:
    whole = Whole(spans)
    first, second = tokens(4), tokens(1)
    assert torch.allclose(await pair.run(first, 0, 1), whole.run(first, 0), atol=1e-5)
    for push in [*pair.pushes, msgspec.structs.replace(pair.pushes[0], epoch=9)]:
        await pair.batchers[1].call(push, deadline=5)
    assert torch.allclose(await pair.run(second, 4, 2), whole.run(second, 4), atol=1e-5)
    again = tokens(2)  # a rollback: the old push for this position must not be taken for it
    assert torch.allclose(await pair.run(again, 0, 3), whole.run(again, 0), atol=1e-5)


async def test_a_push_may_come_before_its_step(pair: Pair, spans: tuple[Span, Span]) -> None:
    hidden = tokens(4)
    first = await pair.batchers[0].call(pair.step(0, hidden, 0, 1), deadline=5)
    assert first.pushed
    done = await pair.batchers[1].call(pair.step(1, None, 0, 1), deadline=5)
    assert torch.allclose(from_wire(done.hidden), Whole(spans).run(hidden, 0), atol=1e-5)


async def test_chunks_that_overtake_each_other_run_in_order(pair: Pair, spans: tuple[Span, Span]) -> None:
    hidden = tokens(6)
    outputs: dict[int, torch.Tensor] = {}

    async def part(ticket: int, start: int, end: int) -> None:
        step = pair.step(0, hidden[:, start:end], start, ticket, after=ticket - 1)
        outputs[ticket] = from_wire((await pair.batchers[0].call(step, deadline=5)).hidden)

    async with trio.open_nursery() as nursery:
        for ticket, start, end in ((3, 5, 6), (2, 3, 5), (1, 0, 3)):
            nursery.start_soon(part, ticket, start, end)
    [expected] = spans[0].run([SpanJob(spans[0].open(1, LENGTH), hidden, 0)])
    assert torch.allclose(torch.cat([outputs[ticket] for ticket in (1, 2, 3)], dim=1), expected, atol=1e-5)


async def test_a_step_that_waits_for_a_push_ends_with_its_session(pair: Pair) -> None:
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(UnknownSession, match="closed"):
                await pair.batchers[1].call(pair.step(1, None, 0, 1), deadline=5)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await pair.batchers[1].call(Release(SECOND), deadline=5)


@pytest.mark.parametrize(
    "nonsense",
    [torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 2, HIDDEN + 1), torch.full((1, 2, HIDDEN), torch.nan)],
)
async def test_what_cannot_be_a_hidden_state_is_refused_and_the_session_lives(
    pair: Pair, spans: tuple[Span, Span], nonsense: torch.Tensor
) -> None:
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(BadStep):
                await pair.batchers[1].call(pair.step(1, None, 0, 1), deadline=5)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await pair.batchers[1].cast(Push(SECOND, 0, 1, to_wire(nonsense)))
    hidden = tokens(2)
    assert torch.allclose(await pair.run(hidden, 0, 2), Whole(spans).run(hidden, 0), atol=1e-5)


async def test_a_push_of_another_epoch_is_no_use(pair: Pair, spans: tuple[Span, Span]) -> None:
    hidden = tokens(2)
    await pair.batchers[0].call(pair.step(0, hidden, 0, 1), deadline=5)
    span = spans[1]
    await pair.batchers[1].call(Reserve(SECOND, 1, span.start, span.end, 1, LENGTH), deadline=5)
    with pytest.raises(StaleEpoch):
        await pair.batchers[1].call(pair.step(1, None, 0, 1), deadline=5)
    fresh = msgspec.structs.replace(pair.step(1, None, 0, 1), epoch=1)
    with trio.move_on_after(0.05) as scope:
        await pair.batchers[1].call(fresh, deadline=5)
    assert scope.cancelled_caught
