"""One stream of a yamux connection: flow control and the ends of its two directions. Used by `muxer.py`, `host.py`.

- Data is taken without suspending, so a cancelled reader loses nothing.
- A sender waits for window without polling. The window grows with use, and credit is returned as data is consumed.
- Only a FIN is a clean end; a reset and the end of the connection are losses, after what had arrived before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio
from libp2p.abc import IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamClosed, MuxedStreamEOF, MuxedStreamError, MuxedStreamReset

from swarmlm.transport.libp2p.yamux import DATA, FIN, FIRST_WINDOW, MAX_PAYLOAD, RST, WINDOW

if TYPE_CHECKING:
    from swarmlm.transport.libp2p.muxer import Muxer

MAX_WINDOW = 4 * 1024 * 1024  # bytes a peer may send unread: 40 MB/s at 100 ms of round trip
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
