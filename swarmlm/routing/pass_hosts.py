"""The hosts that a client trains through: who serves which blocks now, links to them, and others when one is lost.

Used by `routing.passes` only. Asking a host either works or raises `HostLost`; giving that to `replace_host` puts
others in its place. Several micro-batches ask at the same time, and all of those at a host notice when it dies: it is
replaced once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import trio

from swarmlm.actors.core import Connection, Message
from swarmlm.errors import BadStep, Busy, Closed, NoRoute, SwarmError, UnknownSession, UsageError, WrongModel
from swarmlm.protocol import PeerId
from swarmlm.routing.base import SessionEvent, SessionOptions, Swarm
from swarmlm.routing.failover import Suspects
from swarmlm.routing.graph import HostView, PathHop
from swarmlm.routing.planner import plan

IN_FLIGHT = 2  # micro-batches at a host: one is computed while the next one travels
BUSY_WAITS = (0.05, 0.2, 0.5, 1.0)  # seconds between tries at a host whose mailbox is full; then another host is better
CLOSE_SECONDS = 1.0  # for a connection to close

R = TypeVar("R")
T = TypeVar("T")


class HostLost(Exception):
    """`peer` did not answer usefully. It is out of use until `replace_host` has put others where it was."""

    def __init__(self, peer: PeerId) -> None:
        super().__init__(f"{peer} is lost")
        self.peer = peer


class PassHosts:
    """A chain of hosts over all blocks of a model, looked for when first needed and mended when one is lost."""

    def __init__(
        self,
        swarm: Swarm,
        terms: tuple[str, str, int],
        pass_timeout: float,
        options: SessionOptions,
        emit: Callable[[SessionEvent], None],
    ) -> None:
        self.model, self.fingerprint, self.blocks = terms
        self.route: list[PathHop] = []  # covers all blocks once planned
        self.closed = False
        self.failovers = 0
        self._swarm = swarm
        self._pass_timeout = pass_timeout
        self._options = options
        self._emit = emit
        self._planning = trio.Lock()
        self._suspects = Suspects(options.ban_seconds)
        self._losses = Counter[PeerId]()  # how often each was lost: who asked before that asks anew
        self._lost: dict[PeerId, SwarmError] = {}  # and why: still in the route, and not to be asked any more
        self._connections: dict[PeerId, Connection] = {}
        self._dialling: dict[PeerId, trio.Lock] = {}
        self._room: dict[PeerId, trio.CapacityLimiter] = {}

    async def plan_route(self) -> None:
        """Find hosts over all blocks, if that has not been done. Raises `NoRoute` or what the look-up raised."""
        async with self._planning:
            if not self.route:
                until = trio.current_time() + self._options.open_patience
                self.route = await self._find(0, self.blocks, until, opening=True)

    def places(self, start: int, end: int) -> list[PathHop]:
        """What of the route lies in blocks [start, end), in order."""
        return [
            PathHop(hop.peer, max(hop.start, start), min(hop.end, end))
            for hop in self.route
            if max(hop.start, start) < min(hop.end, end)
        ]

    async def ask(
        self, peer: PeerId, message: Message[Any, R], read: Callable[[R], T], *, may_forget: bool = False
    ) -> T:
        """What `read` makes of the answer of `peer`; a `SwarmError` of it is the fault of `peer`.

        Raises `HostLost`, `Closed`; `BadStep` and `UsageError` for a fault of the request. `may_forget`:
        `UnknownSession` is an answer too.
        """
        losses = self._losses[peer]
        async with self._room.setdefault(peer, trio.CapacityLimiter(IN_FLIGHT)):
            if peer in self._lost or losses != self._losses[peer]:
                raise HostLost(peer)
            try:
                return read(await self._call(peer, message))
            except (UsageError, BadStep):
                raise
            except SwarmError as error:
                if isinstance(error, UnknownSession) and may_forget:
                    raise
                if self.closed:
                    raise Closed("the training route was closed") from error
                if losses == self._losses[peer]:  # else it is known already, and this call was cut off by it
                    self._losses[peer] += 1
                    self._lost[peer] = error
                    self._suspects.note(peer, trio.current_time())
                    self._swarm.report_failure(peer, error)
                raise HostLost(peer) from error

    async def aclose(self) -> None:
        """Close the connections, at once. Closing twice is fine."""
        self.closed = True
        with trio.CancelScope(shield=True):
            for peer in list(self._connections):
                await self._hang_up(peer)

    async def replace_host(self, peer: PeerId) -> None:
        """Put other hosts where a lost one is in the route, unless that has been done. Raises `NoRoute`."""
        async with self._planning:
            if (error := self._lost.get(peer)) is None:
                return
            began = trio.current_time()
            await self._hang_up(peer)
            for hop in [hop for hop in self.route if hop.peer == peer]:
                where = f"blocks {hop.start}:{hop.end}"
                self._emit(SessionEvent("failover", f"lost {peer} for {where}: {error}", hop.start, hop.end, peer))
                found = await self._find(hop.start, hop.end, began + self._options.patience, opening=False)
                index = self.route.index(hop)
                self.route[index : index + 1] = found
                seconds = trio.current_time() - began
                text = f"{where} run at {', '.join(one.peer for one in found)} now, after {seconds:.1f} s"
                self._emit(SessionEvent("recovered", text, hop.start, hop.end, found[0].peer, seconds))
            del self._lost[peer]
            self.failovers += 1

    # ---- looking and dialling

    async def _call(self, peer: PeerId, message: Message[Any, R]) -> R:
        connection = await self._connection(peer)
        for wait in BUSY_WAITS:
            try:
                return await connection.ref().call(message, deadline=self._pass_timeout)
            except Busy:
                await trio.sleep(wait)
        return await connection.ref().call(message, deadline=self._pass_timeout)

    async def _connection(self, peer: PeerId) -> Connection:
        async with self._dialling.setdefault(peer, trio.Lock()):
            connection = self._connections.get(peer)
            if connection is None or connection.closed:
                if self.closed:
                    raise Closed("the training route is closed")
                connection = await self._swarm.connect(peer, timeout=self._options.connect_timeout)
                self._connections[peer] = connection
            return connection

    async def _hang_up(self, peer: PeerId) -> None:
        connection = self._connections.pop(peer, None)
        if connection is not None:
            with trio.CancelScope(deadline=trio.current_time() + CLOSE_SECONDS, shield=True):
                await connection.aclose()

    async def _find(self, start: int, end: int, until: float, *, opening: bool) -> list[PathHop]:
        """Hosts over blocks [start, end), looked for until the time `until` (trio's clock)."""
        fresh = waiting = False
        while True:
            try:
                views = await self._swarm.views(self.model, self.fingerprint, max_length=1, batch=1, fresh=fresh)
                return self._plan(views, start, end)
            except SwarmError as error:
                if fresh and opening and (trio.current_time() >= until or isinstance(error, UsageError | WrongModel)):
                    raise
                if fresh and trio.current_time() >= until:
                    text = f"no host for blocks {start}:{end} within {self._options.patience:g} s: {error}"
                    raise NoRoute(text, **({"missing": f"{start}:{end}"} | error.details)) from error
                if fresh and not waiting and not opening:
                    waiting = True
                    text = f"waiting for a host for blocks {start}:{end}: {error}"
                    self._emit(SessionEvent("waiting", text, start, end))
            if fresh:
                await trio.sleep(self._options.poll)
            fresh = True

    def _plan(self, views: Sequence[HostView], start: int, end: int) -> list[PathHop]:
        now = trio.current_time()
        views = [replace(view, max_blocks=view.end - view.start) for view in views]  # training takes no KV memory
        try:
            return plan([view for view in views if not self._suspects.avoided(view.peer, now)], start, end)
        except NoRoute:
            return plan([view for view in views if not self._suspects.hopeless(view.peer, now)], start, end)
