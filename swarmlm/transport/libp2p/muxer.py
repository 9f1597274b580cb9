"""yamux (/yamux/1.0.0): many streams over one secured connection. Used by `network.py`.

It replaces py-libp2p's own muxer behind the same interface and on the same wire, because of four rules:

- A frame is encrypted and handed to the socket without suspending, so cancelling any caller at any point leaves the
  connection whole.
- Data is taken from a stream without suspending, so a cancelled reader loses nothing.
- A sender waits for window without polling. The window grows with use, and credit is returned as data is consumed.
- The end of a connection is told apart from the end of a stream: only a FIN is a clean end.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)

log = logging.getLogger(__name__)

HEADER = struct.Struct("!BBHII")  # version, type, flags, stream id, length
DATA, WINDOW, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8

FIRST_WINDOW = 256 * 1024  # bytes; fixed by the yamux specification
MAX_WINDOW = 4 * 1024 * 1024  # bytes a peer may send unread: 40 MB/s at 100 ms of round trip
MAX_PAYLOAD = 65_519 - HEADER.size  # bytes; a frame fills one noise message and never spills into a second
MAX_STREAMS = 1024  # open streams of one connection that a peer may ask for; a session uses one a hop
PING_SECONDS = 5.0  # silence before we ask whether the peer is there
DEAD_SECONDS = 20.0  # silence that ends the connection: long enough for a host that is busy loading weights
STALL_SECONDS = 30.0  # a reader that frees no window for that long has stopped reading

Buffer = bytes | bytearray | memoryview


class MuxedStream(IMuxedStream):  # type: ignore[misc]
    """One reader and one writer."""

    def __init__(self, muxer: Muxer, number: int) -> None:
        self.muxed_conn = muxer
        self.number = number
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._window = FIRST_WINDOW  # bytes the peer may still send
        self._target = FIRST_WINDOW
        self._credit = FIRST_WINDOW  # bytes we may still send
        self._news = trio.Event()
        self.read_closed = False  # the peer sent FIN
        self.write_closed = False  # we sent FIN
        self.lost = False  # reset, or the connection went away

    # ---- reading

    async def readable(self) -> None:
        """Wait for data or for the end."""
        while not (self._buffered or self.read_closed or self.lost):
            await self._news.wait()

    def take(self, limit: int | None = None) -> bytes:
        """What has arrived, at most `limit` bytes; b"" if nothing has. Never suspends."""
        if limit is None and len(self._chunks) > 1:
            data = b"".join(self._chunks)
            self._chunks.clear()
        elif self._chunks:
            data = self._chunks.popleft()
            if limit is not None and len(data) > limit:
                self._chunks.appendleft(data[limit:])
                data = data[:limit]
        else:
            return b""
        self._buffered -= len(data)
        self._give_credit()
        return data

    def _give_credit(self) -> None:
        owed = self._target - self._window - self._buffered
        if owed < self._target // 2 or self.read_closed or self.lost:
            return
        grown = min(2 * self._target, MAX_WINDOW)
        owed += grown - self._target
        self._target = grown
        self._window += owed
        self.muxed_conn.post(WINDOW, 0, self.number, owed)

    async def read(self, n: int | None = None) -> bytes:
        """At least one byte, at most `n`. Raises `MuxedStreamEOF` at the end, `MuxedStreamReset` if it broke."""
        await trio.lowlevel.checkpoint()
        await self.readable()
        data = self.take(None if n is None or n < 0 else n)
        if data or n == 0:
            return data
        if self.read_closed:
            raise MuxedStreamEOF("the peer has closed the stream")
        raise MuxedStreamReset("the stream was reset")

    # ---- writing

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Write all buffers in order; small ones share a frame. Cancelled half way, the stream is of no more use."""
        await trio.lowlevel.checkpoint()
        pending: list[Buffer] = []
        room = MAX_PAYLOAD
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            while view:
                pending.append(view[:room])
                view = view[room:]
                room -= len(pending[-1])
                if not room:
                    await self._send_chunk(b"".join(pending))
                    pending, room = [], MAX_PAYLOAD
        if pending:
            await self._send_chunk(b"".join(pending))

    async def _send_chunk(self, chunk: bytes) -> None:
        sent = 0
        while sent < len(chunk):
            await self.muxed_conn.drained()
            if not self._credit and not self.lost:
                with trio.move_on_after(STALL_SECONDS) as stall:
                    while not self._credit and not self.lost:
                        await self._news.wait()
                if stall.cancelled_caught:
                    self.abandon()
                    raise MuxedStreamReset("the peer has stopped reading")
            if self.write_closed:
                raise MuxedStreamClosed("the stream is closed for writing")
            if self.lost:
                raise MuxedStreamReset("the stream was reset")
            part = chunk[sent : sent + self._credit] if sent or len(chunk) > self._credit else chunk
            self._credit -= len(part)
            self.muxed_conn.post(DATA, 0, self.number, len(part), part)
            sent += len(part)
            if sent < len(chunk) or len(chunk) == MAX_PAYLOAD:
                await trio.lowlevel.checkpoint()

    async def write(self, data: bytes) -> None:
        await self.send((data,))

    # ---- ending

    async def close(self) -> None:
        """Close our direction; the peer may go on sending."""
        await trio.lowlevel.checkpoint()
        self._finish()
        if self.read_closed:
            self.muxed_conn.forget(self)

    def _finish(self) -> None:
        if not self.write_closed and not self.lost:
            self.muxed_conn.post(WINDOW, FIN, self.number, 0)
        self.write_closed = True

    def end(self) -> None:
        """Close both directions without suspending: whatever still arrives is answered with a reset."""
        self._finish()
        self.muxed_conn.forget(self)
        self.on_lost()

    def abandon(self) -> None:
        """Reset without suspending."""
        if not self.lost:
            self.muxed_conn.post(WINDOW, RST, self.number, 0)
        self.muxed_conn.forget(self)
        self.on_lost()

    async def reset(self) -> None:
        self.abandon()
        await trio.lowlevel.checkpoint()

    # ---- what the connection reports

    def on_data(self, data: bytes) -> None:
        self._window -= len(data)
        if self._window < 0:
            raise MuxedStreamError("the peer sent more than its window")
        self._chunks.append(data)
        self._buffered += len(data)
        self._wake()

    def on_credit(self, count: int) -> None:
        self._credit += count
        self._wake()

    def on_fin(self) -> None:
        self.read_closed = True
        if self.write_closed:
            self.muxed_conn.forget(self)
        self._wake()

    def on_lost(self) -> None:
        self.lost = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def set_deadline(self, ttl: int) -> None:
        raise NotImplementedError("use trio's cancel scopes")

    def get_remote_address(self) -> tuple[str, int] | None:
        address: tuple[str, int] | None = self.muxed_conn.get_remote_address()
        return address

    async def __aenter__(self) -> MuxedStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


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
        self._heard = trio.current_time()

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
                self._heard = trio.current_time()
                self._feed(data)
                await trio.lowlevel.checkpoint()
        except Exception as error:  # libp2p and the cipher raise a dozen kinds; each ends this connection only
            log.debug("connection to %s ended: %r", self.peer_id, error)

    async def _watch(self) -> None:
        while True:
            await trio.sleep(PING_SECONDS)
            silence = trio.current_time() - self._heard
            if silence >= DEAD_SECONDS:
                self.drop()
                return
            if silence >= PING_SECONDS:
                self.post(PING, SYN, 0, 0)

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
