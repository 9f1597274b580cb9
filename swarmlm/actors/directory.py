"""The directory: what this node believes about the swarm. One writer, many askers.

It holds verified records only, each under a lease. A record is replaced by a higher sequence number of the same peer
and vanishes when its lease ends, is withdrawn, or is reported dead and not renewed. It does no input or output: the
scout (`actors/scout.py`) fetches, the announcer (`actors/announcer.py`) tells others.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import trio

from swarmlm.actors.core import Actor, Message, handles
from swarmlm.actors.core.message import Body, Ok
from swarmlm.errors import ProtocolError
from swarmlm.protocol import (
    DirectoryRole,
    GetDirectory,
    HostRecord,
    LeasedRecord,
    Listing,
    PeerId,
    Publish,
    SignedRecord,
)
from swarmlm.transport.records import open_record

log = logging.getLogger("swarmlm.directory")

MAX_HOSTS = 20_000  # records of one model; a flood of made-up identities must not fill our memory
MAX_MODELS = 256  # models one directory follows


class Known(Body, tag="known", frozen=True):
    records: tuple[HostRecord, ...]


class GetHosts(Message[DirectoryRole, Known], tag="get_hosts", frozen=True):
    """The live records of one model, verified, by peer id. Local only."""

    model: str


class Merge(Message[DirectoryRole, Ok], tag="merge", frozen=True):
    """Records that somebody else handed us. Each is verified; bad ones are dropped and counted. Local only."""

    records: tuple[LeasedRecord, ...]


class ReportFailure(Message[DirectoryRole, Ok], tag="report_failure", frozen=True):
    """A peer did not answer: forget its record until it renews it. Local only."""

    peer: str
    model: str


@dataclass
class _Entry:
    record: HostRecord
    signed: SignedRecord
    expires: float  # trio time


class Directory(Actor[DirectoryRole]):
    mailbox_size = 1024

    def __init__(self) -> None:
        self._models: dict[str, dict[PeerId, _Entry]] = {}
        self._gone: dict[tuple[str, PeerId], int] = {}  # sequence at which a peer left or failed
        self.refused = 0  # records dropped as forged, old, oversized or expired

    @handles(GetHosts)
    async def hosts(self, ask: GetHosts) -> Known:
        return Known(tuple(entry.record for _, entry in sorted(self._live(ask.model).items())))

    @handles(GetDirectory)
    async def listing(self, ask: GetDirectory) -> Listing:
        now = trio.current_time()
        return Listing(
            tuple(LeasedRecord(entry.signed, max(0.0, entry.expires - now)) for entry in self._live(ask.model).values())
        )

    @handles(Publish)
    async def publish(self, ask: Publish) -> Ok:
        record = self._verified(ask.record)
        if ask.withdraw:
            if record.state != "draining":  # the flag is not signed, the state is: nobody else can withdraw a host
                raise ProtocolError("only a draining host's own record withdraws it")
            self._forget(record.model, PeerId(record.peer), record.sequence)
        else:
            self._store(record, ask.record, record.lease)
        return Ok()

    @handles(Merge)
    async def merge(self, ask: Merge) -> Ok:
        for leased in ask.records:
            try:
                record = self._verified(leased.record)
            except ProtocolError as error:
                log.debug("dropped a record: %s", error)
                continue
            self._store(record, leased.record, min(leased.seconds_left, record.lease))
        return Ok()

    @handles(ReportFailure)
    async def report_failure(self, ask: ReportFailure) -> Ok:
        entry = self._models.get(ask.model, {}).get(PeerId(ask.peer))
        if entry is not None:
            self._forget(ask.model, PeerId(ask.peer), entry.record.sequence)
        return Ok()

    def _verified(self, signed: SignedRecord) -> HostRecord:
        try:
            return open_record(signed, now=time.time())
        except ProtocolError:
            self.refused += 1
            raise

    def _store(self, record: HostRecord, signed: SignedRecord, lease: float) -> None:
        peer = PeerId(record.peer)
        if record.sequence <= self._gone.get((record.model, peer), -1):
            return
        hosts = self._models.setdefault(record.model, {})
        held = hosts.get(peer)
        if held is not None and held.record.sequence > record.sequence:
            return
        if held is not None and held.record.sequence == record.sequence:
            return  # the same words again do not lengthen a lease: only its owner can, with a new sequence number
        expires = trio.current_time() + lease
        if held is None and (len(hosts) >= MAX_HOSTS or len(self._models) > MAX_MODELS):
            self.refused += 1
            return
        hosts[peer] = _Entry(record, signed, expires)
        self._gone.pop((record.model, peer), None)

    def _forget(self, model: str, peer: PeerId, sequence: int) -> None:
        entry = self._models.get(model, {}).get(peer)
        if entry is not None and entry.record.sequence <= sequence:
            del self._models[model][peer]
        if len(self._gone) > MAX_HOSTS:
            self._gone.clear()
        self._gone[model, peer] = max(sequence, self._gone.get((model, peer), -1))

    def _live(self, model: str) -> dict[PeerId, _Entry]:
        hosts = self._models.get(model, {})
        now = trio.current_time()
        for peer in [peer for peer, entry in hosts.items() if entry.expires <= now]:
            del hosts[peer]
        return hosts
