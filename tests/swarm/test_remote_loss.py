"""How a link ends: silence, loss, misbehaviour and closing, on virtual time."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

from swarmlm.actors.core import Connection, Ok, memory_links, open_supervisor
from swarmlm.actors.core.link import MemoryLink
from swarmlm.actors.core.message import Call, Cast, Envelope, Ping, Pong, Reply
from swarmlm.actors.core.remote import reply_type
from swarmlm.errors import (
    Closed,
    ConnectionLost,
    ProtocolError,
)
from swarmlm.protocol import Step, StepDone
from tests.swarm.links import Outcomes, connected, outcome_of, raw, routes, slow_links
from tests.unit.core_roles import Add, Counter, Sleep, Total

# ---- heartbeats


async def test_an_idle_link_is_left_in_peace(autojump_clock):
    async with raw() as (connection, peer):
        with trio.move_on_after(3600) as hour:
            await peer.receive()
        assert hour.cancelled_caught
        assert not connection.closed


async def test_a_silent_peer_is_lost_after_five_seconds(autojump_clock):
    async with raw() as (connection, peer), trio.open_nursery() as nursery:
        await trio.sleep(100)
        outcomes = Outcomes(nursery)
        outcomes.call(connection.ref(), Add(1))
        await trio.sleep(2.5)
        outcomes.call(connection.ref(), Add(2))
        await connection.wait_closed()
        heard = []
        while (envelope := await peer.receive()) is not None:
            heard.append(type(envelope))
    assert heard == [Call, Ping, Ping, Call, Ping, Ping]
    assert [at for at, _ in outcomes.found] == [105.0, 105.0]
    assert all(isinstance(error, ConnectionLost) for _, error in outcomes.found)
    assert str(connection.lost) == "bob has been silent for 5 s"


async def test_silence_counts_from_the_last_thing_heard(autojump_clock):
    async with raw(heartbeat=2.0, silence=6.0) as (connection, peer), trio.open_nursery() as nursery:
        outcomes = Outcomes(nursery)
        outcomes.call(connection.ref(), Add(1))
        await trio.sleep(5)
        await peer.send(Pong(number=0))
        await connection.wait_closed()
        assert trio.current_time() == 11.0


async def test_a_busy_host_that_still_answers_pings_is_alive(autojump_clock):
    async with open_supervisor() as supervisor, connected(None, routes(await supervisor.start(Counter))) as (a, _):
        assert await a.ref().call(Sleep(300.0), deadline=1000.0) == Ok()
        assert trio.current_time() == 300.0


async def test_a_stall_of_our_own_is_no_silence(autojump_clock):
    async with raw() as (connection, peer), trio.open_nursery() as nursery:
        outcomes = Outcomes(nursery)
        outcomes.call(connection.ref(), Add(1))
        await trio.sleep(2.5)
        autojump_clock.jump(20)
        await trio.sleep(0.1)
        await peer.send(Reply(id=0, body=Total(1)))
        await trio.testing.wait_all_tasks_blocked()
    assert [outcome for _, outcome in outcomes.found] == [Total(1)]


async def test_a_slow_upload_is_no_silence(autojump_clock):
    slow, _ = slow_links()
    connection = Connection(slow)
    async with trio.open_nursery() as nursery:
        await nursery.start(connection.run)
        outcomes = Outcomes(nursery)
        slow.seconds = 20.0
        outcomes.call(connection.ref(), Add(1))
        await trio.sleep(19)
        slow.seconds = 0.0
        await connection.wait_closed()
    assert outcomes.found[0][0] == 25.0


async def test_a_reply_that_trickles_in_is_no_silence(autojump_clock):
    class CountingLink(MemoryLink):
        bytes_received = 0

    link_a, peer = memory_links("alice", "bob")
    link = CountingLink(link_a.peer, link_a._out, link_a._into)
    connection = Connection(link)
    async with trio.open_nursery() as nursery:
        await nursery.start(connection.run)
        outcomes = Outcomes(nursery)
        outcomes.call(connection.ref(), Add(1))
        for _ in range(10):
            await trio.sleep(3)
            link.bytes_received += 1000
        await peer.send(Reply(id=0, body=Total(1)))
        await trio.testing.wait_all_tasks_blocked()
        await connection.aclose()
    assert outcomes.found == [(30.0, Total(1))]


# ---- the end of a link


async def test_a_peer_that_leaves_fails_the_calls_that_are_out(autojump_clock):
    async with raw() as (connection, peer), trio.open_nursery() as nursery:
        outcomes = Outcomes(nursery)
        for number in range(3):
            outcomes.call(connection.ref(), Add(number))
        await trio.sleep(0.5)
        await peer.aclose()
        await connection.wait_closed()
        assert isinstance(connection.lost, ConnectionLost)
        assert isinstance(await outcome_of(connection.ref(), Add(1)), ConnectionLost)
    assert [(at, str(error)) for at, error in outcomes.found] == [(0.5, "bob closed the connection")] * 3


async def test_the_handlers_of_a_lost_peer_are_cancelled(autojump_clock):
    events: list[str] = []
    async with open_supervisor() as supervisor:
        counter = await supervisor.start(lambda: Counter(events))
        async with raw(routes=routes(counter)) as (connection, peer):
            await peer.send(Call(id=1, seconds_left=100.0, body=Sleep(50.0)))
            await trio.sleep(2)
            await peer.aclose()
            await connection.wait_closed()
            assert await counter.call(Add(1), deadline=1.0) == Total(1)
    assert "cancelled at 2" in events


async def test_closing_fails_our_calls_with_closed(autojump_clock):
    async with connected() as (a, b), trio.open_nursery() as nursery:
        outcomes = Outcomes(nursery)
        outcomes.call(a.ref(), Add(1), 5.0)
        await a.aclose()
        await b.wait_closed()
        assert a.closed
        assert a.lost is None
        assert str(b.lost) == "alice closed the connection"
        await a.aclose()
        with pytest.raises(Closed):
            await a.ref().cast(Add(1))
    assert isinstance(outcomes.found[0][1], Closed | ProtocolError)


class BadLink(MemoryLink):
    """Raises on the next receive after it is told to."""

    error: Exception | None = None

    async def receive(self) -> Envelope | None:
        envelope = await super().receive()
        if self.error is not None:
            raise self.error
        return envelope


@pytest.mark.parametrize(
    ("error", "lost", "text"),
    [
        (ProtocolError("not a valid message"), ProtocolError, "not a valid message"),
        (ConnectionLost("reset by bob"), ConnectionLost, "reset by bob"),
        (ValueError("a bug"), ConnectionLost, "the link to bob failed (ValueError)"),
    ],
)
async def test_a_broken_link_ends_the_connection_quietly(error, lost, text, caplog, autojump_clock):
    caplog.set_level(logging.CRITICAL)
    link_a, peer = memory_links("alice", "bob")
    link = BadLink(link_a.peer, link_a._out, link_a._into)
    connection = Connection(link)
    async with trio.open_nursery() as nursery:
        await nursery.start(connection.run)
        outcomes = Outcomes(nursery)
        outcomes.call(connection.ref(), Add(1))
        await trio.testing.wait_all_tasks_blocked()
        link.error = error
        await peer.send(Ping(number=1))
        await connection.wait_closed()
    assert type(connection.lost) is lost
    ((_, outcome),) = outcomes.found
    assert isinstance(outcome, ConnectionLost)
    assert str(outcome) == text
    with pytest.raises(Closed):
        await link.send(Ping(number=1))


async def test_a_reply_of_the_wrong_type_ends_the_link(autojump_clock):
    async with raw() as (connection, peer), trio.open_nursery() as nursery:
        outcomes = Outcomes(nursery)
        outcomes.call(connection.ref(), Add(1))
        await trio.testing.wait_all_tasks_blocked()
        await peer.send(Reply(id=0, body=Ok()))
        await connection.wait_closed()
        assert isinstance(connection.lost, ProtocolError)
    ((_, outcome),) = outcomes.found
    assert isinstance(outcome, ConnectionLost)
    assert str(outcome) == "bob answered Add with Ok"


async def test_a_number_used_twice_ends_the_link(autojump_clock):
    async with open_supervisor() as supervisor:
        counter = await supervisor.start(Counter)
        async with raw(routes=routes(counter)) as (connection, peer):
            for _ in range(2):
                await peer.send(Call(id=1, seconds_left=100.0, body=Sleep(50.0)))
            await connection.wait_closed()
            assert isinstance(connection.lost, ProtocolError)


async def test_a_link_that_cannot_close_does_not_hold_us(autojump_clock):
    class Clinging(MemoryLink):
        async def aclose(self) -> None:
            await trio.sleep_forever()

    link_a, _peer = memory_links("alice", "bob")
    connection = Connection(Clinging(link_a.peer, link_a._out, link_a._into))
    async with trio.open_nursery() as nursery:
        await nursery.start(connection.run)
        await connection.aclose()
    assert trio.current_time() == 2.0


async def test_cancelling_run_closes_the_link(autojump_clock):
    async with open_supervisor(), trio.open_nursery() as nursery:
        link_a, peer = memory_links("alice", "bob")
        connection = Connection(link_a)
        await nursery.start(connection.run)
        nursery.cancel_scope.cancel()
    assert connection.closed
    assert await peer.receive() is None


async def test_a_connection_closed_before_it_ran(autojump_clock):
    link_a, peer = memory_links("alice", "bob")
    connection = Connection(link_a)
    await connection.aclose()
    await connection.wait_closed()
    await connection.run()
    assert await peer.receive() is None
    with pytest.raises(Closed):
        await connection.ref().call(Add(1), deadline=1.0)


async def test_a_cast_arrives(autojump_clock):
    async with raw() as (connection, peer):
        await connection.ref().cast(Add(1))
        assert await peer.receive() == Cast(body=Add(1))


def test_the_reply_type_is_read_from_the_message():
    assert reply_type(Step) is StepDone
    assert reply_type(Add) is Total
