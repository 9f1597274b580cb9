"""A toy model served over the simulated network: its outputs depend on every token before, so no fault stays hidden.

All values are integers below a prime, exact in float32. A token's output in a block is a sum of all tokens up to it,
weighted by position: one lost, doubled, misplaced or taken from another row changes everything after it.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import trio

from swarmlm.actors.core import Actor, Connection, Inbox, handles, open_supervisor
from swarmlm.actors.core.message import Ok
from swarmlm.actors.links import Links
from swarmlm.actors.pusher import Pusher
from swarmlm.errors import BadStep, Busy, PoolFull, StaleEpoch, SwarmError, UnknownSession, WrongModel
from swarmlm.kernels.wire import from_wire, to_wire
from swarmlm.protocol import Address, CloseSession, OpenSession, PeerId, Push, SessionOpened, Step, StepDone
from swarmlm.routing.graph import HostView
from swarmlm.routing.session import Session, SessionEvent, SessionOptions, open_session
from swarmlm.transport.link import FramedLink
from swarmlm.transport.memory import MemoryNetwork

PRIME = 8191
HIDDEN = 3
MODEL, FINGERPRINT = "toy", "f00"
LATENCY = 0.005  # seconds, one way


class ToyCache:
    """Blocks [start, end) over one session's tokens: what a span and its KV cache are in earnest."""

    def __init__(self, start: int, end: int, batch: int) -> None:
        self.inputs = {block: torch.empty(batch, 0, HIDDEN, dtype=torch.int64) for block in range(start, end)}
        self.epoch = 0
        self.bytes = 0
        self.done = 0  # ticket of the last step
        self.pushed: dict[int, torch.Tensor] = {}  # by ticket

    @property
    def position(self) -> int:
        return next(iter(self.inputs.values())).shape[1]

    def run(
        self, hidden: torch.Tensor, position: int, *, padding: tuple[int, ...] = (), hypo_ids: tuple[int, ...] = ()
    ) -> torch.Tensor:
        value = hidden.to(torch.int64)
        for block, held in self.inputs.items():
            held = held[:, :position]
            if hypo_ids:
                held = held[list(hypo_ids)]
            held = self.inputs[block] = torch.cat([held, value], dim=1)
            seen = held.clone()
            for row, pads in enumerate(padding):
                seen[row, :pads] = 0
            places = torch.arange(1, held.shape[1] + 1).reshape(1, -1, 1)
            mixed = (seen * places).cumsum(dim=1)[:, position:]
            value = (value * (block + 2) + mixed + block) % PRIME
        return value.to(hidden.dtype)


@dataclass(eq=False)
class ToyHost(Actor[Any]):
    """`before` and `after` see each step before it is run, and when it has run but is not answered yet."""

    start: int
    end: int
    delay: float = 0.0  # seconds of computing a step
    room: int = 10**9  # bytes; a token of a row takes one in each block
    told_room: int | None = None  # what it says instead
    draining: bool = False
    recurrent: bool = False  # can only go back to 0
    listed: bool = True
    pushing: bool = True
    before: Callable[[Step], None] = field(default=lambda step: None)
    after: Callable[[Step], None] = field(default=lambda step: None)
    sessions: dict[bytes, ToyCache] = field(default_factory=dict)
    steps: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)  # position, tokens, hypo_ids
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    pusher: Pusher | None = None
    pushes: int = 0  # outputs that went to the next host
    peer: PeerId = field(init=False)
    addresses: tuple[Address, ...] = ()

    @property
    def free(self) -> int:
        return self.room - sum(cache.bytes for cache in self.sessions.values())

    @handles(OpenSession)
    async def open(self, ask: OpenSession) -> SessionOpened:
        if self.draining:
            raise Busy("this host is leaving")
        if (ask.model, ask.fingerprint) != (MODEL, FINGERPRINT) or not self.start <= ask.start < ask.end <= self.end:
            raise WrongModel(f"blocks {self.start}:{self.end} of {MODEL} are served here")
        old = self.sessions.get(ask.session)
        if old is not None and ask.epoch <= old.epoch:
            raise StaleEpoch("an old epoch")
        self.sessions.pop(ask.session, None)
        needed = (ask.end - ask.start) * ask.max_length * ask.batch
        if needed > self.free:
            raise PoolFull(f"needs {needed} bytes, {self.free} free", needed=needed, free=self.free)
        cache = self.sessions[ask.session] = ToyCache(ask.start, ask.end, ask.batch)
        cache.epoch, cache.bytes = ask.epoch, needed
        self.news.unpark_all()
        if ask.next_peer and self.pusher is not None:
            self.pusher.warm(PeerId(ask.next_peer))
        return SessionOpened(needed, 600.0)

    @handles(CloseSession)
    async def close(self, ask: CloseSession) -> Ok:
        self.sessions.pop(ask.session, None)
        self.news.unpark_all()
        return Ok()

    async def run(self, inbox: Inbox[Any]) -> None:
        """Steps may wait for a push, so each request has a task; they run one after another all the same."""
        self.turn, self.news = trio.Lock(), trio.lowlevel.ParkingLot()
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(self.handle, await inbox.get())

    @handles(Push)
    async def take_push(self, push: Push) -> Ok:
        cache = self.sessions.get(push.session)
        if cache is not None and cache.epoch == push.epoch and push.ticket > cache.done:
            cache.pushed[push.ticket] = from_wire(push.hidden)
            self.news.unpark_all()
        return Ok()

    @handles(Step)
    async def step(self, step: Step) -> StepDone:
        while True:
            cache = self.sessions.get(step.session)
            if cache is None:
                raise UnknownSession("no such session")
            if step.epoch != cache.epoch:
                raise StaleEpoch("an old epoch")
            hidden = from_wire(step.hidden) if step.hidden is not None else cache.pushed.get(step.ticket)
            if hidden is not None and cache.done >= step.after:
                break
            await self.news.park()
        async with self.turn:
            self.before(step)
            await trio.sleep(self.delay)
            if self.sessions.get(step.session) is not cache:
                raise UnknownSession("closed meanwhile")
            held = cache.position
            if step.position > held or (self.recurrent and 0 < step.position < held):
                raise BadStep(f"position {step.position}, {held} held")
            if bool((hidden < 0).any()):
                raise BadStep("negative values")
            self.steps.append((step.position, hidden.shape[1], step.hypo_ids))
            output = cache.run(hidden, step.position, padding=step.padding, hypo_ids=step.hypo_ids)
            cache.done = max(cache.done, step.ticket)
            cache.pushed = {ticket: pushed for ticket, pushed in cache.pushed.items() if ticket > cache.done}
            self.news.unpark_all()
            self.after(step)
            await trio.lowlevel.checkpoint()
            pushed = False
            if step.next_hops and self.pusher is not None:
                there = step.next_hops[0]
                message = Push(there.session, there.epoch, step.ticket, to_wire(output))
                pushed = await self.pusher.push(PeerId(there.peer), message)
                self.pushes += pushed
            return StepDone(to_wire(output), cache.position, pushed=pushed)


class ToyScout:
    """Where the hosts of a toy swarm are, for their `Pusher`s."""

    def __init__(self, hosts: list[ToyHost]) -> None:
        self._hosts = hosts

    async def hosts(self, model: str) -> list[ToyHost]:
        await trio.lowlevel.checkpoint()
        return self._hosts


class ToySwarm:
    """Hosts over a `MemoryNetwork`, and a directory that never forgets: dead hosts stay in it."""

    def __init__(self, network: MemoryNetwork, transport: Any, nursery: trio.Nursery) -> None:
        self.network = network
        self.hosts: list[ToyHost] = []
        self.reported: list[tuple[PeerId, SwarmError]] = []
        self.look_up_error: SwarmError | None = None
        self.look_ups = 0
        self.me = transport.peer_id
        self._transport = transport
        self._nursery = nursery

    async def add(self, start: int, end: int, **kind: Any) -> ToyHost:
        host = ToyHost(start, end, **kind)
        await self._nursery.start(self._live, host)
        self.hosts.append(host)
        return host

    async def _live(self, host: ToyHost, task_status: Any) -> None:
        with host.scope:
            async with self.network.open_transport() as transport, open_supervisor(max_restarts=99) as supervisor:
                ref = await supervisor.start(lambda: host)
                async with trio.open_nursery() as nursery:
                    links = Links(transport, nursery)
                    links.route({OpenSession: ref, CloseSession: ref, Step: ref, Push: ref})
                    if host.pushing:
                        host.pusher = Pusher(links, ToyScout(self.hosts), MODEL, nursery)  # type: ignore[arg-type]
                    host.peer, host.addresses = transport.peer_id, tuple(transport.addresses)
                    task_status.started()
                    await trio.sleep_forever()

    def kill(self, host: ToyHost) -> None:
        self.network.kill(host.peer)
        host.scope.cancel()

    def partition(self, host: ToyHost) -> None:
        self.network.partition({host.peer}, {self.me})

    def alive(self) -> list[ToyHost]:
        return [host for host in self.hosts if not host.scope.cancel_called]

    def at(self, session: Session, index: int) -> ToyHost:
        """The host of hop `index`."""
        return next(host for host in self.hosts if host.peer == session.route[index].peer)

    # ---- the Swarm protocol

    async def views(self, model: str, fingerprint: str, *, max_length: int, batch: int, fresh: bool) -> list[HostView]:
        self.look_ups += 1
        await trio.sleep(2 * LATENCY)
        if self.look_up_error is not None:
            raise self.look_up_error
        return [
            HostView(
                host.peer, host.start, host.end, 2e3 * LATENCY, 0.0, 1.0 + 1e3 * host.delay,
                (host.free if host.told_room is None else host.told_room) // (max_length * batch),
            )
            for host in self.hosts
            if host.listed
        ]  # fmt: skip

    async def connect(self, peer: PeerId, *, timeout: float) -> Connection:
        addresses = next(host.addresses for host in self.hosts if host.peer == peer)
        stream = await self._transport.open_stream(peer, addresses, timeout=timeout)
        connection = Connection(FramedLink(stream))
        await self._nursery.start(connection.run)
        return connection

    def report_failure(self, peer: PeerId, error: SwarmError) -> None:
        self.reported.append((peer, error))


@asynccontextmanager
async def toy_swarm(*spans: tuple[int, int], seed: int = 0) -> AsyncIterator[ToySwarm]:
    network = MemoryNetwork(latency=LATENCY, seed=seed)
    async with trio.open_nursery() as nursery, network.open_transport() as transport:
        swarm = ToySwarm(network, transport, nursery)
        for start, end in spans:
            await swarm.add(start, end)
        yield swarm
        nursery.cancel_scope.cancel()


class Twin:
    """A session and the whole model beside it: each step is run by both, and must come out the same."""

    def __init__(self, session: Session, blocks: int, batch: int, seed: int = 0) -> None:
        self.session = session
        self.local = ToyCache(0, blocks, batch)
        self.batch = batch
        self.padding: tuple[int, ...] = ()
        self._random = random.Random(seed)

    def tokens(self, count: int) -> torch.Tensor:
        values = [self._random.randrange(PRIME) for _ in range(self.batch * count * HIDDEN)]
        return torch.tensor(values, dtype=torch.float32).reshape(self.batch, count, HIDDEN)

    async def step(
        self, tokens: int | torch.Tensor = 1, *, position: int | None = None, padding: tuple[int, ...] = (),
        hypo_ids: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        hidden = self.tokens(tokens) if isinstance(tokens, int) else tokens
        at = self.session.position if position is None else position
        output = await self.session.step(hidden, position=position, padding=padding, hypo_ids=hypo_ids)
        self.padding = padding or (self.padding if at else ())
        if hypo_ids and self.padding and not padding:
            self.padding = tuple(self.padding[row] for row in hypo_ids)
        expected = self.local.run(hidden, at, padding=self.padding, hypo_ids=hypo_ids if at else ())
        assert output.equal(expected), f"wrong at position {at}"
        assert self.session.position == self.local.position == at + hidden.shape[1]


@asynccontextmanager
async def twin_session(
    swarm: ToySwarm,
    blocks: int,
    *,
    max_length: int = 64,
    batch: int = 1,
    options: SessionOptions | None = None,
    events: list[SessionEvent] | None = None,
    seed: int = 0,
) -> AsyncIterator[Twin]:
    async with open_session(
        swarm,
        model=MODEL,
        fingerprint=FINGERPRINT,
        blocks=blocks,
        max_length=max_length,
        batch=batch,
        options=options,
        on_event=None if events is None else events.append,
    ) as session:
        yield Twin(session, blocks, batch, seed)
