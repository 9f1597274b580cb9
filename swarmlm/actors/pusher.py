"""Pushing: a step's output goes straight to the host of the next blocks. Used by the batcher and the block host.

A push is a hint that saves a round trip. It is sent only over a link that is up already, and never waited for: where
there is none, the client is told and carries the output itself, while a link is dialled for the steps to come.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable

import trio

from swarmlm.actors.links import Links
from swarmlm.actors.scout import Scout
from swarmlm.errors import SwarmError
from swarmlm.protocol import Address, PeerId, Push

log = logging.getLogger("swarmlm.pusher")

DIAL_SECONDS = 5.0  # a dial and a handshake, through a relay if need be
MAX_DIALS = 4  # at once: who comes after `next_hops` is a client's word
MAX_TRIED = 64  # peers within REDIAL_SECONDS: more hosts follow on none
REDIAL_SECONDS = 10.0  # between tries at a peer that we cannot reach: the client carries for it meanwhile


Pushing = Callable[[PeerId, Push], Awaitable[bool]]  # whether the message is on its way; never waits


async def no_push(peer: PeerId, message: Push) -> bool:
    """For a host that pushes nothing."""
    return False


class Pusher:
    """`model` is whose directory is looked up for addresses. Tasks run in `nursery`."""

    def __init__(self, links: Links, scout: Scout, model: str, nursery: trio.Nursery) -> None:
        self._links = links
        self._scout = scout
        self._model = model
        self._nursery = nursery
        self._tried: dict[PeerId, float] = {}  # when, lately
        self._asked = -math.inf  # when the swarm was asked for a peer that we do not know
        self._dialling = 0

    def warm(self, peer: PeerId) -> None:
        """Make sure, in the background, that there is a link to `peer` if it can be reached."""
        now = trio.current_time()
        if self._links.ready(peer) is not None or self._dialling >= MAX_DIALS:
            return
        self._tried = {tried: at for tried, at in self._tried.items() if now < at + REDIAL_SECONDS}
        if peer not in self._tried and len(self._tried) < MAX_TRIED:
            self._tried[peer] = now
            self._dialling += 1
            self._nursery.start_soon(self._dial, peer)

    async def push(self, peer: PeerId, message: Push) -> bool:
        """Whether `message` is on its way. Does not wait."""
        connection = self._links.ready(peer)
        if connection is None:
            self.warm(peer)
            return False
        try:
            await connection.cast(message, wait=False)
        except SwarmError:
            return False
        return True

    async def _dial(self, peer: PeerId) -> None:
        try:
            records = [record for record in await self._scout.hosts(self._model) if record.peer == peer]
            now = trio.current_time()
            if not records and now >= self._asked + REDIAL_SECONDS:
                self._asked = now
                records = [record for record in await self._scout.refresh(self._model) if record.peer == peer]
            if records:
                addresses = tuple(Address(address) for address in records[0].addresses)
                await self._links.link(peer, addresses, timeout=DIAL_SECONDS)
        except SwarmError as error:
            log.debug("cannot push to %s: %s", peer, error)
        finally:
            self._dialling -= 1
