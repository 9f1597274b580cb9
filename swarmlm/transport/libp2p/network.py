"""The libp2p swarm with its traps closed: accepting, dialling and handshakes, each bounded. Used by `host.py` only.

- Accepting: a handshake has `HANDSHAKE_SECONDS`; when `MAX_HANDSHAKES` strangers are in the middle of one, the oldest
  is dropped, so that silent connections never lock out newcomers. Whatever a stranger sends ends its connection only.
- Dialling: every address of a peer is raced, nothing is remembered about failures, and one dial a peer is under way.
- Connections: the newest live one is used; a peer that came back is not talked to over its dead one.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from typing import Any

import libp2p.network.connection.swarm_connection as swarm_connection
import trio
from libp2p import generate_peer_id_from
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as new_noise_key
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore, PeerStoreError
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils import encode_delim, read_delim
from multiaddr import Multiaddr

from swarmlm.errors import ConfigError
from swarmlm.protocol import Address
from swarmlm.transport.libp2p.muxer import Muxer
from swarmlm.transport.libp2p.sockets import TcpStream, connect, endpoint
from swarmlm.transport.libp2p.stream import MuxedStream
from swarmlm.transport.libp2p.yamux import PROTOCOL as YAMUX

log = logging.getLogger(__name__)

MULTISTREAM = "/multistream/1.0.0"

HANDSHAKE_SECONDS = 5.0  # three round trips and two key exchanges: 20 ms here, under 2 s across the world
MAX_HANDSHAKES = 64  # strangers in a handshake at once: what a small machine can verify in a second or two
MAX_CONNECTIONS = 1024  # peers at once; a file descriptor each, and common limits are 1024 or more
DIAL_SECONDS = 5.0  # for a dial that nobody is waiting for any more
STAGGER_SECONDS = 0.25  # head start of one address over the next (RFC 8305)
PROBE_SHARE = 0.4  # of a timeout, for a connection that may be dead; the rest is for dialling anew
MAX_DIALLED = 8  # addresses tried of one peer; a host has a handful
ADDRESS_SECONDS = 3600  # a peer's addresses are remembered for an hour, as long as records live


class DialFailed(SwarmException):  # type: ignore[misc]
    """The text is for people: "connection refused", "timed out", "another peer answers there"."""


def quieten() -> None:
    """libp2p logs every stranger's mistake with a traceback, some of it on the root logger: none on the terminal."""
    logger = logging.getLogger("libp2p")
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
        logger.setLevel(logging.CRITICAL)
    swarm_connection.logging = logging.getLogger("libp2p.network.connection")  # it logs on the root logger otherwise


class _Upgrader(TransportUpgrader):  # type: ignore[misc]
    """Noise, then our muxer. The stock upgrader builds its own yamux whatever class it is given."""

    async def upgrade_security(self, raw_conn: Any, is_initiator: bool, peer_id: Any = None) -> Any:
        secured = await super().upgrade_security(raw_conn, is_initiator, peer_id)
        secured.tcp = raw_conn.stream
        return secured

    async def upgrade_connection(self, conn: Any, peer_id: Any) -> Muxer:
        await self.muxer_multistream.select_transport(conn)
        return Muxer(conn, peer_id)


class _NoAutoConnector(AutoConnector):  # type: ignore[misc]
    """The stock one dials every peer it has heard of, up to half of `MAX_CONNECTIONS`."""

    async def start(self) -> None:
        return None


class Network(Swarm):  # type: ignore[misc]
    """`nursery` outlives the network and owns its sockets."""

    def __init__(self, keys: KeyPair, nursery: trio.Nursery) -> None:
        peer = generate_peer_id_from(keys)
        peerstore = PeerStore()
        peerstore.add_key_pair(peer, keys)
        super().__init__(
            peer,
            peerstore,
            _Upgrader(
                {NOISE: NoiseTransport(keys, noise_privkey=new_noise_key().private_key)}, {TProtocol(YAMUX): Muxer}
            ),
            transports=[],
            retry_config=RetryConfig(max_retries=0),
            connection_config=ConnectionConfig(
                max_connections=MAX_CONNECTIONS,
                high_watermark=MAX_CONNECTIONS,
                low_watermark=0,
                min_connections=0,
                max_connections_per_peer=4,  # two peers that dial each other at once keep both connections
                inbound_upgrade_timeout=HANDSHAKE_SECONDS,
                outbound_upgrade_timeout=HANDSHAKE_SECONDS,
            ),
        )
        self.auto_connector = _NoAutoConnector(swarm=self)
        self._nursery = nursery
        self._greeting: dict[TcpStream, trio.CancelScope] = {}  # oldest first
        self._dials: dict[ID, trio.Lock] = {}

    # ---- accepting

    async def accept(self, listener: socket.socket) -> None:
        """Serve a listening socket until cancelled."""
        listening = trio.socket.from_stdlib_socket(listener)
        with listening:
            while True:
                try:
                    accepted, _ = await listening.accept()
                except OSError as error:
                    log.warning("cannot accept a connection: %s", error.strerror)
                    await trio.sleep(0.1)  # out of file descriptors: wait for some to come back
                    continue
                sock = socket.socket(fileno=accepted.detach())
                self._nursery.start_soon(self._greet, sock)

    async def _greet(self, sock: socket.socket) -> None:
        tcp = TcpStream(sock, self._nursery)
        if len(self._greeting) >= MAX_HANDSHAKES:
            next(iter(self._greeting.values())).cancel()
            self._greeting.pop(next(iter(self._greeting)))
        admitted = False
        with trio.move_on_after(HANDSHAKE_SECONDS) as scope:
            self._greeting[tcp] = scope
            try:
                await self.upgrade_inbound_raw_conn(RawConnection(tcp, False), Multiaddr("/ip4/0.0.0.0/tcp/0"))
                admitted = True
            except Exception as error:  # whatever a stranger sent
                log.debug("a handshake failed: %r", error)
            finally:
                self._greeting.pop(tcp, None)
                if not admitted:
                    tcp.abort()

    # ---- dialling

    def live(self, peer: ID) -> list[Any]:
        """Our connections to a peer, newest first."""
        found = [each for each in self.connections.get(peer, ()) if not each.muxed_conn.is_closed]
        return sorted(found, key=lambda each: each._created_at, reverse=True)

    def learn(self, peer: ID, addresses: Sequence[Address]) -> None:
        """Remember where a peer can be dialled. Raises `ConfigError` for a malformed address."""
        for address in addresses:
            endpoint(address)
        if peer != self.self_id and addresses:
            self.peerstore.add_addrs(peer, [_without_peer(address) for address in addresses], ADDRESS_SECONDS)

    async def dial_peer(self, peer_id: ID, addresses: Sequence[Address] = ()) -> list[Any]:
        """At least one live connection to the peer, `addresses` tried before others. Raises `DialFailed`."""
        lock = self._dials.setdefault(peer_id, trio.Lock())
        try:
            async with lock:
                found = self.live(peer_id)
                return found or [await self._race(peer_id, self._candidates(peer_id, addresses))]
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._dials.pop(peer_id, None)

    def _candidates(self, peer: ID, addresses: Sequence[Address]) -> list[tuple[str, int]]:
        try:
            known = [Address(str(each)) for each in self.peerstore.addrs(peer)]
        except PeerStoreError:
            known = []
        found: dict[tuple[str, int], None] = {}
        for address in [*addresses, *known]:
            try:
                found[endpoint(address)] = None
            except ConfigError:
                continue  # a peer may also announce transports that we do not speak
        return list(found)[:MAX_DIALLED]

    async def _race(self, peer: ID, candidates: list[tuple[str, int]]) -> Any:
        if not candidates:
            raise DialFailed("no usable address known")
        won: list[Any] = []
        reasons: list[str] = []

        async def attempt(where: tuple[str, int], failed: trio.Event) -> None:
            try:
                won.append(await self._attempt(peer, *where))
                race.cancel()
            except DialFailed as error:
                reasons.append(f"{where[0]} port {where[1]}: {error}")
                failed.set()

        with trio.move_on_after(DIAL_SECONDS) as race:
            async with trio.open_nursery() as nursery:
                for where in candidates:
                    failed = trio.Event()
                    nursery.start_soon(attempt, where, failed)
                    with trio.move_on_after(STAGGER_SECONDS):
                        await failed.wait()
        if won:
            return won[0]
        raise DialFailed("; ".join(reasons) or "timed out")

    async def _attempt(self, peer: ID, host: str, port: int) -> Any:
        try:
            tcp = await connect(host, port, self._nursery)
        except OSError as error:
            raise DialFailed((error.strerror or str(error)).lower()) from error
        except ValueError as error:  # a name that cannot be encoded for the resolver
            raise DialFailed("not a host name") from error
        finished = False
        try:
            connection = await self.upgrade_outbound_raw_conn(RawConnection(tcp, True), peer)
            finished = True
            return connection
        except Exception as error:  # libp2p and the cipher raise a dozen kinds
            raise DialFailed(_reason(error)) from error
        finally:
            if not finished:
                tcp.abort()

    # ---- streams

    async def open(self, peer: ID, addresses: Sequence[Address], protocol: str, timeout: float) -> MuxedStream:
        """A stream that speaks `protocol`; cancel it after `timeout` seconds. Raises `DialFailed` or a libp2p error.

        A connection at hand gets a share of the time; if it does not answer, it is dropped and the peer dialled anew.
        """
        for connection in self.live(peer)[:1]:
            with trio.move_on_after(timeout * PROBE_SHARE):
                try:
                    return await _negotiate(connection, protocol)
                except DialFailed:
                    raise
                except (BaseLibp2pError, EOFError) as error:
                    log.debug("a connection to %s is of no use: %r", peer, error)
            for stale in self.live(peer):
                stale.muxed_conn.drop()
        connections = await self.dial_peer(peer, addresses)
        return await _negotiate(connections[0], protocol)


async def _negotiate(connection: Any, protocol: str) -> MuxedStream:
    """Open a stream and agree on its protocol in one round trip."""
    stream: MuxedStream = await connection.muxed_conn.open_stream()
    agreed = False
    try:
        await stream.send([encode_delim(MULTISTREAM.encode()), encode_delim(protocol.encode())])
        for expected in (MULTISTREAM, protocol):
            if (await read_delim(stream)).decode(errors="replace") != expected:
                raise DialFailed(f"it does not speak {protocol}")
        agreed = True
        return stream
    finally:
        if not agreed:
            stream.abandon()


def _without_peer(address: Address) -> Multiaddr:
    return Multiaddr(address.split("/p2p/")[0])


def _reason(error: BaseException | None) -> str:
    texts: list[str] = []
    while error is not None:
        texts.append(f"{type(error).__name__} {error}")
        error = error.__cause__ or error.__context__
    story = " ".join(texts)
    if "PeerIDMismatch" in story or "Peer ID mismatch" in story:
        return "another peer answers there"
    if "Timeout" in story or "TooSlow" in story:
        return "timed out in the handshake"
    return "the handshake failed"
