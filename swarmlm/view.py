"""One model's part of the swarm, as a client's session needs it: candidates measured now, and links to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmlm.actors.core import Connection
from swarmlm.errors import SwarmError, WrongModel
from swarmlm.protocol import Address, PeerId
from swarmlm.routing.graph import HostView

if TYPE_CHECKING:
    from swarmlm.node import Node


class SwarmView:
    """One model's hosts as `routing.session` wants to see them: measured candidates, and links to them."""

    def __init__(self, node: Node, model: str) -> None:
        self._node = node
        self._model = model
        self._addresses: dict[PeerId, tuple[Address, ...]] = {}
        self._sequences: dict[PeerId, int] = {}
        self._failed: dict[PeerId, int] = {}  # sequence number of the record that turned out wrong

    async def views(self, model: str, fingerprint: str, *, max_length: int, batch: int, fresh: bool) -> list[HostView]:
        scout = self._node.scout
        records = () if fresh else await scout.hosts(model)
        if not records:
            records = await scout.refresh(model)
        if records and not any(record.fingerprint == fingerprint for record in records):
            raise WrongModel(f"the hosts found serve another {model} than this one (their configuration differs)")
        ours = [
            record
            for record in records
            if record.fingerprint == fingerprint
            and record.state == "online"
            and record.sequence > self._failed.get(PeerId(record.peer), -1)
        ]
        self._sequences = {PeerId(record.peer): record.sequence for record in ours}
        probed = await scout.probe(ours)
        views = []
        for record in ours:
            peer = PeerId(record.peer)
            if peer not in probed or probed[peer][0].state != "online":
                continue
            status, rtt_ms = probed[peer]
            block_bytes = max(1, status.kv_token_bytes * max_length * batch)
            self._addresses[peer] = tuple(Address(address) for address in record.addresses)
            views.append(
                HostView(
                    peer=peer,
                    start=record.start,
                    end=record.end,
                    rtt_ms=rtt_ms,
                    queue_ms=status.queue * status.block_ms * (record.end - record.start),
                    block_ms=status.block_ms,
                    max_blocks=status.kv_free // block_bytes,
                    kv_free=status.kv_free,
                    kv_block_bytes=block_bytes,
                )
            )
        return views

    async def connect(self, peer: PeerId, *, timeout: float) -> Connection:
        return await self._node.links.connect(peer, self._addresses.get(peer, ()), timeout=timeout)

    def report_failure(self, peer: PeerId, error: SwarmError) -> None:
        """Plan nothing with `peer` before it renews its record; the directory is told too."""
        self._failed[peer] = self._sequences.get(peer, -1)
        self._node.nursery.start_soon(self._node.scout.report_failure, peer, self._model)
