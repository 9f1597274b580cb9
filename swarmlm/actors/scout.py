"""The scout: keeps a directory fresh by asking peers for theirs, and the discovery service for a first one.

Asking a host costs one round trip for the whole directory; Kademlia costs many, so it is asked only when no peer that
we know answers, or when what they know leaves a block without a host.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

import trio

from swarmlm.actors.core import Ref
from swarmlm.actors.directory import GetHosts, Merge, ReportFailure
from swarmlm.actors.links import Links
from swarmlm.errors import ProtocolError, SwarmError, Unreachable
from swarmlm.protocol import (
    Address,
    DirectoryRole,
    GetDirectory,
    GetStatus,
    HostRecord,
    HostStatus,
    LeasedRecord,
    PeerId,
    unpack_record,
)
from swarmlm.transport.base import peer_of
from swarmlm.transport.discovery import Discovery

log = logging.getLogger("swarmlm.scout")

ASK_SECONDS = 5.0  # a dial (up to a second on a loaded machine) and one round trip
GRACE_SECONDS = 0.5  # once somebody answered, the slower ones have this long
FIND_SECONDS = 5.0  # a cold Kademlia look-up takes 0.3-2 s; more only when members are dead
STATUS_SECONDS = 2.0  # a host that cannot tell its load within this is no good next hop
MAX_ASKED = 8  # known hosts asked in one round: each knows the whole directory
MAX_PROBED = 64  # hosts whose load is asked before planning a route


class Scout:
    def __init__(
        self, directory: Ref[DirectoryRole], links: Links, discovery: Discovery, seeds: Sequence[Address], *, me: PeerId
    ) -> None:
        self._directory = directory
        self._links = links
        self._discovery = discovery
        self._seeds = {peer_of(seed): seed for seed in seeds}
        self._me = me
        self._rtt_ms: dict[PeerId, float] = {}

    async def hosts(self, model: str) -> tuple[HostRecord, ...]:
        """What we believe now, without asking anybody."""
        return (await self._directory.call(GetHosts(model), deadline=5.0)).records

    async def report_failure(self, peer: PeerId, model: str) -> None:
        """Believe nothing of `peer` until it renews its record."""
        await self._directory.call(ReportFailure(peer, model), deadline=5.0)

    async def refresh(self, model: str) -> tuple[HostRecord, ...]:
        """Ask seeds and known hosts for their directory; then, if blocks are still missing, the discovery service.

        Raises `Unreachable` when there are seeds, none answers, and nothing else is known.
        """
        known = await self.hosts(model)
        targets: dict[PeerId, Sequence[Address]] = {
            PeerId(record.peer): tuple(Address(a) for a in record.addresses)
            for record in random.sample(known, min(len(known), MAX_ASKED))
        }
        for peer, address in self._seeds.items():
            targets.setdefault(peer, (address,))
        targets.pop(self._me, None)
        failures = await self._ask_all(model, targets)
        found = await self.hosts(model)
        if not _covers(found):
            await self._look_up(model)
            found = await self.hosts(model)
        if not found and self._seeds and len(failures) == len(targets) and targets:
            reasons = "; ".join(str(error) for error in failures.values())
            raise Unreachable(f"none of the given peers could be reached: {reasons}")
        return found

    async def _ask_all(self, model: str, targets: dict[PeerId, Sequence[Address]]) -> dict[PeerId, SwarmError]:
        failures: dict[PeerId, SwarmError] = {}
        if not targets:
            return failures
        answered = trio.Event()
        async with trio.open_nursery() as nursery:

            async def ask(peer: PeerId, addresses: Sequence[Address]) -> None:
                try:
                    listing = await self._links.ask(peer, addresses, GetDirectory(model), timeout=ASK_SECONDS)
                    await self._directory.call(Merge(listing.records), deadline=5.0)
                    answered.set()
                except SwarmError as error:
                    failures[peer] = error
                    await self.report_failure(peer, model)
                if len(failures) == len(targets):
                    answered.set()

            async def stop_early() -> None:
                await answered.wait()
                await trio.sleep(GRACE_SECONDS)
                nursery.cancel_scope.cancel()

            async with trio.open_nursery() as asking:
                nursery.start_soon(stop_early)
                for peer, addresses in targets.items():
                    asking.start_soon(ask, peer, addresses)
            nursery.cancel_scope.cancel()
        return failures

    async def _look_up(self, model: str) -> None:
        with trio.move_on_after(FIND_SECONDS):
            try:
                signed = await self._discovery.find(model)
            except SwarmError as error:
                log.debug("discovery of %s failed: %s", model, error)
                return
            leased = []
            for one in signed:
                try:
                    lease = unpack_record(one.body).lease
                except ProtocolError:
                    continue
                leased.append(LeasedRecord(one, lease))
            await self._directory.call(Merge(tuple(leased)), deadline=5.0)

    async def probe(self, records: Sequence[HostRecord]) -> dict[PeerId, tuple[HostStatus, float]]:
        """Load and round trip (ms) of each host that answers in time; the others are reported to the directory."""
        found: dict[PeerId, tuple[HostStatus, float]] = {}

        async def ask(record: HostRecord) -> None:
            peer = PeerId(record.peer)
            addresses = tuple(Address(a) for a in record.addresses)
            try:
                await self._links.link(
                    peer, addresses, timeout=ASK_SECONDS
                )  # so that the dial is not in the round trip
                started = trio.current_time()
                status = await self._links.ask(peer, addresses, GetStatus(), timeout=STATUS_SECONDS)
            except SwarmError as error:
                log.debug("no status from %s: %s", peer, error)
                await self.report_failure(peer, record.model)
                return
            rtt = (trio.current_time() - started) * 1e3
            self._rtt_ms[peer] = min(rtt, self._rtt_ms.get(peer, rtt) * 1.2)
            found[peer] = (status, self._rtt_ms[peer])

        async with trio.open_nursery() as nursery:
            for record in records[:MAX_PROBED]:
                nursery.start_soon(ask, record)
        return found


def _covers(records: Sequence[HostRecord]) -> bool:
    if not records:
        return False
    held = {block for record in records for block in range(record.start, record.end)}
    return len(held) == records[0].blocks
