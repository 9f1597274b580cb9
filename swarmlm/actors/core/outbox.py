"""What waits for the writer task of a connection. Used by `remote` and `answering` only.

Calls, casts and replies may carry tensors, so there is room for a few and their senders wait. Pings, pongs, cancels and
failures are small and must never wait, because the reader and cancelled callers post them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import trio

from swarmlm.actors.core.message import Call, Cancel, Cast, Failed, Message, Ping, Pong, Reply
from swarmlm.actors.core.promise import Promise
from swarmlm.errors import Busy, SwarmError

OUTBOX = 16  # calls, casts and replies waiting for the writer: enough to keep it busy; their tensors stay in memory
MAX_SECONDS = 86400.0  # seconds: the longest deadline that an envelope may carry


class Outgoing(Promise):
    """A call of ours. Its envelope is made when it is written, so that the seconds left are right."""

    __slots__ = ("deadline", "id", "message", "sent")

    def __init__(self, number: int, message: Message[Any, Any], deadline: float) -> None:
        super().__init__()
        self.id = number
        self.message = message
        self.deadline = deadline
        self.sent = False

    def envelope(self) -> Call:
        left = self.deadline - trio.current_time()
        return Call(id=self.id, seconds_left=min(max(left, 0.0), MAX_SECONDS), body=self.message)


Large = Outgoing | Cast | Reply
Small = Failed | Cancel | Ping | Pong


class Outbox:
    """A FIFO of envelopes with `OUTBOX` places for the large ones."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._items: deque[Large | Small] = deque()
        self._room = trio.Semaphore(OUTBOX)
        self._writer = trio.lowlevel.ParkingLot()
        self._closed: Callable[[], SwarmError] | None = None

    def __len__(self) -> int:
        return len(self._items)

    async def put(self, item: Large, *, wait: bool = True) -> None:
        """Queue it, after waiting for a place or raising `Busy`. Raises why the outbox was closed, if it was."""
        if self._closed is not None:
            raise self._closed()
        try:
            self._room.acquire_nowait()
        except trio.WouldBlock:
            if not wait:
                raise Busy(f"the link to {self._peer} is busy: {OUTBOX} messages are waiting") from None
            await self._room.acquire()
            if self._closed is not None:
                raise self._closed() from None
        self._append(item)

    def post(self, item: Small) -> None:
        """Queue it at once; after closing, drop it."""
        if self._closed is None:
            self._append(item)

    async def get(self) -> Large | Small:
        """The next one to write. Cancelling it loses nothing."""
        while not self._items:
            await self._writer.park()
        item = self._items.popleft()
        if isinstance(item, Large):
            self._room.release()
        return item

    def close(self, why: Callable[[], SwarmError]) -> None:
        """Drop what waits; senders get `why()`, those that wait for a place too."""
        self._closed = why
        self._items.clear()
        for _ in range(self._room.statistics().tasks_waiting):
            self._room.release()

    def _append(self, item: Large | Small) -> None:
        self._items.append(item)
        self._writer.unpark()
