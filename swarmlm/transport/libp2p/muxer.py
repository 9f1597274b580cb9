"""yamux: many streams over one secured connection. Used by `network.py`.

It takes the place of py-libp2p's own muxer, behind the same interface and on the same wire, for the sake of two rules:

- A frame is encrypted and handed to the socket without suspending, so cancelling any caller at any point leaves the
  connection whole.
- The reader of a connection never waits to write, so two peers with full queues cannot block each other.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.abc import IMuxedConn
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError

from swarmlm.transport.libp2p.stream import MAX_WINDOW, MuxedStream
from swarmlm.transport.libp2p.yamux import ACK, DATA, FIN, GO_AWAY, HEADER, PING, RST, SYN, WINDOW

log = logging.getLogger(__name__)

MAX_STREAMS = 1024  # open streams of one connection that a peer may ask for; a session uses one a hop
PING_SECONDS = 5.0  # silence before we ask whether the peer is there
DEAD_SECONDS = 20.0  # silence that ends the connection: long enough for a host that is busy loading weights


class Muxer(IMuxedConn):  # type: ignore[misc]
    """`conn` is a secured connection whose `tcp` is the `TcpStream` below it."""

    def __init__(self, conn: Any, peer_id: Any) -> None:
        self.peer_id = peer_id
        self.secured_conn = conn
        self.event_started = trio.Event()
        self.on_close: Callable[[], Awaitable[None]] | None = None  # set by SwarmConn; it learns by accept_stream
        self.streams: dict[int, MuxedStream] = {}
        self._next = 1 if conn.is_initiator else 2
        self._closed = False
        self._incoming, self._accepted = trio.open_memory_channel[MuxedStream](MAX_STREAMS)
        self._buffer = b""
        self._body: tuple[int, int, int] | None = None  # stream, bytes left, flags of the data frame being read
        self._heard = False

    @property
    def is_initiator(self) -> bool:
        return bool(self.secured_conn.is_initiator)

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self._closed

    @property
    def is_closed(self) -> bool:
        return self._closed

    def get_transport_addresses(self) -> Any:
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> Any:
        return self.secured_conn.get_connection_type()

    def get_remote_address(self) -> Any:
        return self.secured_conn.get_remote_address()

    async def start(self) -> None:
        """Read until the connection ends. Never raises: it runs in the swarm's own nursery."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                self.event_started.set()
                await self._receive()
                nursery.cancel_scope.cancel()
        finally:
            self.drop()

    async def _receive(self) -> None:
        try:
            while not self._closed:
                data = await self.secured_conn.read()
                self._heard = True
                self._feed(data)
                await trio.lowlevel.checkpoint()
        except Exception as error:  # libp2p and the cipher raise a dozen kinds; each ends this connection only
            log.debug("connection to %s ended: %r", self.peer_id, error)

    async def _watch(self) -> None:
        silent = 0.0  # counted in rounds, not by the clock: if our own loop was held up, what was said lies unread
        while silent < DEAD_SECONDS:
            self._heard = False
            await trio.sleep(PING_SECONDS)
            if self._heard:
                silent = 0.0
            else:
                silent += PING_SECONDS
                self.post(PING, SYN, 0, 0)
        self.drop()

    # ---- frames in

    def _feed(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
        at = 0
        while at < len(data):
            if self._body:
                number, left, flags = self._body
                part = data[at : at + left]
                at += len(part)
                self._body = (number, left - len(part), flags) if len(part) < left else None
                stream = self.streams.get(number)
                if stream is not None:
                    stream.on_data(part)
                    if self._body is None:
                        self._on_end(stream, flags)
                continue
            if len(data) - at < HEADER.size:
                break
            version, kind, flags, number, length = HEADER.unpack_from(data, at)
            at += HEADER.size
            if version != 0 or kind > GO_AWAY or (kind == DATA and length > MAX_WINDOW):
                raise MuxedStreamError(f"no yamux frame: version {version}, type {kind}, length {length}")
            self._on_frame(kind, flags, number, length)
        self._buffer = data[at:]

    def _on_frame(self, kind: int, flags: int, number: int, length: int) -> None:
        if kind == GO_AWAY:
            self.drop()
        elif kind == PING:
            if flags & SYN:
                self.post(PING, ACK, 0, length)
        else:
            stream = self._admit(number) if flags & SYN else self.streams.get(number)
            if kind == DATA and length:
                self._body = (number, length, flags)
                if stream is None and not flags & RST:
                    self.post(WINDOW, RST, number, 0)
            elif stream is not None:
                if kind == WINDOW:
                    stream.on_credit(length)
                self._on_end(stream, flags)

    def _on_end(self, stream: MuxedStream, flags: int) -> None:
        if flags & RST:
            self.forget(stream)
            stream.on_lost()
        elif flags & FIN:
            stream.on_fin()

    def _admit(self, number: int) -> MuxedStream | None:
        ours = number % 2 == self._next % 2
        if ours or number in self.streams or len(self.streams) >= MAX_STREAMS:
            self.post(WINDOW, RST, number, 0)
            return None
        stream = MuxedStream(self, number)
        try:
            self._incoming.send_nowait(stream)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            self.post(WINDOW, RST, number, 0)
            return None
        self.streams[number] = stream
        self.post(WINDOW, ACK, number, 0)
        return stream

    # ---- frames out

    def post(self, kind: int, flags: int, number: int, length: int, body: bytes = b"") -> None:
        """Encrypt and queue one frame without suspending; a failure is noticed by the reader of the connection."""
        if self._closed:
            return
        writing = self.secured_conn.write(HEADER.pack(0, kind, flags, number, length) + body)
        try:
            writing.send(None)
        except StopIteration:
            return
        except Exception as error:  # see _receive
            log.debug("cannot write to %s: %r", self.peer_id, error)
        else:
            writing.close()
            log.error("a write to %s suspended half way", self.peer_id)
        self.drop()

    async def drained(self) -> None:
        await self.secured_conn.tcp.drained()

    # ---- streams and the end

    async def open_stream(self) -> MuxedStream:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise MuxedConnUnavailable("the connection is closed")
        stream = MuxedStream(self, self._next)
        self._next += 2
        self.streams[stream.number] = stream
        self.post(WINDOW, SYN, stream.number, 0)
        return stream

    async def accept_stream(self) -> MuxedStream:
        try:
            return await self._accepted.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise MuxedConnUnavailable("the connection is closed") from None

    def forget(self, stream: MuxedStream) -> None:
        self.streams.pop(stream.number, None)

    def drop(self) -> None:
        """End the connection at once, without suspending."""
        if self._closed:
            return
        self._closed = True
        self._incoming.close()
        for stream in list(self.streams.values()):
            stream.on_lost()
        self.streams.clear()
        self.secured_conn.tcp.abort()

    async def close(self, error_code: int = 0) -> None:
        self.post(GO_AWAY, 0, 0, error_code)
        await self.secured_conn.tcp.close()
        self.drop()
