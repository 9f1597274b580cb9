"""The transports that `swarmlm bench hop` compares, and the far end of one as a process of its own:

    python -m swarmlm.bench.hop_peer KIND

prints one line of JSON (its peer id and addresses) and leaves when its stdin ends.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import trio

from swarmlm.protocol import Address, PeerId
from swarmlm.transport.base import Handler, Stream, Transport

READ = 2**18  # bytes taken at once from a socket
ECHO, SINK = b"e", b"s"  # the first byte of a stream: what the far end does with the rest
LENGTH = 8  # bytes that say how much a sink gets


class TcpStream:
    """Bare TCP behind `Stream`: no encryption, no identity, no streams within the connection."""

    peer = PeerId("tcp")

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def send(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        for buffer in buffers:
            await self._stream.send_all(memoryview(buffer))

    async def receive(self) -> bytes:
        return bytes(await self._stream.receive_some(READ))

    async def aclose(self) -> None:
        await self._stream.aclose()


class TcpTransport:
    peer_id = PeerId("tcp")

    def __init__(self, port: int) -> None:
        self.addresses = [Address(f"/ip4/127.0.0.1/tcp/{port}/p2p/tcp")]
        self.handler: Handler | None = None

    def set_handler(self, handler: Handler) -> None:
        self.handler = handler

    async def open_stream(self, peer: PeerId, addresses: Sequence[Address], *, timeout: float) -> TcpStream:
        with trio.fail_after(timeout):
            return TcpStream(await trio.open_tcp_stream("127.0.0.1", int(addresses[0].split("/")[4])))

    async def accept(self, stream: trio.SocketStream) -> None:
        if self.handler is not None:
            await self.handler(TcpStream(stream))


@asynccontextmanager
async def open_tcp() -> AsyncIterator[Transport]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    transport = TcpTransport(listener.socket.getsockname()[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, transport.accept, [listener])
        yield transport
        nursery.cancel_scope.cancel()


def open_ours() -> AbstractAsyncContextManager[Any]:
    from swarmlm.transport.identity import Identity
    from swarmlm.transport.libp2p import open_libp2p

    return open_libp2p(Identity.generate())


def open_stock() -> AbstractAsyncContextManager[Any]:
    from swarmlm.transport.libp2p.stock import open_stock

    return open_stock(secrets.token_bytes(32))


KINDS: dict[str, Callable[[], AbstractAsyncContextManager[Any]]] = {
    "tcp": open_tcp,
    "swarmlm": open_ours,
    "stock": open_stock,
}


async def serve(stream: Stream) -> None:
    """One stream of the far end."""
    first = bytes(await stream.receive())
    kind, data = first[:1], first[1:]
    if kind == ECHO:
        if data:
            await stream.send([data])
        while data := bytes(await stream.receive()):
            await stream.send([data])
        return
    while True:  # a sink: lengths, each followed by that much, each answered by a byte when all of it is here
        while len(data) < LENGTH:
            more = bytes(await stream.receive())
            if not more:
                return
            data += more
        left = int.from_bytes(data[:LENGTH], "big") - (len(data) - LENGTH)
        while left > 0:
            part = await stream.receive()
            if not part:
                return
            left -= len(part)
        data = b""
        await stream.send([b"!"])


async def main(kind: str) -> None:
    async with KINDS[kind]() as transport:
        transport.set_handler(serve)
        print(json.dumps([transport.peer_id, list(transport.addresses)]), flush=True)
        async for _ in trio.lowlevel.FdStream(os.dup(0)):
            pass


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
