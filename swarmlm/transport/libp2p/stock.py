"""py-libp2p as it comes, its own noise and yamux, behind the `Transport` of transport.base: for `swarmlm bench hop`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import libp2p
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.stream_muxer.exceptions import MuxedStreamEOF
from multiaddr import Multiaddr

from swarmlm.protocol import Address, PeerId
from swarmlm.transport.base import Handler
from swarmlm.transport.libp2p.network import quieten

PROTOCOL = TProtocol("/swarmlm/bench/1.0.0")
READ = 2**18  # bytes asked for at once: its own default window


class StockStream:
    """`Stream` of transport.base."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    @property
    def peer(self) -> PeerId:
        return PeerId(str(self._stream.muxed_conn.peer_id))

    async def send(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        for buffer in buffers:
            await self._stream.write(bytes(buffer))

    async def receive(self) -> bytes:
        try:
            return bytes(await self._stream.read(READ))
        except MuxedStreamEOF:
            return b""

    async def aclose(self) -> None:
        await self._stream.close()


class StockTransport:
    """`Transport` of transport.base."""

    def __init__(self, host: Any) -> None:
        self._host = host

    @property
    def peer_id(self) -> PeerId:
        return PeerId(str(self._host.get_id()))

    @property
    def addresses(self) -> Sequence[Address]:
        return [Address(str(address)) for address in self._host.get_addrs()]

    async def open_stream(self, peer: PeerId, addresses: Sequence[Address], *, timeout: float) -> StockStream:
        who = ID.from_string(peer)
        with trio.fail_after(timeout):
            places = [Multiaddr(address.rpartition("/p2p/")[0]) for address in addresses]
            await self._host.connect(PeerInfo(who, places))
            return StockStream(await self._host.new_stream(who, [PROTOCOL]))

    def set_handler(self, handler: Handler) -> None:
        async def serve(stream: Any) -> None:
            await handler(StockStream(stream))

        self._host.set_stream_handler(PROTOCOL, serve)


@asynccontextmanager
async def open_stock(seed: bytes) -> AsyncIterator[StockTransport]:
    """A stock host on a free loopback port. `seed` (32 bytes) makes its key."""
    quieten()
    host = libp2p.new_host(key_pair=create_new_key_pair(seed))
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        yield StockTransport(host)
