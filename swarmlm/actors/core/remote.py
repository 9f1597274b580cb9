"""Refs to actors on the other side of a link, and the connection that carries calls both ways.

The rules a `Connection` keeps:

- One task reads the link and one writes it. No caller's cancel scope ever reaches the link, because a cancelled read or
  write can break an encrypted connection for everybody on it.
- The reader never waits for anything but the link, so neither side can block the other by not reading.
- An incoming call runs in a task of its own, for at most the seconds that its caller has left, and is cancelled by
  `Cancel`. A full mailbox, or too many calls at once, is answered `Busy`: waiting is the caller's business.
- While calls of ours are out, a `Ping` goes out every `heartbeat` seconds. When nothing is heard for `silence` seconds,
  the peer is lost, and every call that is out fails with `ConnectionLost`. An idle link is left in peace.
- Whatever the peer or the network does, `run` returns and `lost` says why; it never raises for it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from itertools import count
from typing import Any, TypeVar, get_args, get_origin

import trio

from swarmlm.actors.core.answering import Answering
from swarmlm.actors.core.link import Link
from swarmlm.actors.core.message import Call, Cancel, Cast, Envelope, Failed, Message, Ping, Pong, Reply
from swarmlm.actors.core.outbox import Outbox, Outgoing
from swarmlm.actors.core.ref import Ref
from swarmlm.errors import Closed, ConnectionLost, DeadlineExceeded, ProtocolError, SwarmError, from_wire

R = TypeVar("R")

MAX_OUTBOX = 1024  # envelopes: a peer that makes us queue more pongs and refusals sends without reading
SEND_PATIENCE = 60.0  # seconds for one envelope: a prefill chunk of 8 MiB over an uplink of 1 Mbit/s
STALL = 0.5  # seconds: our own event loop was held up that long, so words of the peer may lie unread
CLOSE_GRACE = 2.0  # seconds for the link to close; a stuck socket must not keep a node from leaving

log = logging.getLogger("swarmlm.actors")


class Connection:
    """Calls over one link, both ways. `nursery.start(connection.run)` it, then call through `ref()`.

    `routes` says which local actor gets which message type; it is looked up at each call, so it may grow. `heartbeat`
    and `silence` are in seconds; `max_calls` bounds the peer's calls that run at the same time.
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
        self._heartbeat = heartbeat
        self._silence = silence
        self._numbers = count()
        self._calls: dict[int, Outgoing] = {}
        self._outbox = Outbox(link.peer)
        self._answering = Answering(link.peer, {} if routes is None else routes, max_calls, self._outbox)
        self._idle = trio.lowlevel.ParkingLot()
        self._heard_at = -math.inf
        self._calling_since = -math.inf
        self._bytes_seen = 0
        self._sending = False
        self._ping_waits = False
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
        """Closed by us, or lost; then `lost` says why."""
        return self._ended

    def ref(self) -> Ref[Any]:
        """A ref to whatever the peer routes our messages to."""
        return RemoteRef(self)

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the link until it is closed or lost. Cancelling it closes the link."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for part in (self._read, self._write, self._watch):
                    nursery.start_soon(self._guard, part, nursery)
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
        """Until the link is closed or lost, and its tasks have ended."""
        await self._finished.wait()

    async def call(self, message: Message[Any, R], *, deadline: float, wait: bool = True) -> R:
        """See `Ref.call`."""
        call = Outgoing(next(self._numbers), message, trio.current_time() + deadline)
        with trio.CancelScope(deadline=call.deadline):
            await self._outbox.put(call, wait=wait)
            if not self._calls:
                self._calling_since = trio.current_time()
                self._idle.unpark()
            self._calls[call.id] = call
            try:
                answer: R = await call.wait()
                return answer
            finally:
                if self._calls.pop(call.id, None) is not None and call.sent:
                    self._outbox.post(Cancel(id=call.id))
        raise DeadlineExceeded(f"{self.peer} did not answer {type(message).__name__} within {deadline:g} seconds")

    async def cast(self, message: Message[Any, Any], *, wait: bool = True) -> None:
        """See `Ref.cast`."""
        await self._outbox.put(Cast(body=message), wait=wait)

    # ---- the tasks

    async def _guard(self, part: Callable[[trio.Nursery], Awaitable[None]], nursery: trio.Nursery) -> None:
        try:
            await part(nursery)
        except SwarmError as error:
            self._end(error)
        except Exception as error:
            log.exception("the link to %s failed", self.peer)
            self._end(ConnectionLost(f"the link to {self.peer} failed ({type(error).__name__})"))

    async def _read(self, nursery: trio.Nursery) -> None:
        while (envelope := await self._link.receive()) is not None:
            self._heard_at = trio.current_time()
            match envelope:
                case Reply():
                    self._take_reply(envelope)
                case Call():
                    self._answering.call(envelope, nursery)
                case Failed():
                    if (call := self._calls.pop(envelope.id, None)) is not None:
                        call.set_error(from_wire(envelope.code, envelope.text, envelope.details))
                case Cancel():
                    self._answering.cancel(envelope.id)
                case Ping():
                    self._outbox.post(Pong(number=envelope.number))
                case Cast():
                    await self._answering.cast(envelope)
            if len(self._outbox) > MAX_OUTBOX:
                raise ConnectionLost(f"{self.peer} sends without reading")
        raise ConnectionLost(f"{self.peer} closed the connection")

    async def _write(self, nursery: trio.Nursery) -> None:
        with trio.CancelScope() as patience:
            while True:
                item = await self._outbox.get()
                if isinstance(item, Outgoing) and item.id not in self._calls:
                    continue
                patience.deadline = trio.current_time() + SEND_PATIENCE
                await self._send(item)
                patience.deadline = math.inf
        if patience.cancelled_caught:
            raise ConnectionLost(f"{self.peer} took in nothing for {SEND_PATIENCE:g} s")

    async def _send(self, item: Outgoing | Envelope) -> None:
        if isinstance(item, Outgoing):
            item.sent = True
            item = item.envelope()
        elif isinstance(item, Ping):
            self._ping_waits = False
        began = trio.current_time()
        self._sending = True
        await self._link.send(item)
        self._sending = False
        if trio.current_time() - began >= self._heartbeat:
            self._heard_at = trio.current_time()

    async def _watch(self, nursery: trio.Nursery) -> None:
        for number in count():
            if not self._calls:
                await self._idle.park()
            ping_at = trio.current_time() + self._heartbeat
            while self._calls and trio.current_time() < ping_at:
                lost_at = self._quiet_since() + self._silence
                if trio.current_time() >= lost_at:
                    raise ConnectionLost(f"{self.peer} has been silent for {self._silence:g} s")
                wake_at = min(ping_at, lost_at)
                await trio.sleep_until(wake_at)
                if trio.current_time() - wake_at > STALL:
                    self._heard_at = trio.current_time()
            if self._calls and not self._ping_waits:
                self._ping_waits = True
                self._outbox.post(Ping(number=number))

    def _quiet_since(self) -> float:
        """When the peer last showed life or had no reason to. While we are still sending, it cannot answer yet."""
        received = getattr(self._link, "bytes_received", 0)
        if self._sending or received != self._bytes_seen:
            self._bytes_seen = received
            self._heard_at = trio.current_time()
        return max(self._heard_at, self._calling_since)

    def _take_reply(self, reply: Reply) -> None:
        call = self._calls.pop(reply.id, None)
        if call is None:
            return
        wanted = reply_type(type(call.message))
        if wanted is not None and not isinstance(reply.body, wanted):
            text = f"{self.peer} answered {type(call.message).__name__} with {type(reply.body).__name__}"
            call.set_error(ConnectionLost(text))
            raise ProtocolError(text)
        call.set_value(reply.body)

    # ---- the end

    def _end(self, lost: SwarmError | None) -> None:
        """The link is over, by our own will (None) or because it was lost. The first reason stays."""
        if self._ended:
            return
        self._ended = True
        self.lost = lost
        self._outbox.close(self._why)
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.set_error(self._why())
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def _why(self) -> SwarmError:
        return Closed(f"the link to {self.peer} is closed") if self.lost is None else ConnectionLost(str(self.lost))

    async def _close_link(self) -> None:
        with trio.CancelScope(deadline=trio.current_time() + CLOSE_GRACE, shield=True):
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
