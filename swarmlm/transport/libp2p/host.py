"""`Transport` and `Stream` of transport.base over libp2p: noise and yamux over TCP.

async with open_libp2p(identity, listen=["/ip4/0.0.0.0/tcp/4001"]) as transport:
    stream = await transport.open_stream(peer, addresses, timeout=5.0)
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from multiaddr import Multiaddr

from swarmlm.actors.core.groups import only, unwrapped
from swarmlm.errors import Closed, ConfigError, ConnectionLost, Unavailable, Unreachable
from swarmlm.protocol import PROTOCOL, Address, PeerId
from swarmlm.transport.base import Handler, own_address
from swarmlm.transport.libp2p.network import DialFailed, Network, quieten
from swarmlm.transport.libp2p.sockets import bind, endpoint, local_addresses
from swarmlm.transport.libp2p.stream import MuxedStream

if TYPE_CHECKING:
    from swarmlm.transport.identity import Identity

log = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0  # for telling all peers goodbye


class Libp2pStream:
    """`Stream` of transport.base. Made by `Libp2pTransport` only."""

    def __init__(self, peer: PeerId, muxed: MuxedStream) -> None:
        self._peer = peer
        self._muxed = muxed
        self._closed = False
        self._torn = False

    @property
    def peer(self) -> PeerId:
        return self._peer

    async def send(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        if self._closed:
            raise Closed("the stream is closed")
        if self._torn:
            raise ConnectionLost("an earlier send was cancelled half way")
        self._torn = True
        try:
            await self._muxed.send(buffers)
        except MuxedStreamError as error:
            if self._closed:
                raise Closed("the stream is closed") from None
            raise ConnectionLost(f"lost {_short(self._peer)}: {error}") from None
        self._torn = False

    async def receive(self) -> bytes | memoryview:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise Closed("the stream is closed")
        await self._muxed.readable()
        if self._closed:
            raise Closed("the stream is closed")
        data = self._muxed.take()
        if not data and not self._muxed.read_closed:
            raise ConnectionLost(f"lost {_short(self._peer)}")
        return data

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            if self._torn:
                self._muxed.abandon()
            else:
                self._muxed.end()
        await trio.lowlevel.checkpoint()


class _Host(BasicHost):  # type: ignore[misc]
    """A libp2p host whose helpers run in our nursery: py-libp2p spawns system tasks, where a bug ends the program."""

    def __init__(self, network: Network, nursery: trio.Nursery, addresses: Sequence[Multiaddr]) -> None:
        self._nursery = nursery
        self.on_identified: Callable[[ID], Awaitable[object]] | None = None
        super().__init__(network, addrs_factory=lambda _: list(addresses), disable_identify_address_discovery=True)
        network.set_stream_handler(self._guarded)

    async def _guarded(self, net_stream: Any) -> None:
        try:
            await self._swarm_stream_handler(net_stream)
        except Exception as error:  # whatever a peer sent on a new stream
            log.debug("a stream failed: %r", error)
            net_stream.muxed_stream.abandon()

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        if peer_id == self.get_id() or peer_id in self._identify_inflight or self._has_cached_protocols(peer_id):
            return
        if self._should_identify_peer(peer_id):
            self._identify_inflight.add(peer_id)
            self._nursery.start_soon(self._identify, peer_id, reason)

    async def _identify(self, peer_id: ID, reason: str) -> None:
        try:
            await self._identify_task_entry(peer_id, reason)
            if self.on_identified is not None:
                await self.on_identified(peer_id)
        except Exception as error:  # a peer that identifies itself badly
            log.debug("cannot identify %s: %r", peer_id, error)


class Libp2pTransport:
    """`Transport` of transport.base. `host` is for `kademlia.py`."""

    def __init__(self, peer_id: PeerId, addresses: Sequence[Address], host: Any, nursery: trio.Nursery) -> None:
        self._peer_id = peer_id
        self._addresses = tuple(addresses)
        self.host = host
        self.network: Network = host.get_network()
        self._nursery = nursery
        self._handler: Handler | None = None
        self._streams: set[Libp2pStream] = set()
        host.set_stream_handler(PROTOCOL, self._accept)

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def addresses(self) -> Sequence[Address]:
        return self._addresses

    def set_handler(self, handler: Handler) -> None:
        self._handler = handler

    async def _accept(self, net_stream: Any) -> None:
        muxed: MuxedStream = net_stream.muxed_stream
        if self._handler is None:
            muxed.abandon()
            return
        stream = Libp2pStream(PeerId(str(muxed.muxed_conn.peer_id)), muxed)
        self._nursery.start_soon(self._serve, self._handler, stream)

    async def _serve(self, handler: Handler, stream: Libp2pStream) -> None:
        try:
            await handler(stream)
        except Exception as raised:
            error = only(raised)
            if isinstance(error, Unavailable):
                return log.debug("a stream ended: %s", error)
            log.error("the handler of a stream from %s failed: %r", _short(stream.peer), error)
            log.debug("its traceback", exc_info=True)
        finally:
            await stream.aclose()

    async def open_stream(self, peer: PeerId, addresses: Sequence[Address], *, timeout: float) -> Libp2pStream:
        """A stream to `peer`, dialled if needed, within `timeout` seconds. Raises `Unreachable`."""
        try:
            who = ID.from_string(peer)
        except Exception as error:  # base58 and multihash have their own kinds
            raise Unreachable(f"cannot reach {_short(peer)}: not a peer id") from error
        if who == self.network.self_id:
            raise Unreachable(f"cannot reach {_short(peer)}: that is this node itself")
        reason = "timed out"
        with trio.move_on_after(timeout):
            try:
                return Libp2pStream(peer, await self.network.open(who, addresses, PROTOCOL, timeout))
            except DialFailed as error:
                reason = str(error)
            except (BaseLibp2pError, EOFError, ValueError):
                reason = "lost while opening a stream"
        raise Unreachable(f"cannot reach {_short(peer)}: {reason}")


def _short(peer: str) -> str:
    return f"{peer[:6]}..{peer[-6:]}" if len(peer) > 16 else peer


@asynccontextmanager
async def open_libp2p(
    identity: Identity,
    *,
    listen: Sequence[Address] = (Address("/ip4/127.0.0.1/tcp/0"),),
    announce: Sequence[Address] = (),
) -> AsyncIterator[Libp2pTransport]:
    """A transport that listens on `listen` (none: it only dials) until the block is left.

    `announce`, with or without our peer id, is what others are told instead of where it listens.
    Raises `ConfigError` for an address that is malformed, names another peer, or whose port is in use.
    """
    quieten()
    keys = create_new_key_pair(identity.seed)
    told = [own_address(address, identity.peer_id) for address in announce]
    for address in told:
        endpoint(address)
    sockets = []
    try:
        for address in listen:
            sockets.append(bind(address))
    except ConfigError:
        for sock in sockets:
            sock.close()
        raise
    bound = [Address(f"{each}/p2p/{identity.peer_id}") for sock in sockets for each in local_addresses(sock)]
    addresses = told or bound
    with unwrapped():
        async with trio.open_nursery() as nursery:
            network = Network(keys, nursery)
            peer_id = PeerId(str(network.self_id))
            assert peer_id == identity.peer_id, "the identity's peer id is not that of its seed"
            host = _Host(network, nursery, [Multiaddr(address.partition("/p2p/")[0]) for address in addresses])
            transport = Libp2pTransport(peer_id, addresses, host, nursery)
            async with host.run(listen_addrs=[]):
                for sock in sockets:
                    nursery.start_soon(network.accept, sock)
                try:
                    yield transport
                finally:
                    with trio.CancelScope(deadline=trio.current_time() + CLOSE_SECONDS, shield=True):
                        async with trio.open_nursery() as closing:
                            for connections in list(network.connections.values()):
                                for connection in list(connections):
                                    closing.start_soon(connection.close)
            nursery.cancel_scope.cancel()
