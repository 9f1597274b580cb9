"""Our yamux against py-libp2p's own, and against bytes that are no yamux at all."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamEOF, MuxedStreamReset
from libp2p.stream_muxer.yamux.yamux import Yamux

from swarmlm.transport.libp2p.muxer import MAX_STREAMS, Muxer
from swarmlm.transport.libp2p.sockets import TcpStream


class PlainConnection:
    """A secured connection without the security."""

    def __init__(self, tcp: TcpStream, is_initiator: bool) -> None:
        self.tcp = tcp
        self.is_initiator = is_initiator

    async def read(self, n: int | None = None) -> bytes:
        data = await self.tcp.read(n)
        if not data:
            raise EOFError
        return data

    async def write(self, data: bytes) -> None:
        await self.tcp.write(data)

    async def close(self) -> None:
        await self.tcp.close()

    def get_remote_address(self) -> None:
        return None


@asynccontextmanager
async def connections(ours_first: bool, other: type[Any]) -> AsyncIterator[tuple[Muxer, Any]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    async with trio.open_nursery() as nursery:
        ours = Muxer(PlainConnection(TcpStream(left, nursery), ours_first), "theirs")
        theirs = other(PlainConnection(TcpStream(right, nursery), not ours_first), "ours")
        nursery.start_soon(ours.start)
        nursery.start_soon(theirs.start)
        await ours.event_started.wait()
        await theirs.event_started.wait()
        yield ours, theirs
        nursery.cancel_scope.cancel()


async def collect(stream: Any) -> bytes:
    data = b""
    try:
        while True:
            data += await stream.read(65536)
    except MuxedStreamEOF:
        return data


@pytest.mark.parametrize("other", [Yamux, Muxer])
@pytest.mark.parametrize("ours_first", [True, False])
async def test_streams_both_ways(ours_first: bool, other: type[Any]) -> None:
    payload = os.urandom(2_000_000)
    async with connections(ours_first, other) as (ours, theirs):
        for opener, acceptor in ((ours, theirs), (theirs, ours)):
            out = await opener.open_stream()
            with trio.fail_after(20):
                into = await acceptor.accept_stream()
                for sender, reader in ((out, into), (into, out)):

                    async def write(stream: Any = sender) -> None:
                        await stream.write(payload)
                        await stream.close()

                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(write)
                        assert await collect(reader) == payload
        assert ours.streams == {}


async def test_a_reset_is_no_clean_end() -> None:
    async with connections(True, Muxer) as (ours, theirs):
        out = await ours.open_stream()
        await out.write(b"last words")
        await out.reset()
        with trio.fail_after(5):
            into = await theirs.accept_stream()
            assert await into.read() == b"last words"
            with pytest.raises(MuxedStreamReset):
                await into.read()


async def test_the_end_of_the_connection_ends_its_streams() -> None:
    async with connections(True, Muxer) as (ours, theirs):
        out = await ours.open_stream()
        with trio.fail_after(5):
            into = await theirs.accept_stream()
            await theirs.close()
            with pytest.raises(MuxedStreamReset):
                await out.read()
            with pytest.raises(MuxedStreamReset):
                await into.read()
            with pytest.raises(MuxedConnUnavailable):
                await ours.open_stream()
            with pytest.raises(MuxedConnUnavailable):
                await ours.accept_stream()


class Raw:
    """The other end as a plain socket."""

    def __init__(self, conn: PlainConnection, _: str) -> None:
        self.tcp = conn.tcp
        self.event_started = trio.Event()
        self.event_started.set()

    async def start(self) -> None:
        await trio.sleep_forever()


async def test_more_streams_than_allowed_are_reset() -> None:
    async with connections(True, Raw) as (ours, raw):
        for number in range(2, 2 * MAX_STREAMS + 200, 2):
            await raw.tcp.write(struct.pack("!BBHII", 0, 1, 1, number, 0))
        with trio.fail_after(5):
            while len(ours.streams) < MAX_STREAMS:
                await trio.sleep(0.01)
        await trio.sleep(0.05)
        assert len(ours.streams) == MAX_STREAMS
        assert not ours.is_closed


async def test_a_peer_that_ignores_its_window_is_dropped() -> None:
    async with connections(True, Raw) as (ours, raw):
        await raw.tcp.write(struct.pack("!BBHII", 0, 1, 1, 2, 0))
        for _ in range(10):
            await raw.tcp.write(struct.pack("!BBHII", 0, 0, 0, 2, 60_000) + bytes(60_000))
        with trio.fail_after(5):
            while not ours.is_closed:
                await trio.sleep(0.01)


async def test_garbage_ends_the_connection_quietly() -> None:
    rng = random.Random(3)
    for _ in range(200):
        async with connections(True, Raw) as (ours, raw):
            frames = [
                struct.pack("!BBHII", 0, rng.randrange(4), rng.randrange(16), rng.randrange(6), rng.randrange(300))
                for _ in range(rng.randrange(8))
            ]
            await raw.tcp.write(b"".join(frames) + rng.randbytes(rng.randrange(200)))
            raw.tcp.abort()
            with trio.fail_after(5):
                while not ours.is_closed:
                    await trio.sleep(0)
