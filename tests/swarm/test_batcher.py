"""The batcher and the block host, on a tiny real model: admission, batching, fencing, expiry."""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
import trio
import trio.testing

from swarmlm.actors.batcher import MAX_EXPECTED, Batcher, GetLoad
from swarmlm.actors.core import Ref, open_supervisor
from swarmlm.actors.core.message import Blob
from swarmlm.actors.host import BlockHost, SetState
from swarmlm.errors import (
    BadStep,
    Busy,
    ContextTooLong,
    DeadlineExceeded,
    PoolFull,
    StaleEpoch,
    UnknownSession,
    WrongModel,
)
from swarmlm.kernels.kv_pool import KVPool
from swarmlm.kernels.wire import from_wire, to_wire
from swarmlm.models.source import open_source
from swarmlm.models.span import Span
from swarmlm.protocol import (
    ITEM_BYTES,
    BatcherRole,
    CloseSession,
    GetStatus,
    HostRole,
    OpenSession,
    PeerId,
    Push,
    SessionId,
    Step,
    Tensor,
)
from tests.tiny import HIDDEN, tiny_llama

LENGTH = 16


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> Span:
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    tiny_llama(folder)
    return Span.load(open_source(str(folder)), 0, 4)


class Bench:
    """A host and its batcher under one supervisor, with memory for three sessions of `LENGTH`."""

    def __init__(self, span: Span, batcher: Ref[BatcherRole], host: Ref[HostRole], pool: KVPool) -> None:
        self.span, self.batcher, self.host, self.pool = span, batcher, host, pool

    async def open(self, session: SessionId | None = None, **changes: Any) -> SessionId:
        session = session or secrets.token_bytes(16)
        ask = {
            "model": self.span.name,
            "fingerprint": self.span.fingerprint,
            "start": 0,
            "end": 4,
            "max_length": LENGTH,
        }
        await self.host.call(OpenSession(session=session, **(ask | changes)), deadline=5)
        return session

    async def step(self, session: SessionId, hidden: torch.Tensor, position: int, **changes: Any) -> torch.Tensor:
        step = Step(session=session, epoch=0, position=position, hidden=to_wire(hidden))
        done = await self.batcher.call(_with(step, changes), deadline=5)
        assert done.position == position + hidden.shape[1]
        return from_wire(done.hidden)


def _with(step: Step, changes: dict[str, Any]) -> Step:
    import msgspec

    return msgspec.structs.replace(step, **changes)


@pytest.fixture
async def bench(span: Span) -> AsyncIterator[Bench]:
    pool = KVPool(3 * span.cache_bytes(1, LENGTH))
    async with open_supervisor() as supervisor:
        batcher = await supervisor.start(lambda: Batcher(span, pool, idle_seconds=60.0), name="batcher")
        host = await supervisor.start(
            lambda: BlockHost(
                PeerId("me"),
                batcher,
                model=span.name,
                fingerprint=span.fingerprint,
                start=0,
                end=4,
                context_length=64,
                kv_token_bytes=span.kv_token_bytes,
            ),
            name="host",
        )
        yield Bench(span, batcher, host, pool)


def hidden(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


async def test_a_fourth_session_is_refused_with_numbers_until_one_ends(bench: Bench) -> None:
    sessions = [await bench.open() for _ in range(3)]
    with pytest.raises(PoolFull) as refused:
        await bench.open()
    assert refused.value.details == {"needed": bench.pool.total // 3, "free": 0, "total": bench.pool.total}
    await bench.host.call(CloseSession(sessions[0]), deadline=5)
    await bench.open()
    assert bench.pool.free == 0


async def test_sessions_that_step_together_get_what_they_get_alone(bench: Bench, span: Span) -> None:
    sessions = [await bench.open() for _ in range(3)]
    alone = [span.open(1, LENGTH) for _ in sessions]
    from swarmlm.models.span import SpanJob

    for number, session in enumerate(sessions):
        prompt = hidden(2 + 3 * number, number)
        await bench.step(session, prompt, 0)
        span.run([SpanJob(alone[number], prompt, 0)])
    rows: list[int] = []
    for turn in range(3):
        outputs: dict[int, torch.Tensor] = {}

        async def one(number: int, turn: int = turn, outputs: dict[int, torch.Tensor] = outputs) -> None:
            token = hidden(1, 10 * turn + number)
            step = Step(sessions[number], 0, 2 + 3 * number + turn, to_wire(token))
            done = await bench.batcher.call(step, deadline=5)
            rows.append(done.rows)
            outputs[number] = from_wire(done.hidden)

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(one, number)
        for number in range(3):
            token = hidden(1, 10 * turn + number)
            expected = span.run([SpanJob(alone[number], token, alone[number].position)])[0]
            assert torch.allclose(outputs[number], expected, atol=1e-4)
    assert max(rows) > 1


async def test_a_lower_position_rolls_back_and_a_higher_one_is_refused(bench: Bench) -> None:
    session = await bench.open()
    await bench.step(session, hidden(4), 0)
    first = await bench.step(session, hidden(1, 5), 4)
    await bench.step(session, hidden(1, 6), 5)
    assert torch.allclose(await bench.step(session, hidden(1, 5), 4), first, atol=1e-5)
    with pytest.raises(BadStep, match="starts at token 9"):
        await bench.step(session, hidden(1), 9)
    assert torch.allclose(await bench.step(session, hidden(1, 5), 4), first, atol=1e-5)


async def test_epochs_fence_frames_from_before_a_failover(bench: Bench) -> None:
    session = await bench.open()
    await bench.step(session, hidden(2), 0)
    await bench.open(session, epoch=3)
    with pytest.raises(StaleEpoch):
        await bench.step(session, hidden(1), 2)
    with pytest.raises(StaleEpoch):
        await bench.open(session, epoch=3)
    await bench.step(session, hidden(1), 0, epoch=3)
    assert bench.pool.used == bench.pool.total // 3


async def test_what_cannot_be_is_refused_and_the_host_lives_on(bench: Bench) -> None:
    session = await bench.open()
    with pytest.raises(UnknownSession):
        await bench.step(b"?" * 16, hidden(1), 0)
    with pytest.raises(BadStep, match="shape"):
        await bench.step(session, torch.zeros(1, 1, HIDDEN + 1), 0)
    with pytest.raises(BadStep, match="not finite"):
        await bench.step(session, torch.full((1, 1, HIDDEN), float("nan")), 0)
    with pytest.raises(BadStep, match="dtype"):
        await bench.step(session, torch.zeros(1, 1, HIDDEN, dtype=torch.int64), 0)
    with pytest.raises(BadStep, match="adapters"):
        await bench.step(session, hidden(1), 0, adapter="mine")
    with pytest.raises(ContextTooLong):
        await bench.step(session, hidden(LENGTH + 1), 0)
    for changes in ({"model": "other"}, {"fingerprint": "other"}, {"end": 5}):
        with pytest.raises(WrongModel):
            await bench.open(**changes)
    with pytest.raises(ContextTooLong):
        await bench.open(max_length=65)
    await bench.step(session, hidden(2), 0)


async def test_a_part_of_the_span_can_be_opened(bench: Bench, span: Span) -> None:
    whole, head, tail = (
        await bench.open(),
        await bench.open(end=2, max_length=8),
        await bench.open(start=2, max_length=8),
    )
    out = await bench.step(tail, await bench.step(head, hidden(3), 0), 0)
    assert torch.allclose(out, await bench.step(whole, hidden(3), 0), atol=1e-5)


async def test_an_idle_session_expires_and_its_memory_is_free(bench: Bench, mock_clock: trio.testing.MockClock) -> None:
    session = await bench.open()
    mock_clock.jump(61)
    for _ in range(50):
        await trio.testing.wait_all_tasks_blocked()
        if bench.pool.used == 0:
            break
    assert bench.pool.used == 0
    with pytest.raises(UnknownSession):
        await bench.step(session, hidden(1), 0)


async def test_a_draining_host_keeps_its_sessions_and_takes_no_new_ones(bench: Bench) -> None:
    session = await bench.open()
    await bench.host.call(SetState("draining"), deadline=5)
    with pytest.raises(Busy, match="leaving"):
        await bench.open()
    await bench.step(session, hidden(2), 0)
    status = await bench.host.call(GetStatus(), deadline=5)
    assert (status.state, status.sessions) == ("draining", 1)


async def test_a_step_that_nobody_waits_for_is_not_computed(bench: Bench) -> None:
    session = await bench.open()
    with trio.move_on_after(0):
        await bench.step(session, hidden(4), 0)
    load = await bench.batcher.call(GetLoad(), deadline=5)
    assert load.queue == 0
    await bench.step(session, hidden(2), 0)


async def test_a_step_that_cannot_run_spoils_nobody_elses(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a recurrent cache cannot roll back, which is known only when the batch is about to run."""
    sessions = [await bench.open() for _ in range(3)]
    for number, session in enumerate(sessions):
        await bench.step(session, hidden(3, number), 0)
    run, sizes = bench.span.run, list[int]()

    def picky(jobs: Any) -> Any:
        sizes.append(len(jobs))
        if any(bool((job.hidden == 7).all()) for job in jobs):
            raise BadStep("cannot roll back")
        return run(jobs)

    monkeypatch.setattr(bench.span, "run", picky)
    answered: list[int] = []

    async def step(number: int) -> None:
        given = torch.full((1, 1, HIDDEN), 7.0) if number == 1 else hidden(1, number)
        try:
            await bench.step(sessions[number], given, 3)
            answered.append(number)
        except BadStep:
            assert number == 1

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(step, number)
    assert sorted(answered) == [0, 2]
    assert max(sizes) > 1


@pytest.mark.parametrize(
    ("shape", "dtype", "codec"),
    [
        ((), "float32", "none"),
        ((5,), "float32", "none"),
        ((1, 0, HIDDEN), "float32", "none"),
        ((2**24, 2**24, 2**24, 0), "float32", "none"),
        ((0, 34), "uint8", "int8"),
        ((1, 0, 34), "uint8", "int8"),
        ((1, 1, 3), "uint8", "int8"),
    ],
)
async def test_tensors_of_no_use_hurt_nobody(bench: Bench, shape: tuple[int, ...], dtype: Any, codec: Any) -> None:
    mine, other = await bench.open(), await bench.open()
    await bench.step(other, hidden(3), 0)
    nonsense = Tensor(dtype, shape, Blob(bytes(math.prod(shape) * ITEM_BYTES[dtype])))
    with pytest.raises(BadStep):
        await bench.batcher.call(Step(mine, 0, 0, nonsense, codec=codec), deadline=5)
    await bench.batcher.call(Push(mine, 0, 1, nonsense), deadline=5)
    with pytest.raises(BadStep):
        await bench.batcher.call(Step(mine, 0, 0, None, codec=codec, ticket=1), deadline=5)
    await bench.step(other, hidden(1), 3)


async def test_a_cancelled_part_of_a_prompt_holds_nothing_up(bench: Bench) -> None:
    session = await bench.open()
    for after in (0, 7):  # waiting for its turn, and for one that will never come
        with trio.move_on_after(0.05):
            await bench.step(session, hidden(4), 0, ticket=8, after=after)
    await bench.step(session, hidden(2), 0, ticket=9)
    await bench.step(session, hidden(1), 2, ticket=10)


async def test_steps_that_never_come_to_run_end_with_their_session_and_are_bounded(bench: Bench) -> None:
    session, other = await bench.open(), await bench.open()
    ended: list[type[Exception]] = []

    async def wait(number: int) -> None:
        try:
            await bench.step(session, hidden(1), 0, ticket=number, after=2**50)
        except (UnknownSession, Busy) as error:
            ended.append(type(error))

    async with trio.open_nursery() as nursery:
        for number in range(1, MAX_EXPECTED + 11):
            nursery.start_soon(wait, number)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert ended == [Busy] * 10
        await bench.step(other, hidden(1), 0)
        await bench.host.call(CloseSession(session), deadline=5)
    assert ended.count(UnknownSession) == MAX_EXPECTED
    assert (await bench.batcher.call(GetLoad(), deadline=5)).queue == 0


async def test_parked_pushes_are_bounded_in_bytes(bench: Bench) -> None:
    session = await bench.open()
    whole = to_wire(torch.zeros(1, LENGTH, HIDDEN))
    for ticket in (1, 2):
        await bench.batcher.call(Push(session, 0, ticket, whole), deadline=5)
    done = await bench.batcher.call(Step(session, 0, 0, None, ticket=1), deadline=5)
    assert done.position == LENGTH
    with pytest.raises(DeadlineExceeded):  # the second one found no room
        await bench.batcher.call(Step(session, 0, 0, None, ticket=2), deadline=0.05)
