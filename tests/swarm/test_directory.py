"""The directory believes signed, fresh, newer records, for one lease."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import msgspec
import pytest
import trio
import trio.testing

from swarmlm.actors.core import Ref, open_supervisor
from swarmlm.actors.directory import Directory, GetHosts, Merge, ReportFailure
from swarmlm.errors import ProtocolError
from swarmlm.protocol import (
    DirectoryRole,
    GetDirectory,
    HostRecord,
    LeasedRecord,
    Publish,
    SignedRecord,
    pack_record,
)
from swarmlm.transport.identity import Identity
from swarmlm.transport.records import sign_record

ONE = Identity.from_seed(b"1" * 32)
TWO = Identity.from_seed(b"2" * 32)
LEASE = 30.0


def record(identity: Identity, sequence: int = 1, **changes: object) -> HostRecord:
    made = HostRecord(
        peer=identity.peer_id,
        addresses=("/memory/1",),
        model="m",
        fingerprint="f",
        blocks=4,
        start=0,
        end=2,
        sequence=sequence,
        issued=time.time(),
        lease=LEASE,
    )
    return msgspec.structs.replace(made, **changes)


def signed(identity: Identity, sequence: int = 1, **changes: object) -> SignedRecord:
    return sign_record(record(identity, sequence, **changes), identity)


@pytest.fixture
async def directory() -> AsyncIterator[Ref[DirectoryRole]]:
    async with open_supervisor() as supervisor:
        yield await supervisor.start(Directory, name="directory")


async def sequences(directory: Ref[DirectoryRole]) -> dict[str, int]:
    known = await directory.call(GetHosts("m"), deadline=1)
    return {one.peer: one.sequence for one in known.records}


async def test_a_higher_sequence_replaces_and_a_lower_one_does_not(directory: Ref[DirectoryRole]) -> None:
    for sequence in (1, 3, 2):
        await directory.call(Publish(signed(ONE, sequence)), deadline=1)
    assert await sequences(directory) == {ONE.peer_id: 3}


async def test_a_record_vanishes_with_its_lease_and_hearsay_does_not_lengthen_it(
    directory: Ref[DirectoryRole], autojump_clock: trio.testing.MockClock
) -> None:
    first = signed(ONE)
    await directory.call(Publish(first), deadline=1)
    await trio.sleep(LEASE - 1)
    await directory.call(Merge((LeasedRecord(first, LEASE),)), deadline=1)
    assert await sequences(directory) == {ONE.peer_id: 1}
    await trio.sleep(1.5)
    assert await sequences(directory) == {}


async def test_a_listing_hands_over_what_is_left_of_each_lease(
    directory: Ref[DirectoryRole], autojump_clock: trio.testing.MockClock
) -> None:
    await directory.call(Publish(signed(ONE)), deadline=1)
    await trio.sleep(10)
    listing = await directory.call(GetDirectory("m"), deadline=1)
    assert [round(leased.seconds_left) for leased in listing.records] == [20]
    assert (await directory.call(GetDirectory("other"), deadline=1)).records == ()


async def test_a_forged_record_is_refused(directory: Ref[DirectoryRole]) -> None:
    forged = SignedRecord(pack_record(record(ONE)), TWO.sign(pack_record(record(ONE))))
    with pytest.raises(ProtocolError, match="signature"):
        await directory.call(Publish(forged), deadline=1)
    await directory.call(Merge((LeasedRecord(forged, 30.0), LeasedRecord(signed(TWO), 30.0))), deadline=1)
    assert await sequences(directory) == {TWO.peer_id: 1}


async def test_an_expired_or_future_record_is_refused(directory: Ref[DirectoryRole]) -> None:
    for offset in (-1000.0, 1000.0):
        with pytest.raises(ProtocolError, match=r"expired|future"):
            await directory.call(Publish(signed(ONE, issued=time.time() + offset)), deadline=1)
    assert await sequences(directory) == {}


async def test_a_failed_peer_is_forgotten_until_it_renews(directory: Ref[DirectoryRole]) -> None:
    await directory.call(Publish(signed(ONE, 5)), deadline=1)
    await directory.call(ReportFailure(ONE.peer_id, "m"), deadline=1)
    assert await sequences(directory) == {}
    await directory.call(Merge((LeasedRecord(signed(ONE, 5), 30.0),)), deadline=1)
    assert await sequences(directory) == {}
    await directory.call(Publish(signed(ONE, 6)), deadline=1)
    assert await sequences(directory) == {ONE.peer_id: 6}


async def test_only_a_draining_record_withdraws_its_host(directory: Ref[DirectoryRole]) -> None:
    await directory.call(Publish(signed(ONE, 5)), deadline=1)
    with pytest.raises(ProtocolError, match="draining"):
        await directory.call(Publish(signed(ONE, 5), withdraw=True), deadline=1)
    await directory.call(Publish(signed(ONE, 6, state="draining"), withdraw=True), deadline=1)
    assert await sequences(directory) == {}
    await directory.call(Merge((LeasedRecord(signed(ONE, 5), 30.0),)), deadline=1)
    assert await sequences(directory) == {}
