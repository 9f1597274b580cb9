"""Calls over a link: both ways, with deadlines, cancellation and overload, on virtual time."""

from __future__ import annotations

import logging
from random import Random
from typing import Any

import pytest
import trio
import trio.testing

from swarmlm.actors.core import Actor, Blob, Connection, Message, Ok, Ref, handles, memory_links, open_supervisor, serve
from swarmlm.actors.core.link import MemoryLink
from swarmlm.actors.core.message import Call, Cancel, Envelope, Failed, Ping, Pong, Reply
from swarmlm.actors.core.outbox import OUTBOX
from swarmlm.actors.core.remote import SEND_PATIENCE
from swarmlm.errors import (
    Busy,
    Closed,
    ConnectionLost,
    DeadlineExceeded,
    PoolFull,
    ProtocolError,
    RemoteFailure,
)
from swarmlm.protocol import BatcherRole, CloseSession, Step, StepDone, Tensor, decode, encode
from tests.swarm.links import Outcomes, call_until, connected, outcome_of, raw, routes, slow_links
from tests.unit.core_roles import Add, Break, Counter, Refuse, Sleep, Total, Unknown


async def test_both_sides_call_and_answer():
    async with open_supervisor() as supervisor:
        a_counter, b_counter = await supervisor.start(Counter), await supervisor.start(Counter)
        async with connected(routes(a_counter), routes(b_counter)) as (a, b):
            assert (a.peer, b.peer) == ("bob", "alice")
            assert await a.ref().call(Add(5), deadline=1.0) == Total(5)
            assert await b.ref().call(Add(7), deadline=1.0) == Total(7)
            await a.ref().cast(Add(10))
            assert await a.ref().call(Add(1), deadline=1.0) == Total(16)


async def test_serve_answers_until_the_caller_closes():
    link_a, link_b = memory_links("alice", "bob")
    async with open_supervisor() as supervisor, trio.open_nursery() as nursery:
        nursery.start_soon(serve, link_b, routes(await supervisor.start(Counter)))
        connection = Connection(link_a)
        await nursery.start(connection.run)
        assert await connection.ref().call(Add(3), deadline=1.0) == Total(3)
        await connection.aclose()
        assert connection.closed
        assert connection.lost is None


async def test_errors_cross_the_link_with_their_class_and_details(caplog):
    caplog.set_level(logging.CRITICAL)
    async with open_supervisor() as supervisor, connected(None, routes(await supervisor.start(Counter))) as (a, _):
        refused = await outcome_of(a.ref(), Refuse())
        assert isinstance(refused, PoolFull)
        assert (str(refused), refused.needed, refused.free) == ("no room", 7, 3)
        crashed = await outcome_of(a.ref(), Break())
        assert isinstance(crashed, RemoteFailure)
        assert "a bug" not in str(crashed)
        unknown = await outcome_of(a.ref(), Unknown())
        assert isinstance(unknown, ProtocolError)
        assert str(unknown) == "nobody here handles Unknown"
        assert await outcome_of(a.ref(), Add(1)) == Total(1)


async def test_a_crossing_of_slow_calls_answers_each_with_its_own(autojump_clock):
    async with open_supervisor() as supervisor:
        table = {Sleep: await supervisor.start(Counter), Add: await supervisor.start(Counter)}
        async with connected(None, table) as (a, _), trio.open_nursery() as nursery:
            outcomes = Outcomes(nursery)
            outcomes.call(a.ref(), Sleep(10.0))
            outcomes.call(a.ref(), Add(4))
            await trio.sleep(20)
        assert outcomes.found == [(0.0, Total(4)), (10.0, Ok())]


async def test_routes_may_grow():
    table: dict[type[Message[Any, Any]], Ref[Any]] = {}
    async with open_supervisor() as supervisor, connected(None, table) as (a, _):
        assert isinstance(await outcome_of(a.ref(), Add(1)), ProtocolError)
        table[Add] = await supervisor.start(Counter)
        assert await outcome_of(a.ref(), Add(1)) == Total(1)


async def test_a_handler_that_answers_nothing_is_a_remote_failure(caplog):
    class Mute(Counter):
        async def add(self, message: Add) -> Total:
            return None  # type: ignore[return-value]

    async with open_supervisor() as supervisor, connected(None, routes(await supervisor.start(Mute))) as (a, _):
        assert isinstance(await outcome_of(a.ref(), Add(1)), RemoteFailure)
        assert not a.closed
    assert "Add was answered with NoneType" in caplog.text


class CodecLink(MemoryLink):
    """A link whose envelopes become bytes and are validated, as on a real stream."""

    async def send(self, envelope: Envelope) -> None:
        header, segments = encode(envelope)
        await super().send(decode(bytes(header), [memoryview(bytes(segment)) for segment in segments]))


class Stepper(Actor[BatcherRole]):
    @handles(Step)
    async def step(self, step: Step) -> StepDone:
        if step.position:
            raise PoolFull("no room", needed=7, free=3)
        return StepDone(hidden=step.hidden, position=2)


async def test_real_messages_survive_the_codec():
    links = [CodecLink(link.peer, link._out, link._into) for link in memory_links("alice", "bob")]
    hidden = Tensor(dtype="float32", shape=(1, 2, 2), data=Blob(bytes(range(16))))
    async with open_supervisor() as supervisor, trio.open_nursery() as nursery:
        nursery.start_soon(serve, links[1], {Step: await supervisor.start(Stepper)})
        connection = Connection(links[0])
        await nursery.start(connection.run)
        done = await connection.ref().call(Step(session=bytes(16), epoch=1, position=0, hidden=hidden), deadline=1.0)
        assert done == StepDone(hidden=hidden, position=2)
        step = Step(session=bytes(16), epoch=1, position=3, hidden=hidden)
        refused, unknown = [await outcome_of(connection.ref(), m) for m in (step, CloseSession(session=bytes(16)))]
        assert isinstance(refused, PoolFull)
        assert refused.details == {"needed": 7, "free": 3}
        assert isinstance(unknown, ProtocolError)
        assert not connection.closed
        await connection.aclose()


# ---- deadlines and cancellation


async def test_a_deadline_ends_the_remote_handler_too(autojump_clock):
    events: list[str] = []
    async with open_supervisor() as supervisor:
        counter = await supervisor.start(lambda: Counter(events))
        async with connected(None, routes(counter)) as (a, _):
            with pytest.raises(DeadlineExceeded):
                await a.ref().call(Sleep(50.0), deadline=2.0)
            assert trio.current_time() == 2.0
            assert await a.ref().call(Add(1), deadline=1.0) == Total(1)
    assert "cancelled at 2" in events


async def test_a_cancelled_caller_ends_the_remote_handler_and_drops_the_remotely_queued(autojump_clock):
    events: list[str] = []
    async with open_supervisor() as supervisor:
        counter = await supervisor.start(lambda: Counter(events))
        async with connected(None, routes(counter)) as (a, _):
            async with trio.open_nursery() as nursery:
                for seconds, patience in ((50.0, 3.0), (51.0, 2.0)):
                    nursery.start_soon(call_until, a.ref(), Sleep(seconds), patience)
                    await trio.testing.wait_all_tasks_blocked()
            assert await a.ref().call(Add(1), deadline=1.0) == Total(1)
            assert trio.current_time() == 3.0
    assert events == ["started", "sleep 50", "cancelled at 3", "stopped"]


async def test_the_wire_carries_the_seconds_left_when_it_is_written(autojump_clock):
    async with raw() as (connection, peer), trio.open_nursery() as nursery:
        nursery.start_soon(outcome_of, connection.ref(), Add(1), 7.5)
        nursery.start_soon(outcome_of, connection.ref(), Add(2), float("inf"))
        first, second = await peer.receive(), await peer.receive()
        assert isinstance(first, Call)
        assert isinstance(second, Call)
        assert {first.seconds_left, second.seconds_left} == {7.5, 86400.0}
        nursery.cancel_scope.cancel()


async def test_a_cancelled_call_sends_cancel_and_ignores_the_late_reply(autojump_clock):
    async with raw() as (connection, peer):
        with trio.move_on_after(0.5):
            await connection.ref().call(Add(1), deadline=9.0)
        call, cancel = await peer.receive(), await peer.receive()
        assert isinstance(call, Call)
        assert cancel == Cancel(id=call.id)
        await peer.send(Reply(id=call.id, body=Total(1)))
        await peer.send(Failed(id=call.id, code="busy", text=""))
        await peer.send(Cancel(id=12345))
        await peer.send(Ping(number=1))
        assert await peer.receive() == Pong(number=1)
        assert not connection.closed


async def test_a_call_cancelled_before_it_was_written_never_reaches_the_wire(autojump_clock):
    slow, peer = slow_links()
    slow.seconds = 2.0
    connection = Connection(slow, heartbeat=100.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(connection.run)
        nursery.start_soon(outcome_of, connection.ref(), Add(1))
        await trio.sleep(1)
        with trio.move_on_after(0.5):
            await connection.ref().call(Add(2), deadline=9.0)
        nursery.start_soon(outcome_of, connection.ref(), Add(3), 8.0)
        bodies = [envelope.body for envelope in (await peer.receive(), await peer.receive())]
        assert bodies == [Add(1), Add(3)]
        await connection.aclose()


async def test_a_slow_link_holds_senders_back_within_their_deadline(autojump_clock):
    slow, _ = slow_links()
    connection = Connection(slow)
    async with trio.open_nursery() as nursery:
        await nursery.start(connection.run)
        slow.seconds = 3.0
        for _ in range(OUTBOX + 1):
            await connection.ref().cast(Add(1))
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Busy, match="16 messages are waiting"):
            await connection.ref().call(Add(1), deadline=1.0, wait=False)
        with pytest.raises(DeadlineExceeded):
            await connection.ref().call(Add(1), deadline=1.0)
        await connection.ref().cast(Add(1))
        assert trio.current_time() == 3.0
        nursery.start_soon(expect_closed, connection)
        await trio.sleep(1)
        await connection.aclose()
        assert trio.current_time() == 4.0


async def expect_closed(connection: Connection) -> None:
    with pytest.raises(Closed, match="the link to bob is closed"):
        await connection.ref().cast(Add(1))


@pytest.mark.parametrize("seed", range(20))
async def test_a_storm_of_cancelled_calls_leaves_nothing_behind(seed, autojump_clock):
    random = Random(seed)
    handled: list[int] = []

    class Slow(Counter):
        async def add(self, message: Add) -> Total:
            await trio.sleep(random.choice([0.0, 0.01, 0.3]))
            handled.append(message.amount)
            return Total(message.amount)

    async with open_supervisor() as supervisor:
        slow = await supervisor.start(Slow)
        async with connected(routes(slow), routes(slow), max_calls=20) as (a, b):
            answered: list[int] = []

            async def call(number: int) -> None:
                await trio.sleep(random.uniform(0, 5))
                with trio.move_on_after(random.choice([0.005, 0.1, 100])):
                    outcome = await outcome_of(random.choice([a, b]).ref(), Add(number), random.choice([0.02, 50]))
                    assert isinstance(outcome, Busy | DeadlineExceeded) or outcome == Total(number)
                    answered.extend([number] if isinstance(outcome, Total) else [])

            async with trio.open_nursery() as nursery:
                for number in range(200):
                    nursery.start_soon(call, number)
            await trio.sleep(1)
            for connection in (a, b):
                assert not connection._calls
                assert not connection._answering._running
                assert not len(connection._outbox)
            assert len(set(answered)) == len(answered) > 10
            assert set(answered) <= set(handled)
            assert await a.ref().call(Add(999), deadline=1.0) == Total(999)


# ---- overload


async def test_a_full_mailbox_and_too_many_calls_are_busy(autojump_clock):
    async with open_supervisor() as supervisor:
        counter = await supervisor.start(Counter)
        async with connected(None, routes(counter)) as (a, _), trio.open_nursery() as nursery:
            outcomes = Outcomes(nursery)
            for _ in range(1 + Counter.mailbox_size + 2):
                outcomes.call(a.ref(), Sleep(1.0))
                await trio.testing.wait_all_tasks_blocked()
            assert [(t, type(error)) for t, error in outcomes.found] == [(0.0, Busy)] * 2
        other = await supervisor.start(Counter)
        async with connected(None, routes(other), max_calls=2) as (a, _), trio.open_nursery() as nursery:
            outcomes = Outcomes(nursery)
            for _ in range(3):
                outcomes.call(a.ref(), Sleep(1.0))
            await trio.sleep(0.5)
            ((_, busy),) = outcomes.found
            assert isinstance(busy, Busy)
            assert str(busy) == "2 calls of this link are running"


async def test_a_cast_to_a_full_mailbox_is_dropped_and_does_not_block_the_link(autojump_clock, caplog):
    async with open_supervisor() as supervisor:
        counter, quick = await supervisor.start(Counter), await supervisor.start(Counter)
        async with connected(None, {Sleep: counter, Add: quick}) as (a, _):
            for _ in range(1 + Counter.mailbox_size + 1):
                await a.ref().cast(Sleep(1.0))
                await trio.testing.wait_all_tasks_blocked()
            await a.ref().cast(Unknown())
            assert await a.ref().call(Add(1), deadline=0.5) == Total(1)
    assert "Sleep of alice was dropped" in caplog.text
    assert "alice sent Unknown, which nobody here handles" in caplog.text


async def test_a_peer_that_sends_without_reading_is_cut_off(autojump_clock):
    async with raw() as (connection, peer):

        async def flood() -> None:
            for number in range(10_000):
                await peer.send(Ping(number=number))

        with pytest.raises(ConnectionLost):
            await flood()
        await connection.wait_closed()
        assert str(connection.lost) == "bob sends without reading"


async def test_a_peer_that_takes_in_nothing_is_lost(autojump_clock):
    slow, _ = slow_links()
    slow.seconds = 1e6
    connection = Connection(slow)
    async with trio.open_nursery() as nursery:
        await nursery.start(connection.run)
        await connection.ref().cast(Add(1))
        await connection.wait_closed()
    assert trio.current_time() == SEND_PATIENCE
    assert str(connection.lost) == "bob took in nothing for 60 s"
