"""`Discovery` of transport.discovery on a Kademlia table: hosts leave their signed record, newcomers find the first.

Two keys a host: the model's *provider key* says who serves it, and the host's *value key* holds its signed record.
Only records are stored, only under their own signer's key, and only the highest sequence of each: a node accepts no
other value. `find` asks each host itself, then the peers around its value key; nothing is answered from a cache.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
from libp2p.kad_dht.common import PROTOCOL_ID as KADEMLIA
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message, Record
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import PeerStoreError
from libp2p.records.record import make_signed_put_record
from libp2p.records.validator import NamespacedValidator, Validator
from multiaddr import Multiaddr

from swarmlm.actors.core.groups import unwrapped
from swarmlm.errors import ConfigError, ProtocolError, Unavailable, Unreachable
from swarmlm.protocol import Address, HostRecord, SignedRecord, pack_signed, unpack_record, unpack_signed
from swarmlm.transport.base import peer_of
from swarmlm.transport.libp2p.host import Libp2pTransport
from swarmlm.transport.libp2p.network import DialFailed
from swarmlm.transport.libp2p.walk import CLOSEST, Walker
from swarmlm.transport.records import open_record

log = logging.getLogger(__name__)

NAMESPACE = "swarmlm"
REPLICAS = 10  # peers around a key that keep a copy: half the neighbourhood, so that losing a few loses nothing
HEDGE_SECONDS = 0.3  # a host that has not answered for itself by then is also looked up
FIND_SECONDS = 3.0  # for a whole `find`: two lookups, one of them with a silent peer in the way
JOIN_SECONDS = 5.0  # for a seed peer to be dialled
ANNOUNCE_SECONDS = 20.0  # between announcements to one peer: it drops, silently, all beyond ten in ten seconds
PROVIDER_SECONDS = 900.0  # an announcement that was not repeated for that long; a key has room for 20 providers only
TIDY_SECONDS = 60.0  # between clean-ups of what we store
REFRESH_SECONDS = 300.0  # between lookups of our own neighbourhood


def provider_key(model: str) -> bytes:
    return b"\x12\x20" + hashlib.sha256(f"{NAMESPACE}/model/{model}".encode()).digest()


def value_key(peer: str, model: str) -> str:
    return f"/{NAMESPACE}/{peer}/{hashlib.sha256(model.encode()).hexdigest()[:16]}"


def _read(value: bytes) -> tuple[SignedRecord, HostRecord]:
    """A stored value, its signature and lease checked. Raises `ProtocolError`."""
    signed = unpack_signed(value)
    return signed, open_record(signed, now=time.time())


class _RecordValidator(Validator):  # type: ignore[misc]
    def validate(self, key: str, value: bytes) -> None:
        record = _read(value)[1]
        if key != value_key(record.peer, record.model):
            raise ProtocolError("a record under a key that is not its signer's")

    def select(self, key: str, values: list[bytes]) -> int:
        sequences = [unpack_record(unpack_signed(value).body).sequence for value in values]
        return sequences.index(max(sequences))


class _Table(KadDHT):  # type: ignore[misc]
    """py-libp2p's table: what we store, and the answers we give. Its lookups and its service loop are not used."""

    async def add_peer(self, peer_id: ID, *, skip_server_mode_check: bool = False) -> bool:
        """Only servers belong into a routing table; a peer that merely asks may be a client."""
        try:
            serves = str(KADEMLIA) in self.host.get_peerstore().get_protocols(peer_id)
        except PeerStoreError:
            serves = False
        return serves and bool(await super().add_peer(peer_id, skip_server_mode_check=True))


class Kademlia:
    """Made by `open_kademlia`."""

    def __init__(self, transport: Libp2pTransport, *, server: bool) -> None:
        self._transport = transport
        self._server = server
        self._table = _Table(
            transport.host,
            DHTMode.SERVER if server else DHTMode.CLIENT,
            validator=NamespacedValidator({NAMESPACE: _RecordValidator()}, strict_validation=True),
            validator_changed=True,
            strict_validation=True,
        )
        self._walker = Walker(transport, self._table.routing_table)
        self._announced: dict[tuple[bytes, ID], float] = {}
        if server:
            transport.host.on_identified = self._table.add_peer

    async def bootstrap(self, addresses: Sequence[Address]) -> None:
        """Join through seed peers, and remember them. Raises `Unreachable` if there are some and none answers."""
        seeds: dict[ID, list[Address]] = {}
        for address in addresses:
            try:
                seeds.setdefault(ID.from_string(peer_of(address)), []).append(address)
            except ValueError as error:
                raise ConfigError(f"{address!r} does not end in a peer id") from error
        seeds.pop(self._transport.network.self_id, None)
        for seed, where in seeds.items():
            self._transport.network.learn(seed, where)
        self._walker.seeds.update(seeds)
        reasons: list[str] = []

        async def join(seed: ID) -> None:
            try:
                with trio.fail_after(JOIN_SECONDS):
                    await self._transport.network.dial_peer(seed, seeds[seed])
            except (DialFailed, trio.TooSlowError) as error:
                reasons.append(str(error) or "timed out")

        async with trio.open_nursery() as nursery:
            for seed in seeds:
                nursery.start_soon(join, seed)
        if seeds and len(reasons) == len(seeds):
            raise Unreachable(f"no seed peer answers ({'; '.join(reasons)})")
        await self._refresh()

    async def publish(self, model: str, record: SignedRecord) -> None:
        """Announce that we serve `model` and leave our record. Raises `Unavailable` if nobody stored it."""
        peer = self._transport.peer_id
        own = unpack_record(record.body)
        if own.peer != peer:
            raise ConfigError(f"a node can publish its own record only, not that of {own.peer}")
        stored = [self._server]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce, provider_key(model))
            nursery.start_soon(self._put, value_key(peer, model).encode(), own.sequence, pack_signed(record), stored)
        if not any(stored):
            raise Unavailable("no peer stored our record: the swarm cannot be reached")

    async def find(self, model: str) -> list[SignedRecord]:
        """The newest record of every host that announced `model` and could be asked. At most `FIND_SECONDS`."""
        found: dict[str, tuple[int, SignedRecord]] = {}
        fetching: set[ID] = set()

        def start(providers: Sequence[ID]) -> None:
            for provider in providers:
                if provider not in fetching:
                    fetching.add(provider)
                    nursery.start_soon(self._fetch, provider, model, found)

        def heard(_: ID, answer: Message) -> bool:
            start([ID(entry.id) for entry in answer.providerPeers])
            return len(fetching) >= CLOSEST

        key = provider_key(model)
        with trio.move_on_after(FIND_SECONDS):
            async with trio.open_nursery() as nursery:
                start([info.peer_id for info in self._table.provider_store.get_providers(key)])
                await self._walker.walk(self._walker.question(Message.GET_PROVIDERS, key), heard)
        return [signed for _, signed in found.values()]

    async def _fetch(self, host: ID, model: str, found: dict[str, tuple[int, SignedRecord]]) -> None:
        key = value_key(str(host), model).encode()
        question = self._walker.question(Message.GET_VALUE, key)

        def heard(_: ID, answer: Message) -> bool:
            return answer.HasField("record") and keep(answer.record.value)

        def keep(value: bytes) -> bool:
            try:
                signed, record = _read(value)
            except ProtocolError as error:
                log.debug("no record of %s: %s", host, error)
                return False
            if record.peer == str(host) and record.model == model:
                if record.peer not in found or found[record.peer][0] < record.sequence:
                    found[record.peer] = record.sequence, signed
                return True
            return False

        async def ask_host() -> None:
            answer = None if self._walker.suspected(host) else await self._walker.ask(host, question)
            if answer is not None and heard(host, answer):
                nursery.cancel_scope.cancel()
            asked.set()

        if host == self._transport.network.self_id:
            mine = self._table.value_store.get(key)
            if mine is not None:
                keep(mine.value)
            return
        asked = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_host)
            with trio.move_on_after(HEDGE_SECONDS):
                await asked.wait()
            await self._walker.walk(question, heard)

    async def _announce(self, key: bytes) -> None:
        addresses = [Multiaddr(address) for address in self._transport.addresses]
        me = self._transport.network.self_id
        if self._server:
            self._table.provider_store.add_provider(key, PeerInfo(me, addresses))
        if not addresses:
            return
        near = await self._walker.walk(self._walker.question(Message.GET_PROVIDERS, key), lambda *_: False)
        message = self._walker.question(Message.ADD_PROVIDER, key)
        message.providerPeers.add(id=me.to_bytes(), addrs=[each.to_bytes() for each in addresses])
        now = trio.current_time()
        due = [
            peer
            for peer in near[:REPLICAS]
            if self._announced.get((key, peer), -ANNOUNCE_SECONDS) <= now - ANNOUNCE_SECONDS
        ]

        async def tell(peer: ID) -> None:
            if await self._walker.ask(peer, message) is not None:
                self._announced[key, peer] = now

        async with trio.open_nursery() as nursery:
            for peer in due:
                nursery.start_soon(tell, peer)

    async def _put(self, key: bytes, sequence: int, value: bytes, stored: list[bool]) -> None:
        if self._server:
            private = self._transport.host.get_private_key()
            self._table.value_store.put_record(key, _received(make_signed_put_record(key, value, private)))
        current: set[ID] = set()

        def heard(peer: ID, answer: Message) -> bool:
            try:
                if answer.HasField("record") and _read(answer.record.value)[1].sequence >= sequence:
                    current.add(peer)
                    stored.append(True)
            except ProtocolError:
                pass
            return False

        near = await self._walker.walk(self._walker.question(Message.GET_VALUE, key), heard)
        message = self._walker.question(Message.PUT_VALUE, key)
        message.record.CopyFrom(Record(key=key, value=value))

        async def put(peer: ID) -> None:
            stored.append(await self._walker.ask(peer, message) is not None)

        async with trio.open_nursery() as nursery:
            for peer in near[:REPLICAS]:
                if peer not in current:
                    nursery.start_soon(put, peer)

    async def _refresh(self) -> None:
        me = self._transport.network.self_id.to_bytes()
        await self._walker.walk(self._walker.question(Message.FIND_NODE, me), lambda *_: False)

    async def keep_up(self) -> None:
        """Refresh our neighbourhood and forget what has expired, until cancelled."""
        refreshed = trio.current_time()
        while True:
            await trio.sleep(TIDY_SECONDS)
            self._tidy()
            if trio.current_time() - refreshed >= REFRESH_SECONDS:
                await self._refresh()
                refreshed = trio.current_time()

    def _tidy(self) -> None:
        oldest = time.time() - PROVIDER_SECONDS
        providers: dict[bytes, dict[str, Any]] = self._table.provider_store.providers
        for key in list(providers):
            for peer in [peer for peer, entry in providers[key].items() if entry.timestamp < oldest]:
                del providers[key][peer]
            if not providers[key]:
                del providers[key]
        values = self._table.value_store
        for key in list(values.store):
            try:
                _read(values.store[key][0].value)
            except ProtocolError:
                values.remove(key)


def _received(record: Any) -> Any:
    record.timeReceived = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return record


@asynccontextmanager
async def open_kademlia(transport: Libp2pTransport, *, server: bool) -> AsyncIterator[Kademlia]:
    """The table of a node. A server stores and answers for others; a client only asks."""
    kademlia = Kademlia(transport, server=server)
    with unwrapped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kademlia.keep_up)
            yield kademlia
            nursery.cancel_scope.cancel()
