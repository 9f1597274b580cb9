"""The simulated network keeps its own promises, on virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from trio.testing import MockClock

from swarmlm.actors.core.message import Blob, Call
from swarmlm.errors import Closed, ConfigError, ConnectionLost, Unreachable
from swarmlm.protocol import Step, Tensor
from swarmlm.transport.base import Stream
from swarmlm.transport.identity import Identity
from swarmlm.transport.link import FramedLink
from swarmlm.transport.memory import MemoryNetwork, MemoryTransport


async def echo(stream: Stream) -> None:
    while data := await stream.receive():
        await stream.send([data])


@asynccontextmanager
async def pair(network: MemoryNetwork) -> AsyncIterator[tuple[MemoryTransport, MemoryTransport, Stream]]:
    async with network.open_transport() as host, network.open_transport() as client:
        host.set_handler(echo)
        yield host, client, await client.open_stream(host.peer_id, host.addresses, timeout=5)


async def read(stream: Stream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = await stream.receive()
        assert part, "ended early"
        data += part
    return data


async def round_trip(stream: Stream, data: bytes = b"ping") -> float:
    started = trio.current_time()
    await stream.send([data])
    assert await read(stream, len(data)) == data
    return trio.current_time() - started


async def test_latency_is_exact(autojump_clock: MockClock) -> None:
    network = MemoryNetwork(latency=0.05)
    async with pair(network) as (host, client, stream):
        assert stream.peer == host.peer_id
        assert await round_trip(stream) == pytest.approx(0.1)
        network.set_link(host.peer_id, client.peer_id, latency=0.2)
        assert await round_trip(stream) == pytest.approx(0.4)


async def test_bandwidth_takes_its_time(autojump_clock: MockClock) -> None:
    async with pair(MemoryNetwork(bandwidth=1_000_000)) as (_, _, stream):
        assert await round_trip(stream, bytes(500_000)) == pytest.approx(0.5, rel=0.1)


async def test_loss_delays_and_a_seed_repeats_it(autojump_clock: MockClock) -> None:
    async def times(seed: int) -> list[float]:
        async with pair(MemoryNetwork(latency=0.01, loss=0.3, seed=seed)) as (_, _, stream):
            return [await round_trip(stream) for _ in range(30)]

    first, again, other = await times(1), await times(1), await times(2)
    assert first == pytest.approx(again)
    assert first != pytest.approx(other)
    assert min(first) == pytest.approx(0.02)
    assert max(first) > 0.03


async def test_a_partition_is_silence_until_it_heals(autojump_clock: MockClock) -> None:
    network = MemoryNetwork(latency=0.01)
    async with pair(network) as (host, client, stream):
        network.partition({host.peer_id}, {client.peer_id})
        await stream.send([b"lost?"])
        with trio.move_on_after(60) as waited:
            await stream.receive()
        assert waited.cancelled_caught
        started = trio.current_time()
        with pytest.raises(Unreachable):
            await client.open_stream(host.peer_id, host.addresses, timeout=3)
        assert trio.current_time() - started == pytest.approx(3)
        network.heal()
        assert await read(stream, 5) == b"lost?"


async def test_a_killed_peer_breaks_its_streams_and_cannot_be_dialled(autojump_clock: MockClock) -> None:
    network = MemoryNetwork(latency=0.01)
    async with pair(network) as (host, client, stream):
        await round_trip(stream)
        network.kill(host.peer_id)
        started = trio.current_time()
        with pytest.raises(ConnectionLost):
            await stream.receive()
        with pytest.raises(Unreachable):
            await client.open_stream(host.peer_id, host.addresses, timeout=5)
        assert trio.current_time() - started < 1


async def test_leaving_is_a_clean_end(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with network.open_transport() as client:
        async with network.open_transport() as host:
            host.set_handler(echo)
            stream = await client.open_stream(host.peer_id, host.addresses, timeout=5)
            await round_trip(stream)
        assert await stream.receive() == b""
        await stream.aclose()
        with pytest.raises(Closed):
            await stream.receive()


async def test_a_sender_waits_for_a_reader_that_is_behind(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with network.open_transport() as host, network.open_transport() as client:

        async def sleepy(stream: Stream) -> None:
            await trio.sleep(10)
            await read(stream, 8 * 2**20)

        host.set_handler(sleepy)
        stream = await client.open_stream(host.peer_id, host.addresses, timeout=5)
        started = trio.current_time()
        for _ in range(8):
            await stream.send([bytes(2**20)])
        assert trio.current_time() - started >= 10


async def test_a_handler_that_fails_ends_its_stream_only(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with pair(network) as (host, client, stream):

        async def fail(stream: Stream) -> None:
            raise ValueError("a bug")

        host.set_handler(fail)
        broken = await client.open_stream(host.peer_id, host.addresses, timeout=5)
        with trio.fail_after(5):
            with suppress(ConnectionLost):
                assert await broken.receive() == b""
        assert await round_trip(stream) >= 0


async def test_frames_with_tensors_travel(autojump_clock: MockClock) -> None:
    async with pair(MemoryNetwork(latency=0.01, bandwidth=1e6, jitter=0.005, loss=0.1)) as (_, _, stream):
        link = FramedLink(stream)
        tensor = Tensor("float32", (1, 50, 64), Blob(bytes(range(256)) * 50))
        for number in range(5):
            await link.send(Call(number, 1.0, Step(b"s" * 16, 0, number, tensor)))
        for number in range(5):
            envelope = await link.receive()
            assert isinstance(envelope, Call)
            assert (envelope.id, envelope.body.position, envelope.body.hidden) == (number, number, tensor)
        assert link.bytes_received > 5 * 12_800


async def test_an_identity_is_here_once(autojump_clock: MockClock) -> None:
    network, who = MemoryNetwork(), Identity.generate()
    async with network.open_transport(who):
        with pytest.raises(ConfigError):
            async with network.open_transport(who):
                pass
