"""Finding hosts for a span and getting them to where the lost one was. The session decides when; this knows how.

Opening a session and replacing a lost hop are the same act: plan a path over [start, end), open its hops, and if hosts
refuse or cannot be reached, plan again without them. Replacing ends with a replay of the lost hop's journal.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, pairwise

import trio

from swarmlm.errors import BadStep, NoRoute, PoolFull, Refused, SwarmError, UsageError, WrongModel
from swarmlm.protocol import PeerId, SessionId
from swarmlm.routing.base import SessionEvent, SessionOptions, Swarm, Terms
from swarmlm.routing.graph import HostView, PathHop
from swarmlm.routing.hop import Hop, HopFailed, close_hops, open_hop
from swarmlm.routing.journal import Journal
from swarmlm.routing.planner import plan

RETRY_SECONDS = 1.0  # before a failed peer is tried again if nobody else is there; doubles with each failure

log = logging.getLogger("swarmlm.routing")


class Suspects:
    """Which peers failed, when and how often. Times are trio's, in seconds."""

    def __init__(self, ban_seconds: float) -> None:
        self._ban_seconds = ban_seconds
        self._failures: dict[PeerId, tuple[float, int]] = {}

    def note(self, peer: PeerId, now: float) -> None:
        times = self._failures[peer][1] + 1 if self.avoided(peer, now) else 1
        self._failures[peer] = (now, times)

    def avoided(self, peer: PeerId, now: float) -> bool:
        """Failed within `ban_seconds`: others come first. Failures in a row are counted until this is over."""
        return peer in self._failures and now < self._failures[peer][0] + self._wait(peer) + self._ban_seconds

    def hopeless(self, peer: PeerId, now: float) -> bool:
        """Failed a moment ago: not to be tried even if nobody else is there."""
        return peer in self._failures and now < self._failures[peer][0] + self._wait(peer)

    def _wait(self, peer: PeerId) -> float:
        return min(self._ban_seconds, RETRY_SECONDS * 2.0 ** (self._failures[peer][1] - 1))


class Recruiter:
    """One session's way to hosts. It remembers who failed, and sessions left behind on hosts that could not be told."""

    def __init__(
        self, swarm: Swarm, terms: Terms, options: SessionOptions, emit: Callable[[SessionEvent], None]
    ) -> None:
        self.terms = terms
        self._swarm = swarm
        self._options = options
        self._emit = emit
        self._suspects = Suspects(options.ban_seconds)
        self._orphans: defaultdict[PeerId, list[SessionId]] = defaultdict(list)
        self._epochs = count()

    def next_epoch(self) -> int:
        return next(self._epochs)

    def blame(self, peer: PeerId, error: SwarmError) -> None:
        self._suspects.note(peer, trio.current_time())
        self._swarm.report_failure(peer, error)

    async def release(self, hops: Sequence[Hop]) -> None:
        """Close hops; what their hosts did not hear of is told when we meet them again. Bounded, never raises."""
        for hop in await close_hops(hops):
            self._orphans[hop.peer].append(hop.session)

    async def recruit(self, start: int, end: int, *, until: float, opening: bool = False) -> list[Hop]:
        """Open hops over blocks [start, end), looking again until the time `until` (trio's clock).

        Opening a session, a refusal that a fresh look-up does not mend is raised at once (`PoolFull`, `ContextTooLong`,
        `WrongModel`), and in the end `NoRoute` or what the last look-up raised. In a failover everything is waited for,
        and the end is `NoRoute`.
        """
        fresh = waiting = False
        while True:
            try:
                return await self._try(start, end, fresh=fresh)
            except SwarmError as error:
                final = opening and fresh and isinstance(error, UsageError | PoolFull | WrongModel)
                late = fresh and trio.current_time() >= until
                if final or (late and opening):
                    raise
                if late:
                    text = f"no host for blocks {start}:{end} within {self._options.patience:g} s: {error}"
                    raise NoRoute(text, **({"missing": f"{start}:{end}"} | error.details)) from error
                if fresh and not waiting and not opening:
                    waiting = True
                    text = f"waiting for a host for blocks {start}:{end}: {error}"
                    self._emit(SessionEvent("waiting", text, start, end))
            if fresh:
                await trio.sleep(self._options.poll)
            fresh = True

    async def _try(self, start: int, end: int, *, fresh: bool) -> list[Hop]:
        """One look-up, and plans over what it found until one can be opened or none is left."""
        terms = self.terms
        views = await self._swarm.views(
            terms.model, terms.fingerprint, max_length=terms.max_length, batch=terms.batch, fresh=fresh
        )
        room: dict[PeerId, int] = {}
        refusals: dict[PeerId, SwarmError] = {}
        opened: dict[PathHop, Hop] = {}
        try:
            while True:
                try:
                    path = self._plan(views, room, refusals, start, end)
                except NoRoute as error:
                    raise _reason(error, refusals) from error
                await self.release([opened.pop(place) for place in list(opened) if place not in path])
                failures = await self._open(path, opened)
                if not failures:
                    return [opened[place] for place in path]
                for place, refusal in failures:
                    refusals[place.peer] = refusal
                    room[place.peer] = _room_left(place, refusal, path, opened)
        except BaseException:
            await self.release(list(opened.values()))
            raise

    def _plan(
        self,
        views: Sequence[HostView],
        room: dict[PeerId, int],
        refusals: dict[PeerId, SwarmError],
        start: int,
        end: int,
    ) -> list[PathHop]:
        now = trio.current_time()
        known = [
            replace(view, max_blocks=min(view.max_blocks, room.get(view.peer, view.max_blocks)))
            for view in views
            if isinstance(refusals.get(view.peer), PoolFull | None)
        ]
        try:
            return plan([view for view in known if not self._suspects.avoided(view.peer, now)], start, end)
        except NoRoute:
            known = [view for view in known if not self._suspects.hopeless(view.peer, now)]
            try:
                return plan(known, start, end)
            except NoRoute as error:
                if "full" not in error.details or refusals:
                    raise
                # What they said of their memory may be old, and their own refusal names its numbers: ask them.
                return plan([replace(view, max_blocks=view.end - view.start) for view in known], start, end)

    async def _open(self, path: Sequence[PathHop], opened: dict[PathHop, Hop]) -> list[tuple[PathHop, SwarmError]]:
        """Open at once what of `path` is not in `opened` yet; returns the failures."""
        failures: list[tuple[PathHop, SwarmError]] = []

        following = {place: after.peer for place, after in pairwise(path)}

        async def open_one(place: PathHop) -> None:
            orphans = self._orphans.pop(place.peer, [])
            epoch = self.next_epoch()
            try:
                opened[place] = await open_hop(
                    self._swarm, self.terms, place, epoch, orphans, self._options, following.get(place, "")
                )
            except SwarmError as error:
                failures.append((place, error))
                if not isinstance(error, Refused | UsageError):
                    self.blame(place.peer, error)
            finally:
                self._orphans[place.peer].extend(orphans)

        async with trio.open_nursery() as nursery:
            for place in path:
                if place not in opened:
                    nursery.start_soon(open_one, place)
        return failures


async def replay(hops: Sequence[Hop], journal: Journal, *, options: SessionOptions) -> None:
    """Run `journal` through `hops`, filling their caches and the journals of all but the first, which takes `journal`.

    Raises `HopFailed`, its hop marked.
    """
    for position, rows in journal.chunks(options.chunk):
        hidden = rows
        for hop in hops:
            if hop is not hops[0]:
                hop.journal.append(hidden, journal.padding)
            try:
                hidden = await hop.step(hidden, position, padding=journal.padding, timeout=options.step_timeout)
            except (UsageError, BadStep) as error:  # what was good for the lost host is no fault of the caller
                hop.failed = HopFailed(error)
                raise hop.failed from error
            except HopFailed as failure:
                hop.failed = failure
                raise
    hops[0].journal = journal


def _room_left(place: PathHop, refusal: SwarmError, path: Sequence[PathHop], opened: dict[PathHop, Hop]) -> int:
    """How many blocks a host that refused `place` may be planned with in the same look-up. Always fewer than before."""
    needed, free = refusal.details.get("needed"), refusal.details.get("free")
    if not isinstance(refusal, PoolFull) or not isinstance(needed, int) or not isinstance(free, int) or needed <= 0:
        return 0
    used, planned = Counter[PeerId](), Counter[PeerId]()
    for one in path:
        planned[one.peer] += one.blocks
        used[one.peer] += one.blocks if one in opened else 0
    return min(planned[place.peer] - 1, used[place.peer] + place.blocks * max(0, free) // needed)


def _reason(error: NoRoute, refusals: dict[PeerId, SwarmError]) -> SwarmError:
    """The error a user can act on: what hosts refused explains more than that nobody is left."""
    for kind in (UsageError, PoolFull):
        for refusal in refusals.values():
            if isinstance(refusal, kind):
                return refusal
    if not refusals:
        return error
    said = "; ".join(f"{peer}: {refusal}" for peer, refusal in refusals.items())
    wrong = all(isinstance(refusal, WrongModel) for refusal in refusals.values())
    return (WrongModel if wrong else NoRoute)(f"{error} ({said})", **error.details)
