"""Refs to actors on the other side of a link, and the connection that carries their calls both ways.

The rules a `Connection` keeps:

- One task reads the link and one writes it. No caller's cancel scope ever reaches the link, because a cancelled read or
  write can break an encrypted connection for everybody on it.
- The reader never waits for anything but the link, so neither side can block the other by not reading.
- An incoming call runs in a task of its own, for at most the seconds that its caller has left, and is cancelled by
  `Cancel`. A full mailbox, or too many calls at once, is answered `Busy`: waiting is the caller's business.
- While calls of ours are out, a `Ping` goes out every `heartbeat` seconds. If nothing is heard for `silence` seconds the
  peer counts as lost, and every call that is out fails with `ConnectionLost`. An idle link is left in peace.
- Whatever the peer or the network does, `run` returns and says why in `lost`; it never raises for it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from itertools import count
from typing import Any, Protocol, TypeVar, get_args, get_origin

import trio

from swarmlm.actors.core.message import Body, Call, Cancel, Cast, Envelope, Failed, Message, Ping, Pong, Reply
from swarmlm.actors.core.promise import Promise
from swarmlm.actors.core.ref import Ref
from swarmlm.errors import (
    ActorCrashed,
    Busy,
    Closed,
    ConnectionLost,
    DeadlineExceeded,
    ProtocolError,
    RemoteFailure,
    SwarmError,
    from_wire,
    to_wire,
)

R = TypeVar("R")

OUTBOX = 16  # calls, casts and replies waiting for the writer: enough to keep it busy; their tensors stay in memory
MAX_CONTROL = 1024  # pongs, cancels and failures waiting: a peer that makes us queue more sends without reading
SEND_PATIENCE = 60.0  # seconds for one envelope: a prefill chunk of 8 MiB over an uplink of 1 Mbit/s
CLOSE_GRACE = 2.0  # seconds for the link to close; a stuck socket must not keep a node from leaving
MAX_SECONDS = 86400.0  # seconds: the longest deadline an envelope may carry
MAX_ERROR_TEXT = 4096  # characters of an error that crosses the wire

log = logging.getLogger("swarmlm.actors")


class Link(Protocol):
    """An ordered, reliable pipe of envelopes to one peer; one task sends, one receives.

    A link may also have `bytes_received`, a growing int: then a large envelope that trickles in counts as being heard.
    """

    @property
    def peer(self) -> str:
        """Who is at the other end, for errors and logs."""

    async def send(self, envelope: Envelope) -> None:
        """Raises `ConnectionLost`, or `Closed` after our own `aclose`."""

    async def receive(self) -> Envelope | None:
        """The next envelope, None at a clean end. Raises `ProtocolError`, `ConnectionLost`, `Closed`."""

    async def aclose(self) -> None:
        """Close both directions. Idempotent, never raises."""


class _Outgoing(Promise):
    """A call of ours. Its envelope is made when it is written, so that the seconds left are right."""

    __slots__ = ("deadline", "id", "message", "sent")

    def __init__(self, id: int, message: Message[Any, Any], deadline: float) -> None:
        super().__init__()
        self.id = id
        self.message = message
        self.deadline = deadline
        self.sent = False

    def envelope(self) -> Call:
        left = self.deadline - trio.current_time()
        return Call(id=self.id, seconds_left=min(max(left, 0.0), MAX_SECONDS), body=self.message)


class Connection:
    """Calls over one link, both ways. `nursery.start(connection.run)` it, then use `ref()`.

    `routes` says which local actor gets which message type; it is looked up at each call and may grow. `heartbeat` and
    `silence` are in seconds, `max_calls` bounds the peer's calls that run at the same time.
    """

    def __init__(
        self,
        link: Link,
        routes: Mapping[type[Message[Any, Any]], Ref[Any]] | None = None,
        *,
        max_calls: int = 256,
        heartbeat: float = 1.0,
        silence: float = 5.0,
    ) -> None:
        self._link = link
        self._routes = routes if routes is not None else {}
        self._max_calls = max_calls
        self._heartbeat = heartbeat
        self._silence = silence
        self._ids = count()
        self._calls: dict[int, _Outgoing] = {}
        self._answering: dict[int, trio.CancelScope] = {}
        self._post, self._posted = trio.open_memory_channel[_Outgoing | Envelope](float("inf"))
        self._room = trio.Semaphore(OUTBOX)
        self._idle = trio.lowlevel.ParkingLot()
        self._heard_at = -float("inf")
        self._calling_since = -float("inf")
        self._bytes_seen = 0
        self._sending = False
        self._nursery: trio.Nursery | None = None
        self._ended = False
        self._finished = trio.Event()
        self.lost: SwarmError | None = None

    def __repr__(self) -> str:
        return f"<Connection to {self.peer}{' (closed)' if self.closed else ''}>"

    @property
    def peer(self) -> str:
        return self._link.peer

    @property
    def closed(self) -> bool:
        """Closed by us, or lost: `lost` says why then."""
        return self._ended

    def ref(self) -> Ref[Any]:
        """A ref to whatever the peer routes our messages to."""
        return RemoteRef(self)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the link until it is closed or lost. Cancelling it closes the link."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for part in (self._read, self._write, self._watch):
                    nursery.start_soon(self._guard, part)
                task_status.started()
                if self._ended:
                    nursery.cancel_scope.cancel()
        finally:
            self._end(None)
            await self._close_link()

    async def aclose(self) -> None:
        """Close the link at once: calls that are out raise `Closed`, the peer's running calls are cancelled."""
        self._end(None)
        if self._nursery is None:
            await self._close_link()
        else:
            await self._finished.wait()

    async def wait_closed(self) -> None:
        """Until the link is closed or lost and all its tasks have ended."""
        await self._finished.wait()

    # ---- our calls

    async def call(self, message: Message[Any, R], *, deadline: float, wait: bool) -> R:
        call = _Outgoing(next(self._ids), message, trio.current_time() + deadline)
        with trio.CancelScope(deadline=call.deadline):
            await self._take_room(wait)
            self._register(call)
            self._post.send_nowait(call)
            try:
                answer: R = await call.wait()
                return answer
            finally:
                if self._calls.pop(call.id, None) is not None and call.sent:
                    self._send_control(Cancel(id=call.id))
        raise DeadlineExceeded(f"{self.peer} did not answer {type(message).__name__} within {deadline:g} seconds")

    async def cast(self, message: Message[Any, Any], *, wait: bool) -> None:
        await self._take_room(wait)
        self._post.send_nowait(Cast(body=message))

    def _register(self, call: _Outgoing) -> None:
        if not self._calls:
            self._calling_since = trio.current_time()
            self._idle.unpark()
        self._calls[call.id] = call

    async def _take_room(self, wait: bool) -> None:
        """A place in the outbox for one envelope that may be large; the writer gives it back."""
        if not self._ended:
            try:
                self._room.acquire_nowait()
            except trio.WouldBlock:
                if not wait:
                    raise Busy(f"the link to {self.peer} is busy: {OUTBOX} messages are waiting") from None
                await self._room.acquire()
        if self._ended:
            raise self._why()

    def _why(self) -> SwarmError:
        return Closed(f"the link to {self.peer} is closed") if self.lost is None else ConnectionLost(str(self.lost))

    # ---- the tasks

    async def _guard(self, part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except SwarmError as error:
            self._end(error)
        except Exception as error:
            log.exception("the link to %s failed", self.peer)
            self._end(ConnectionLost(f"the link to {self.peer} failed ({type(error).__name__})"))

    async def _read(self) -> None:
        while (envelope := await self._link.receive()) is not None:
            self._heard_at = trio.current_time()
            match envelope:
                case Reply():
                    self._on_reply(envelope)
                case Call():
                    self._on_call(envelope)
                case Failed():
                    if (call := self._calls.pop(envelope.id, None)) is not None:
                        call.set_error(from_wire(envelope.code, envelope.text, envelope.details))
                case Cancel():
                    if (scope := self._answering.get(envelope.id)) is not None:
                        scope.cancel()
                case Ping():
                    self._send_control(Pong(number=envelope.number))
                case Cast():
                    await self._on_cast(envelope)
        self._end(ConnectionLost(f"{self.peer} closed the connection"))

    async def _write(self) -> None:
        with trio.CancelScope() as patience:
            async for item in self._posted:
                if isinstance(item, _Outgoing | Reply | Cast):
                    self._room.release()
                if isinstance(item, _Outgoing):
                    if item.id not in self._calls:
                        continue
                    item.sent = True
                    item = item.envelope()
                began = trio.current_time()
                patience.deadline = began + SEND_PATIENCE
                self._sending = True
                await self._link.send(item)
                self._sending = False
                patience.deadline = float("inf")
                if trio.current_time() - began >= self._heartbeat:
                    self._heard_at = trio.current_time()
        if patience.cancelled_caught:
            self._end(ConnectionLost(f"{self.peer} took in nothing for {SEND_PATIENCE:g} s"))

    async def _watch(self) -> None:
        for number in count():
            if not self._calls:
                await self._idle.park()
            ping_at = trio.current_time() + self._heartbeat
            while self._calls and trio.current_time() < ping_at:
                lost_at = self._quiet_since() + self._silence
                if trio.current_time() >= lost_at:
                    self._end(ConnectionLost(f"{self.peer} has been silent for {self._silence:g} s"))
                    return
                await trio.sleep_until(min(ping_at, lost_at))
            if self._calls:
                self._send_control(Ping(number=number))

    def _quiet_since(self) -> float:
        """When the peer last showed life, or had no reason to. While we are sending, it cannot answer yet."""
        received = getattr(self._link, "bytes_received", 0)
        if self._sending or received != self._bytes_seen:
            self._bytes_seen = received
            self._heard_at = trio.current_time()
        return max(self._heard_at, self._calling_since)

    # ---- the peer's calls

    def _on_reply(self, reply: Reply) -> None:
        call = self._calls.pop(reply.id, None)
        if call is None:
            return
        wanted = reply_type(type(call.message))
        if wanted is not None and not isinstance(reply.body, wanted):
            text = f"{self.peer} answered {type(call.message).__name__} with {type(reply.body).__name__}"
            call.set_error(ConnectionLost(text))
            raise ProtocolError(text)
        call.set_value(reply.body)

    def _on_call(self, call: Call) -> None:
        ref = self._routes.get(type(call.body))
        if call.id in self._answering:
            raise ProtocolError(f"{self.peer} used the number of a running call again")
        if ref is None:
            self._fail(call, ProtocolError(f"nobody here handles {type(call.body).__name__}"))
        elif len(self._answering) >= self._max_calls:
            self._fail(call, Busy(f"{self._max_calls} calls of this link are running"))
        elif self._nursery is not None:
            scope = self._answering[call.id] = trio.CancelScope()
            self._nursery.start_soon(self._answer, ref, call, scope)

    async def _answer(self, ref: Ref[Any], call: Call, scope: trio.CancelScope) -> None:
        try:
            with scope:
                body = await ref.call(call.body, deadline=call.seconds_left, wait=False)
                if not isinstance(body, Body):
                    raise TypeError(f"{type(call.body).__name__} was answered with {type(body).__name__}, not a Body")
                await self._take_room(wait=True)
                self._post.send_nowait(Reply(id=call.id, body=body))
        except ActorCrashed as error:
            self._fail(call, RemoteFailure(str(error)))
        except SwarmError as error:
            self._fail(call, error)
        except Exception as error:
            log.exception("answering %s of %s failed", type(call.body).__name__, self.peer)
            self._fail(call, error)
        finally:
            del self._answering[call.id]

    async def _on_cast(self, cast: Cast) -> None:
        name = type(cast.body).__name__
        ref = self._routes.get(type(cast.body))
        if ref is None:
            log.warning("%s sent %s, which nobody here handles", self.peer, name)
            return
        try:
            await ref.cast(cast.body, wait=False)
        except SwarmError as error:
            log.warning("%s of %s was dropped: %s", name, self.peer, error)

    def _fail(self, call: Call, error: Exception) -> None:
        code, text, details = to_wire(error)
        self._send_control(Failed(id=call.id, code=code, text=text[:MAX_ERROR_TEXT], details=details))

    # ---- both

    def _send_control(self, envelope: Failed | Cancel | Ping | Pong) -> None:
        """Queue a small envelope without waiting."""
        if self._ended:
            return
        if self._post.statistics().current_buffer_used >= MAX_CONTROL:
            self._end(ConnectionLost(f"{self.peer} sends without reading"))
        else:
            self._post.send_nowait(envelope)

    def _end(self, lost: SwarmError | None) -> None:
        """The link is over: by our own will (None) or because it was lost. The first reason stays."""
        if self._ended:
            return
        self._ended = True
        self.lost = lost
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.set_error(self._why())
        for _ in range(self._room.statistics().tasks_waiting):
            self._room.release()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def _close_link(self) -> None:
        with trio.move_on_after(CLOSE_GRACE, shield=True):
            await self._link.aclose()
        self._finished.set()


class RemoteRef(Ref[Any]):
    """A ref whose calls go over a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __repr__(self) -> str:
        return f"<Ref at {self._connection.peer}>"

    async def call(self, message: Message[Any, R], *, deadline: float, wait: bool = True) -> R:
        return await self._connection.call(message, deadline=deadline, wait=wait)

    async def cast(self, message: Message[Any, Any], *, wait: bool = True) -> None:
        await self._connection.cast(message, wait=wait)


async def serve(
    link: Link,
    routes: Mapping[type[Message[Any, Any]], Ref[Any]],
    *,
    max_calls: int = 256,
    heartbeat: float = 1.0,
    silence: float = 5.0,
) -> None:
    """Answer the peer's calls until the link ends: a transport's stream handler in one line."""
    await Connection(link, routes, max_calls=max_calls, heartbeat=heartbeat, silence=silence).run()


@cache
def reply_type(kind: type[Message[Any, Any]]) -> type | None:
    """The reply that a message type declares, None if it cannot be told: a peer must not answer with another one."""
    for parent in kind.__mro__:
        for base in getattr(parent, "__orig_bases__", ()):
            if get_origin(base) is Message:
                wanted = get_args(base)[1]
                return wanted if isinstance(wanted, type) else None
    return None
