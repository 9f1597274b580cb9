"""Bounded mailboxes: how a message waits for its actor, and how it leaves again when nobody wants the answer any more.

`Mailbox` belongs to the supervisor and the refs, and survives restarts of the actor. An actor sees its `Inbox` and the
`Request`s it takes from it. The rules:

- At most `size` requests wait. A request whose caller went away leaves at once and frees its place.
- `get` and `take_nowait` never return an abandoned request.
- Every request taken is settled exactly once: by an answer, by an error, or by the supervisor when the actor crashes
  or stops. No caller is left to its deadline because an actor died.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, Generic, TypeVar

import trio

from swarmlm.actors.core.message import Message
from swarmlm.actors.core.promise import Promise
from swarmlm.errors import ActorCrashed, Busy, Closed, DeadlineExceeded, SwarmError

A = TypeVar("A")


class Request:
    """One message on its way to one answer. `deadline` is on trio's clock; a cast has no caller and no deadline."""

    __slots__ = ("_gone", "_mailbox", "_promise", "_scope", "deadline", "message")

    def __init__(self, message: Message[Any, Any], deadline: float = math.inf, promise: Promise | None = None) -> None:
        self.message = message
        self.deadline = deadline
        self._promise = promise
        self._gone = False
        self._mailbox: Mailbox[Any] | None = None
        self._scope: trio.CancelScope | None = None

    @property
    def is_cast(self) -> bool:
        """Nobody waits for the answer."""
        return self._promise is None

    @property
    def seconds_left(self) -> float:
        """Until the caller gives up; never negative, infinite for a cast."""
        return max(0.0, self.deadline - trio.current_time())

    @property
    def abandoned(self) -> bool:
        """The caller went away or its deadline passed: any work on this is wasted."""
        return self._gone or (self.deadline != math.inf and trio.current_time() >= self.deadline)

    def answer(self, value: Any) -> None:
        """Settle with a reply. Ignored if already settled or abandoned."""
        if self._promise is not None:
            self._promise.set_value(value)
        self._leave()

    def fail(self, error: Exception) -> None:
        """Settle with an error, raised at the caller: a `SwarmError` unchanged, any other as `ActorCrashed`.

        Ignored if already settled or abandoned.
        """
        if self._promise is not None:
            if not isinstance(error, SwarmError):
                error = crash(self._mailbox.name if self._mailbox is not None else "actor", error)
            self._promise.set_error(error)
        self._leave()

    def abandon(self) -> None:
        """The caller's side: drop the queued message or cancel the running handler. Ignored once settled."""
        if self._promise is None or self._promise.done:
            return
        self._gone = True
        self._leave()
        if self._scope is not None:
            self._scope.cancel()

    def work(self) -> trio.CancelScope:
        """The scope to handle this request in: it ends at the deadline, or when the caller goes away."""
        self._scope = trio.CancelScope(deadline=self.deadline)
        if self._gone:
            self._scope.cancel()
        return self._scope

    def _leave(self) -> None:
        if self._mailbox is not None:
            self._mailbox.forget(self)


class Mailbox(Generic[A]):
    """A FIFO of at most `size` waiting requests, fair to the senders that wait for a place."""

    def __init__(self, size: int, name: str = "actor") -> None:
        if size < 1:
            raise ValueError(f"a mailbox needs room for at least one message, not {size}")
        self.name = name
        self._size = size
        self._waiting: OrderedDict[Request, None] = OrderedDict()
        self._blocked: OrderedDict[Request, trio.Event] = OrderedDict()  # senders without a place, oldest first
        self._taken: set[Request] = set()
        self._readers = trio.lowlevel.ParkingLot()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    async def put(self, request: Request, *, wait: bool = True) -> None:
        """Queue it: at once if there is room, else after waiting, or `Busy` with wait=False. Raises `Closed`.

        Not a checkpoint when there is room: the caller waits for its answer right after.
        """
        self._check_open()
        request._mailbox = self
        if len(self._waiting) < self._size:
            self._queue(request)
            return
        if not wait:
            raise Busy(f"{self.name} is busy: {self._size} messages are waiting", waiting=self._size)
        queued = self._blocked[request] = trio.Event()
        try:
            await queued.wait()
        finally:
            self._blocked.pop(request, None)
        if self._closed:
            self._check_open()

    def _queue(self, request: Request) -> None:
        self._waiting[request] = None
        self._readers.unpark()

    def _give_place(self) -> None:
        """A place is free: the sender that has waited longest is queued, in that order, before it even wakes up."""
        if self._blocked and not self._closed:
            request, queued = self._blocked.popitem(last=False)
            self._queue(request)
            queued.set()

    async def get(self) -> Request:
        """The next request somebody still wants. A checkpoint."""
        if self._waiting:
            await trio.lowlevel.checkpoint()
        while True:
            while not self._waiting:
                await self._readers.park()
            if (request := self._pop()) is not None:
                return request

    def take_nowait(self, limit: int) -> list[Request]:
        """Up to `limit` requests that are waiting now, oldest first."""
        taken: list[Request] = []
        while self._waiting and len(taken) < limit:
            if (request := self._pop()) is not None:
                taken.append(request)
        return taken

    def forget(self, request: Request) -> None:
        """It is settled or abandoned: it no longer takes a place."""
        self._taken.discard(request)
        if request in self._waiting:
            del self._waiting[request]
            self._give_place()

    def fail_taken(self, error: Exception) -> None:
        """The actor crashed: whoever it had taken a request from hears so. Waiting requests stay for its successor."""
        for request in list(self._taken):
            request.fail(error)

    def close(self) -> None:
        """The actor is gone for good: every caller, waiting or taken, gets `Closed`, now and from here on."""
        self._closed = True
        for request in [*self._taken, *self._waiting]:
            request.fail(self._closed_error())
        for queued in self._blocked.values():
            queued.set()

    def _pop(self) -> Request | None:
        request, _ = self._waiting.popitem(last=False)
        self._give_place()
        if request.abandoned:
            request.fail(DeadlineExceeded(f"{self.name} did not come to {type(request.message).__name__} in time"))
            return None
        if not request.is_cast:
            self._taken.add(request)
        return request

    def _check_open(self) -> None:
        if self._closed:
            raise self._closed_error()

    def _closed_error(self) -> Closed:
        return Closed(f"{self.name} has stopped")


class Inbox(Generic[A]):
    """The receiving half of a mailbox: what an actor that overrides `run` reads from."""

    def __init__(self, mailbox: Mailbox[A]) -> None:
        self._mailbox = mailbox

    def __len__(self) -> int:
        """Requests waiting now."""
        return len(self._mailbox)

    async def get(self) -> Request:
        """Wait for the next request. It must be settled with `answer` or `fail`."""
        return await self._mailbox.get()

    def take_nowait(self, limit: int) -> list[Request]:
        """Up to `limit` more requests that are waiting already, oldest first; none is fine. For batching."""
        return self._mailbox.take_nowait(limit)


def crash(name: str, error: Exception) -> ActorCrashed:
    """What a caller hears of a bug: the kind of the exception. Its text may be private and stays in the log."""
    crashed = ActorCrashed(f"{name} crashed ({type(error).__name__}); its log tells more")
    crashed.__cause__ = error
    return crashed
