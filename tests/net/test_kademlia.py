"""Discovery through a Kademlia table of real processes on loopback."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from swarmlm.errors import ConfigError, Unavailable, Unreachable
from swarmlm.protocol import Address, PeerId, SignedRecord, pack_signed, unpack_record
from swarmlm.transport.libp2p import Kademlia, open_kademlia, open_libp2p
from swarmlm.transport.libp2p.kademlia import value_key
from tests.net.libp2p_peers import MODEL, PeerProcess, identity, peer_process, record_of

MEMBERS = 5


@asynccontextmanager
async def swarm(seed: int) -> AsyncIterator[list[PeerProcess]]:
    """A seed peer and members that joined through it."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(peer_process(seed, kademlia=True))
        members = [first]
        for number in range(1, MEMBERS):
            members.append(
                await stack.enter_async_context(
                    peer_process(seed + number, kademlia=True, peers=[str(each) for each in first.addresses])
                )
            )
        yield members


@asynccontextmanager
async def client(seed: int, seeds: Sequence[Address]) -> AsyncIterator[Kademlia]:
    async with open_libp2p(identity(seed), listen=[]) as transport, open_kademlia(transport, server=False) as kademlia:
        await kademlia.bootstrap(seeds)
        yield kademlia


def sequences(found: Sequence[SignedRecord]) -> dict[str, int]:
    records = [unpack_record(signed.body) for signed in found]
    return {record.peer: record.sequence for record in records}


async def timed_find(kademlia: Kademlia, label: str) -> tuple[dict[str, int], float]:
    started = time.perf_counter()
    found = sequences(await kademlia.find(MODEL))
    seconds = time.perf_counter() - started
    print(f"find, {label}: {len(found)} records in {seconds * 1e3:.0f} ms")
    return found, seconds


async def test_published_records_are_found_and_updates_seen() -> None:
    async with swarm(300) as members:
        for member in members[1:4]:
            started = time.perf_counter()
            await member.tell(sequence=1)
            print(f"publish: {(time.perf_counter() - started) * 1e3:.0f} ms")
        async with client(390, members[0].addresses) as kademlia:
            found, _ = await timed_find(kademlia, "cold")
            assert found == {member.peer_id: 1 for member in members[1:4]}
            await members[2].tell(sequence=2)
            found, _ = await timed_find(kademlia, "after an update")
            assert found[members[2].peer_id] == 2
            assert await kademlia.find("another model") == []
            for sequence in range(3, 15):  # more often than a peer accepts announcements
                await members[3].tell(sequence=sequence)
            found, _ = await timed_find(kademlia, "after twelve more")
            assert found[members[3].peer_id] == 14


async def test_a_silent_and_a_dead_member_cost_little() -> None:
    async with swarm(310) as members:
        for member in members[1:]:
            await member.tell(sequence=1)
        async with client(391, members[0].addresses) as kademlia:
            assert len(await kademlia.find(MODEL)) == MEMBERS - 1
            members[1].stop()
            found, seconds = await timed_find(kademlia, "one member stopped")
            assert {member.peer_id for member in members[2:]} <= set(found)
            assert seconds < 4.0
            _, seconds = await timed_find(kademlia, "again")
            await members[2].kill()
            found, seconds = await timed_find(kademlia, "and one killed")
            assert {member.peer_id for member in members[3:]} <= set(found)
            assert seconds < 4.0
        async with client(392, members[0].addresses) as newcomer:
            found, seconds = await timed_find(newcomer, "by a newcomer")
            assert {member.peer_id for member in members[3:]} <= set(found)
            assert seconds < 4.0


async def test_the_record_of_a_host_behind_a_wall_is_found() -> None:
    async with swarm(320) as members:
        async with open_libp2p(identity(325)) as transport, open_kademlia(transport, server=True) as host:
            await host.bootstrap(members[0].addresses)
            await host.publish(MODEL, record_of(identity(325), transport.addresses, 4))
        async with client(393, members[0].addresses) as kademlia:
            found, seconds = await timed_find(kademlia, "of a host that has gone")
            assert found == {identity(325).peer_id: 4}
            assert seconds < 4.0


async def test_forged_and_misplaced_records_are_not_stored() -> None:
    async with swarm(330) as members, client(394, members[0].addresses) as kademlia:
        honest = record_of(identity(331), members[1].addresses, 5)
        forged = SignedRecord(body=honest.body, signature=bytes(64))
        with pytest.raises(ConfigError, match="own record"):
            await kademlia.publish(MODEL, honest)
        for key, value in (
            (f"/swarmlm/{members[1].peer_id}/0123456789abcdef", pack_signed(honest)),
            ("/pk/anything", b"free storage"),
            ("no namespace", b"free storage"),
        ):
            stored: list[bool] = []
            await kademlia._put(key.encode(), 1, value, stored)
            assert not any(stored), key
        await members[1].tell(sequence=6)
        stored = []
        own_key = value_key(members[1].peer_id, MODEL).encode()
        for old in (forged, honest):
            await kademlia._put(own_key, 100, pack_signed(old), stored)
        assert not any(stored), "a forged or an older record replaces nothing"
        found, _ = await timed_find(kademlia, "after forgeries")
        assert found == {members[1].peer_id: 6}


async def test_joining_and_publishing_alone() -> None:
    nobody = Address(f"/ip4/127.0.0.1/tcp/1/p2p/{identity(349).peer_id}")
    async with open_libp2p(identity(340)) as transport, open_kademlia(transport, server=True) as first:
        await first.bootstrap([])
        await first.bootstrap(transport.addresses)
        await first.publish(MODEL, record_of(identity(340), transport.addresses, 1))
        assert sequences(await first.find(MODEL)) == {transport.peer_id: 1}
        with pytest.raises(Unreachable, match="refused"):
            await first.bootstrap([nobody])
        with pytest.raises(ConfigError):
            await first.bootstrap([Address("/ip4/127.0.0.1/tcp/1")])
    async with open_libp2p(identity(341), listen=[]) as transport, open_kademlia(transport, server=False) as lonely:
        assert await lonely.find(MODEL) == []
        with pytest.raises(Unavailable):
            await lonely.publish(MODEL, record_of(identity(341), [], 1))


async def test_clients_do_not_enter_the_table() -> None:
    async with open_libp2p(identity(350)) as transport, open_kademlia(transport, server=True) as server:
        async with client(351, transport.addresses) as kademlia:
            await kademlia.find(MODEL)
            with trio.move_on_after(0.3):
                await trio.sleep_forever()
            assert server._table.routing_table.size() == 0
        async with open_libp2p(identity(352)) as other, open_kademlia(other, server=True) as member:
            await member.bootstrap(transport.addresses)
            with trio.fail_after(5):
                while server._table.routing_table.size() == 0:
                    await trio.sleep(0.01)
            assert PeerId(str(server._table.routing_table.get_peer_ids()[0])) == other.peer_id
