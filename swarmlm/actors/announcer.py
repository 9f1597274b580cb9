"""The announcer: says who we are, again and again, until it says that we leave.

It owns the host's own record and its sequence number. Every third of a lease, and whenever the state changes, it signs
a new one and hands it to our own directory, to the neighbours it knows, and to the discovery service.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence

import msgspec
import trio

from swarmlm.actors.core import Actor, Inbox, Message, Ref, handles
from swarmlm.actors.core.message import Ok
from swarmlm.actors.directory import GetHosts
from swarmlm.actors.links import Links
from swarmlm.actors.scout import Scout
from swarmlm.errors import SwarmError
from swarmlm.protocol import (
    Address,
    DirectoryRole,
    GetStatus,
    HostRecord,
    HostRole,
    PeerId,
    Publish,
    SignedRecord,
)
from swarmlm.transport.discovery import Discovery

log = logging.getLogger("swarmlm.announcer")

LEASE_SECONDS = 30.0  # a ghost is believed in for at most this long
RENEWALS = 3  # per lease: two announcements may be lost before a live host vanishes
TELL_SECONDS = 3.0  # a neighbour that takes longer hears of us from others
PUBLISH_SECONDS = 15.0  # a Kademlia put takes 0.2-0.6 s, much longer when members are dead
MAX_TOLD = 16  # neighbours told directly in one round; the rest hear it from them


class AnnouncerRole:
    """Local only: the node that hosts."""


class Announce(Message[AnnouncerRole, Ok], tag="announce", frozen=True):
    """Sign and spread a new record now. The reply comes once our directory and the neighbours were told."""


class Withdraw(Message[AnnouncerRole, Ok], tag="withdraw", frozen=True):
    """Tell everybody that we leave."""


class Announcer(Actor[AnnouncerRole]):
    def __init__(
        self,
        record: HostRecord,
        sign: Callable[[HostRecord], SignedRecord],
        *,
        host: Ref[HostRole],
        directory: Ref[DirectoryRole],
        links: Links,
        scout: Scout,
        discovery: Discovery,
        seeds: Sequence[tuple[PeerId, Address]],
    ) -> None:
        self._record = record
        self._sign = sign
        self._host = host
        self._directory = directory
        self._links = links
        self._scout = scout
        self._discovery = discovery
        self._seeds = tuple(seeds)
        self._left = False
        self._publishing: trio.Nursery | None = None

    async def run(self, inbox: Inbox[AnnouncerRole]) -> None:
        async with trio.open_nursery() as nursery:
            self._publishing = nursery
            nursery.start_soon(self._renew)
            await super().run(inbox)

    async def _renew(self) -> None:
        while True:
            await trio.sleep(LEASE_SECONDS / RENEWALS * random.uniform(0.9, 1.0))
            if self._left:
                return
            try:
                await self._scout.refresh(self._record.model)
                await self._spread(await self._next())
            except SwarmError as error:
                log.warning("could not renew our record: %s", error)

    @handles(Announce)
    async def announce(self, ask: Announce) -> Ok:
        await self._spread(await self._next())
        return Ok()

    @handles(Withdraw)
    async def withdraw(self, ask: Withdraw) -> Ok:
        self._left = True
        record = msgspec.structs.replace(self._stamped(), state="draining")
        await self._tell(Publish(self._sign(record), withdraw=True))
        return Ok()

    def _stamped(self) -> HostRecord:
        """The record with the next sequence number: clock time, so that it rises across restarts too."""
        now = time.time()
        sequence = max(self._record.sequence + 1, int(now * 1000))
        self._record = msgspec.structs.replace(self._record, sequence=sequence, issued=now)
        return self._record

    async def _next(self) -> SignedRecord:
        status = await self._host.call(GetStatus(), deadline=10.0)
        self._record = msgspec.structs.replace(
            self._record,
            state=status.state,
            kv_free=status.kv_free,
            kv_total=status.kv_total,
            queue=status.queue,
            sessions=status.sessions,
            block_ms=status.block_ms,
        )
        return self._sign(self._stamped())

    async def _spread(self, signed: SignedRecord) -> None:
        await self._tell(Publish(signed))
        if self._publishing is not None:
            self._publishing.start_soon(self._publish, signed)

    async def _tell(self, message: Publish) -> None:
        known = (await self._directory.call(GetHosts(self._record.model), deadline=5.0)).records
        await self._directory.call(message, deadline=5.0)
        others = [record for record in known if record.peer != self._record.peer]
        told: dict[PeerId, Sequence[Address]] = {peer: (address,) for peer, address in self._seeds}
        for record in random.sample(others, min(len(others), MAX_TOLD)):
            told[PeerId(record.peer)] = tuple(Address(address) for address in record.addresses)
        async with trio.open_nursery() as nursery:
            for peer, addresses in told.items():
                nursery.start_soon(self._tell_one, peer, addresses, message)

    async def _tell_one(self, peer: PeerId, addresses: Sequence[Address], message: Publish) -> None:
        try:
            await self._links.ask(peer, addresses, message, timeout=TELL_SECONDS)
        except SwarmError as error:
            log.debug("%s was not told: %s", peer, error)

    async def _publish(self, signed: SignedRecord) -> None:
        with trio.move_on_after(PUBLISH_SECONDS):
            try:
                await self._discovery.publish(self._record.model, signed)
            except SwarmError as error:
                log.debug("discovery did not take our record: %s", error)
