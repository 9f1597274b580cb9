"""The node: one member of a swarm, composed of a transport, a directory and, if it hosts, a span with its actors.

    async with swarmlm.open_node(peers=PEERS) as node:            # join; no peers: a new swarm
        await node.host("smollm2", blocks=range(0, 12))           # returns when ready
        async with node.session("smollm2") as session:
            async for text in session.generate("Hello"):
                print(text, end="")

Nothing but the cli, `portal`, `aio`, `auto` and `bench` imports this module.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from swarmlm.actors.core import Ref, Supervisor, open_supervisor
from swarmlm.actors.core.groups import unwrapped
from swarmlm.actors.directory import Directory
from swarmlm.actors.links import Links
from swarmlm.actors.scout import Scout
from swarmlm.config import parse_codec
from swarmlm.errors import ConfigError, SwarmError, Unreachable, UsageError
from swarmlm.protocol import (
    Address,
    DirectoryRole,
    GetDirectory,
    PeerId,
    Publish,
    State,
)
from swarmlm.transport.base import Transport, own_address, peer_of
from swarmlm.transport.discovery import Discovery, NoDiscovery
from swarmlm.transport.identity import Identity

if TYPE_CHECKING:
    from swarmlm.hosting import HostHandle, Hosting
    from swarmlm.models.source import Source
    from swarmlm.session import NodeSession

log = logging.getLogger("swarmlm.node")

MEET_SECONDS = 6.0  # a host started in the same moment is still importing
MEET_RETRY = 0.3  # seconds between two tries

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HostRow:
    peer: str
    start: int
    end: int
    state: State
    kv_free: int
    kv_total: int
    queue: int
    sessions: int
    block_ms: float
    rtt_ms: float | None
    dtype: str
    addresses: tuple[str, ...]
    quant: str = "none"


@dataclass(frozen=True)
class SwarmStatus:
    """`coverage` is (start, end, replicas) from block 0 to the last; `holes` are the spans that nobody serves."""

    model: str
    blocks: int
    hosts: list[HostRow]
    coverage: list[tuple[int, int, int]]
    holes: list[tuple[int, int]]


class Node:
    """Made by `open_node`. Safe for any number of tasks of its trio loop."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        discovery: Discovery,
        supervisor: Supervisor,
        directory: Ref[DirectoryRole],
        links: Links,
        seeds: Sequence[Address],
        nursery: trio.Nursery,
        announced: Sequence[Address] = (),
    ) -> None:
        self.transport = transport
        self._announced = tuple(announced)
        self.identity = identity
        self.discovery = discovery
        self.supervisor = supervisor
        self.directory = directory
        self.seeds = tuple(seeds)
        self._hosting: Hosting | None = None
        self._sources: dict[str, Source] = {}
        self._clients: dict[tuple[str, str | None], tuple[Any, Any]] = {}
        self.links = links
        self.nursery = nursery
        self.scout = Scout(directory, links, discovery, seeds, me=transport.peer_id)

    @property
    def peer_id(self) -> PeerId:
        return self.transport.peer_id

    @property
    def addresses(self) -> list[str]:
        """Multiaddrs that others can pass as `peers`: those announced, else where the node listens."""
        return list(self._announced or self.transport.addresses)

    async def source(self, model: str) -> Source:
        """The checkpoint behind a model name. Raises `ModelNotFound`, `ModelUnsupported`, `CheckpointCorrupt`."""
        from swarmlm.models.source import open_source

        if model not in self._sources:
            self._sources[model] = await trio.to_thread.run_sync(open_source, model)
        return self._sources[model]

    async def client_model(self, model: str, dtype: str | None = None) -> tuple[Any, Any]:
        """(model, tokenizer): the client's half of `model`, loaded once: embeddings, norm and head, no blocks."""
        from swarmlm.hosting import resolve_dtype
        from swarmlm.models.client import load_client_model

        if (model, dtype) not in self._clients:
            source = await self.source(model)
            load = functools.partial(
                load_client_model,
                source,
                dtype=resolve_dtype(dtype, "cpu", source.checkpoint_dtype),
                open_session=_no_session,
            )
            self._clients[model, dtype] = (
                await trio.to_thread.run_sync(load),
                await trio.to_thread.run_sync(source.tokenizer),
            )
        return self._clients[model, dtype]

    async def host(
        self,
        model: str,
        *,
        blocks: range | None = None,
        kv_memory: int | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        threads: int | None = None,
        quant: str | None = None,
        progress: Progress | None = None,
    ) -> HostHandle:
        """Serve `blocks` of `model` (all of them by default); returns once others can use them.

        `kv_memory` is the budget of all sessions' KV caches in bytes. `dtype` defaults to float32 on CPU and to the
        checkpoint's own on a GPU. `threads` sets torch's thread count for the whole process. `quant` "int8" keeps
        weights in a byte each: less memory, on CPUs faster decoding, slightly other tokens.
        Raises `BadSpan` and what `source` raises; `Unreachable` if none of the node's peers answers.
        """
        from swarmlm.hosting import load_span, start_hosting

        if self._hosting is not None:
            raise UsageError("this node serves a span already; open another node for another one")
        source = await self.source(model)
        if self.seeds:
            await self._meet_peers(source.name)
        span = await load_span(
            source, blocks, dtype=dtype, device=device, threads=threads, quant=quant, progress=progress
        )
        self._hosting = await start_hosting(self, source, span, kv_memory)
        return self._hosting.handle

    async def _meet_peers(self, model: str) -> None:
        """Hear who is there. Peers that are started together with us may need a moment to listen."""
        until = trio.current_time() + MEET_SECONDS
        while True:
            try:
                await self.scout.refresh(model)
                return
            except Unreachable:
                if trio.current_time() >= until:
                    raise
            await trio.sleep(MEET_RETRY)

    async def drain(self) -> None:
        """Before leaving: refuse new sessions and take the record back. Live sessions go on until the node is left."""
        from swarmlm.hosting import leave

        if self._hosting is not None:
            hosting, self._hosting = self._hosting, None
            await leave(hosting)

    @asynccontextmanager
    async def session(
        self,
        model: str,
        *,
        max_length: int | None = None,
        dtype: str | None = None,
        codec: str = "none",
        on_event: Any = None,
    ) -> AsyncIterator[NodeSession]:
        """A conversation with `model` over the swarm. See `swarmlm.session.NodeSession`.

        `max_length` tokens of KV are reserved on each host (default: 2,048, grown by replay up to the model's context).
        `codec` compresses hidden states on the wire: "float16" and "bfloat16" halve them, "int8" takes about a quarter;
        tokens may then differ from the local model's. Hosts that do not know it are sent them as they are.
        """
        from swarmlm.session import open_node_session

        opening = open_node_session(
            self, model, max_length=max_length, dtype=dtype, codec=parse_codec(codec), on_event=on_event
        )
        async with opening as session:
            yield session

    async def status(self, model: str) -> SwarmStatus:
        """Who serves what, asked now. Raises `Unreachable` if no peer answers; a swarm without hosts has holes only."""
        from swarmlm.routing.planner import coverage

        source = await self.source(model)
        records = await self.scout.refresh(source.name)
        probed = await self.scout.probe(records)
        rows = []
        for record in records:
            live, rtt_ms = probed.get(PeerId(record.peer), (None, None))
            now = live if live is not None else record
            rows.append(
                HostRow(
                    peer=record.peer,
                    start=record.start,
                    end=record.end,
                    state=now.state,
                    kv_free=now.kv_free,
                    kv_total=now.kv_total,
                    queue=now.queue,
                    sessions=now.sessions,
                    block_ms=now.block_ms,
                    rtt_ms=rtt_ms,
                    dtype=record.dtype,
                    addresses=record.addresses,
                    quant=record.quant,
                )
            )
        rows = [row for row in rows if row.rtt_ms is not None]
        online = [(row.start, row.end) for row in rows if row.state == "online"]
        spans = coverage(online, source.num_blocks)
        holes = [(start, end) for start, end, replicas in spans if replicas == 0]
        return SwarmStatus(source.name, source.num_blocks, rows, spans, holes)


@asynccontextmanager
async def open_node(
    peers: Sequence[str] = (),
    *,
    listen: str | None = None,
    announce: Sequence[str] = (),
    identity: str | None = None,
    transport: Transport | None = None,
    discovery: Discovery | None = None,
    key: Identity | None = None,
) -> AsyncIterator[Node]:
    """Join the swarm of `peers` (full multiaddrs), or start one.

    `listen` is a multiaddr such as "/ip4/0.0.0.0/tcp/4001" and makes the node a full member that helps others find
    hosts; None listens on a free loopback port and asks others only. `announce` are multiaddrs that others are told
    instead of where the node listens: a router's forwarded port, a tunnel, a name. `identity` is a key file, made if
    missing; None is a fresh identity. `transport` and `discovery` replace libp2p's (for tests, simulations and other
    networks); give the transport's own `key` with them.
    Raises `ConfigError` for addresses that do not parse, announced ones of another peer and a port in use.
    """
    seeds = [Address(peer) for peer in peers]
    for seed in seeds:
        peer_of(seed)
    kademlia: Any = None
    with unwrapped():
        async with AsyncExitStack() as stack:
            if transport is None:
                from swarmlm.transport.libp2p import open_kademlia, open_libp2p

                key = Identity.load_or_create(Path(identity)) if identity else Identity.generate()
                where = [Address(listen or "/ip4/127.0.0.1/tcp/0")]
                told = [Address(address) for address in announce]
                libp2p = await stack.enter_async_context(open_libp2p(key, listen=where, announce=told))
                kademlia = await stack.enter_async_context(open_kademlia(libp2p, server=listen is not None))
                transport, discovery = libp2p, kademlia
            elif key is None:
                raise ConfigError("a transport of your own needs its key beside it")
            supervisor = await stack.enter_async_context(open_supervisor())
            nursery = await stack.enter_async_context(trio.open_nursery())
            stack.callback(nursery.cancel_scope.cancel)
            links = Links(transport, nursery)
            directory = await supervisor.start(Directory, name="directory")
            links.route({GetDirectory: directory, Publish: directory})
            announced = [own_address(address, transport.peer_id) for address in announce]
            node = Node(
                transport, key, discovery or NoDiscovery(), supervisor, directory, links, seeds, nursery, announced
            )
            if kademlia is not None:
                nursery.start_soon(_join, kademlia, seeds)
            try:
                yield node
            finally:
                await node.drain()


async def _join(kademlia: Any, seeds: Sequence[Address]) -> None:
    """Best effort: whether the seeds answer at all is the scout's to tell."""
    try:
        await kademlia.bootstrap(seeds)
    except SwarmError as error:
        log.debug("the distributed table was not joined: %s", error)


def _no_session(batch: int, max_length: int) -> Any:
    raise UsageError("this model is driven by its node's sessions; see AutoDistributedModelForCausalLM for generate()")
