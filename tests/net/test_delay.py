"""The delaying proxy between real sockets: how late bytes come, how many a second, in order, to the end."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from swarmlm.errors import ConfigError
from swarmlm.transport.delay import FLIGHT, Delay, open_delay

LATENCY = 0.02  # seconds one way
NEAR = 0.003  # seconds that a busy machine may add


@asynccontextmanager
async def behind(
    answer: str = "echo", *, latency: float = LATENCY, bandwidth: float = math.inf
) -> AsyncIterator[Delay]:
    """A delay before a server that sends back what it gets, at once ("echo") or never ("swallow")."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            async for data in stream:
                if answer == "echo":
                    await stream.send_all(data)
            await stream.send_eof()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        port = listeners[0].socket.getsockname()[1]
        async with open_delay(("127.0.0.1", port), latency=latency, bandwidth=bandwidth) as wire:
            yield wire
        nursery.cancel_scope.cancel()


async def exactly(stream: trio.SocketStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        got = await stream.receive_some(size - len(data))
        assert got, f"ended after {len(data)} of {size} bytes"
        data += got
    return bytes(data)


async def round_trip(stream: trio.SocketStream, data: bytes) -> float:
    started = trio.current_time()
    await stream.send_all(data)
    assert await exactly(stream, len(data)) == data
    return trio.current_time() - started


async def test_a_byte_takes_the_latency_each_way() -> None:
    async with behind() as wire, await trio.open_tcp_stream(*wire.address) as stream:
        first = await round_trip(stream, b"!")
        later = [await round_trip(stream, b"!") for _ in range(11)]
    assert first >= 4 * LATENCY - NEAR  # the handshake's round trip, then its own
    assert 2 * LATENCY <= min(later) < 2 * LATENCY + NEAR  # the least: others use this machine too


@pytest.mark.parametrize("mbit", [10, 100])
async def test_a_wire_carries_its_bandwidth_in_each_direction(mbit: int) -> None:
    size = mbit * 50_000  # bytes: 0.4 s of it
    sent = os.urandom(size)
    async with behind(bandwidth=mbit * 1e6) as wire, await trio.open_tcp_stream(*wire.address) as stream:
        await round_trip(stream, b"!")
        async with trio.open_nursery() as nursery:
            started = trio.current_time()
            nursery.start_soon(stream.send_all, sent)
            assert await exactly(stream, size) == sent
            seconds = trio.current_time() - started - 2 * LATENCY
        assert wire.carried == 2 * (size + 1)
    assert size * 8 / (mbit * 1e6) == pytest.approx(seconds, rel=0.1)


async def test_connections_do_not_wait_for_each_other() -> None:
    async with behind(bandwidth=1e6) as wire:
        async with trio.open_nursery() as nursery:
            streams = [await trio.open_tcp_stream(*wire.address) for _ in range(50)]
            for stream in streams:
                nursery.start_soon(round_trip, stream, os.urandom(100))
        nobody_else = [await round_trip(streams[0], b"!") for _ in range(5)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(round_trip, streams[1], bytes(50_000))  # 0.4 s of its own wire
            beside_a_long_one = [await round_trip(streams[0], b"!") for _ in range(5)]
        assert wire.connections == 50
        for stream in streams:
            await stream.aclose()
    assert min(beside_a_long_one) < min(nobody_else) + NEAR


async def test_what_travels_is_bounded() -> None:
    """A reader that does not read holds up the sender; memory holds `FLIGHT` bytes and what the kernel buffers."""
    release = trio.Event()

    async def deaf(stream: trio.SocketStream) -> None:
        await release.wait()
        async for _ in stream:
            pass

    written = 0
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, deaf, listeners)
        port = listeners[0].socket.getsockname()[1]
        async with open_delay(("127.0.0.1", port), latency=0) as wire, await trio.open_tcp_stream(*wire.address) as one:
            with trio.move_on_after(1.0):
                while True:
                    await one.send_all(bytes(2**20))
                    written += 2**20
            assert FLIGHT <= written < 4 * FLIGHT
            release.set()
        nursery.cancel_scope.cancel()


async def test_the_end_travels_behind_the_bytes() -> None:
    async with behind() as wire, await trio.open_tcp_stream(*wire.address) as stream:
        await stream.send_all(b"last words")
        await stream.send_eof()
        assert await exactly(stream, 10) == b"last words"
        assert await stream.receive_some() == b""


async def test_nobody_behind_the_wire_closes_the_connection_only() -> None:
    async with open_delay(("127.0.0.1", 1), latency=0) as wire:
        for _ in range(2):
            async with await trio.open_tcp_stream(*wire.address) as stream:
                assert await stream.receive_some() == b""


async def test_no_wire_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="latency"):
        async with open_delay(("127.0.0.1", 1), latency=-1):
            pass
    with pytest.raises(ConfigError, match="carries nothing"):
        async with open_delay(("127.0.0.1", 1), latency=0, bandwidth=0):
            pass
    async with open_delay(("127.0.0.1", 1), latency=0) as wire:
        with pytest.raises(ConfigError, match="cannot listen"):
            async with open_delay(("127.0.0.1", 1), latency=0, port=wire.address[1]):
                pass
