"""A network inside one process: latency, bandwidth, loss, partitions and crashes, on trio's clock.

For tests of whole swarms in virtual time, and for trying out a swarm's shape before buying machines:

    network = MemoryNetwork(latency=0.02, bandwidth=5e6, seed=1)
    async with network.open_transport() as host, network.open_transport() as client:
        host.set_handler(answer)
        stream = await client.open_stream(host.peer_id, host.addresses, timeout=5.0)    # takes a round trip: 40 ms
        network.partition({host.peer_id}, {client.peer_id})                             # silence
        network.heal()
        network.kill(host.peer_id)                                                      # as kill -9 does

Under `trio.testing.MockClock(autojump_threshold=0)` all of it takes no real time, and times come out exactly.
A seed gives the same peer ids and the same fate of each pair's segments. Peers are not authenticated by anything: the
network is the one that knows who is who. Loss delays only the stream it hits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import trio

from swarmlm.errors import Closed, ConfigError, ConnectionLost, Unavailable, Unreachable
from swarmlm.protocol import Address, PeerId
from swarmlm.transport.base import Handler
from swarmlm.transport.identity import Identity
from swarmlm.transport.pipe import WINDOW, Bell, Buffer, Conditions, Direction, End, Pipe, segments_of

log = logging.getLogger(__name__)


class MemoryNetwork:
    """The defaults hold for every pair of peers that `set_link` says nothing about.

    `latency` and `jitter` are seconds one way, `bandwidth` is bytes per second in each direction of a pair (None: no
    limit), `loss` is the share of segments that are lost and sent again after a round trip.
    """

    def __init__(
        self,
        *,
        latency: float = 0.0,
        bandwidth: float | None = None,
        loss: float = 0.0,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._defaults = Conditions(latency, math.inf if bandwidth is None else bandwidth, loss, jitter)
        self._seed = seed
        self._identities = Random(f"{seed} identities")
        self._directions: dict[tuple[PeerId, PeerId], Direction] = {}
        self._cut: set[tuple[PeerId, PeerId]] = set()
        self._healed = trio.Event()
        self._transports: dict[int, MemoryTransport] = {}
        self._opened = 0

    @asynccontextmanager
    async def open_transport(self, identity: Identity | None = None) -> AsyncIterator[MemoryTransport]:
        """A transport of a new peer, or of `identity`. Leaving the block closes its streams cleanly.

        Raises `ConfigError` if that identity has a transport open already.
        """
        who = identity or Identity.from_seed(self._identities.randbytes(32))
        if any(other.peer_id == who.peer_id for other in self._transports.values()):
            raise ConfigError(f"{who.peer_id} is on this network already")
        self._opened += 1
        try:
            async with trio.open_nursery() as nursery:
                transport = MemoryTransport(self, who.peer_id, self._opened, nursery)
                self._transports[transport.number] = transport
                try:
                    yield transport
                finally:
                    self._transports.pop(transport.number, None)
                    transport.close_streams()
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:  # handlers never fail, so it is the body's own error in a group of one
            if len(group.exceptions) > 1:
                raise
            raise group.exceptions[0] from group.exceptions[0].__cause__

    def set_link(
        self,
        a: PeerId,
        b: PeerId,
        *,
        latency: float | None = None,
        bandwidth: float | None = None,
        loss: float | None = None,
        jitter: float | None = None,
    ) -> None:
        """Both directions between `a` and `b` from now on; what is not given stays. `math.inf` lifts a bandwidth.

        What is on its way arrives as it would have.
        """
        given = {"latency": latency, "bandwidth": bandwidth, "loss": loss, "jitter": jitter}
        changes = {name: value for name, value in given.items() if value is not None}
        for direction in (self.direction(a, b), self.direction(b, a)):
            direction.conditions = replace(direction.conditions, **changes)

    def partition(self, one: Collection[PeerId], other: Collection[PeerId]) -> None:
        """Nothing passes between a peer of `one` and a peer of `other` until `heal`: no data, no errors, no dials."""
        cut = {pair for a in one for b in other if a != b for pair in ((a, b), (b, a))}
        self._cut |= cut
        for pair in cut:
            self.direction(*pair).cut = True
        for pipe in self._pipes():
            if pipe.direction.cut:
                pipe.cut()

    def heal(self) -> None:
        """End all partitions. Streams that nobody gave up go on where they were: lost segments are sent again."""
        held = [pipe for pipe in self._pipes() if pipe.direction.cut]
        for pair in self._cut:
            self.direction(*pair).heal()
        self._cut.clear()
        for pipe in held:
            pipe.heal()
        self._healed.set()
        self._healed = trio.Event()

    def kill(self, peer: PeerId) -> None:
        """As kill -9 does: its streams break at both ends at once, and nobody can dial it. Its tasks are the caller's.

        A peer that is cut off learns of it, and is heard of, when the network heals. One that is not here is no error.
        """
        for transport in [each for each in self._transports.values() if each.peer_id == peer]:
            del self._transports[transport.number]
            transport.break_streams()

    def direction(self, source: PeerId, target: PeerId) -> Direction:
        found = self._directions.get((source, target))
        if found is None:
            found = Direction(self._defaults, f"{self._seed} {source} {target}")
            self._directions[source, target] = found
        return found

    async def dial(self, dialler: MemoryTransport, target: PeerId, addresses: Sequence[Address]) -> MemoryStream:
        """A stream after one round trip, however long a partition makes that. Raises `Unreachable`."""
        there, back = self.direction(dialler.peer_id, target), self.direction(target, dialler.peer_id)
        self._listener(dialler, target, addresses)
        while True:
            while there.cut or back.cut:
                await self._healed.wait()
            await trio.sleep(there.delay() + back.delay())
            if not (there.cut or back.cut):
                break
        listener = self._listener(dialler, target, addresses)
        bell = Bell()
        out, into = Pipe(there, bell), Pipe(back, bell)
        listener.accept(MemoryStream(dialler.peer_id, listener, out=into, into=out, bell=bell))
        return MemoryStream(target, dialler, out=out, into=into, bell=bell)

    def _listener(self, dialler: MemoryTransport, target: PeerId, addresses: Sequence[Address]) -> MemoryTransport:
        if self._transports.get(dialler.number) is not dialler:
            raise Unreachable("this node's transport is closed")
        if target == dialler.peer_id:
            raise Unreachable(f"{target} is this node itself")
        connected = not addresses and any(stream.peer == target for stream in dialler.streams)
        for transport in self._transports.values():
            if transport.peer_id == target and transport.accepts and (connected or transport.is_at(addresses)):
                return transport
        raise Unreachable(f"nobody answers for {target} at {', '.join(addresses) or 'no address'}")

    def _pipes(self) -> list[Pipe]:
        """Those that a reader may still read."""
        streams = [stream for transport in self._transports.values() for stream in transport.streams]
        return [stream.into for stream in streams]


class MemoryTransport:
    """`Transport` of transport.base. Made by `MemoryNetwork.open_transport`."""

    def __init__(self, network: MemoryNetwork, peer_id: PeerId, number: int, nursery: trio.Nursery) -> None:
        self.number = number
        self.streams: dict[MemoryStream, None] = {}  # a dict keeps their order, and with it the network's fate
        self._network = network
        self._peer_id = peer_id
        self._nursery = nursery
        self._handler: Handler | None = None

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def addresses(self) -> Sequence[Address]:
        return (Address(f"/memory/{self.number}/p2p/{self._peer_id}"),)

    async def open_stream(self, peer: PeerId, addresses: Sequence[Address], *, timeout: float) -> MemoryStream:
        """One round trip. Without addresses, a peer that is connected already is reached. Raises `Unreachable`."""
        with trio.move_on_after(timeout):
            return await self._network.dial(self, peer, addresses)
        raise Unreachable(f"cannot reach {peer} within {timeout:g} s")

    def set_handler(self, handler: Handler) -> None:
        self._handler = handler

    # ---- what the network and the streams call

    @property
    def accepts(self) -> bool:
        return self._handler is not None

    def is_at(self, addresses: Sequence[Address]) -> bool:
        return not set(addresses).isdisjoint(self.addresses)

    def accept(self, stream: MemoryStream) -> None:
        assert self._handler is not None
        self._nursery.start_soon(self._serve, self._handler, stream)

    def close_streams(self) -> None:
        for stream in list(self.streams):
            stream.close()

    def break_streams(self) -> None:
        for stream in list(self.streams):
            stream.break_off()

    async def _serve(self, handler: Handler, stream: MemoryStream) -> None:
        try:
            await handler(stream)
        except Unavailable as error:
            log.debug("a stream ended: %s", error)
        except Exception:
            log.exception("the handler of a stream from %s failed", stream.peer)
        finally:
            stream.close()


class MemoryStream:
    """`Stream` of transport.base. Made by the network only."""

    def __init__(self, peer: PeerId, transport: MemoryTransport, *, out: Pipe, into: Pipe, bell: Bell) -> None:
        self.into = into
        self._peer = peer
        self._transport = transport
        self._out = out
        self._bell = bell
        self._closed = False
        self._lost = False
        self._torn = False
        transport.streams[self] = None

    @property
    def peer(self) -> PeerId:
        return self._peer

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Returns when all of it is on its way, at most `WINDOW` bytes ahead of the reader."""
        await trio.lowlevel.checkpoint()
        self._check_writable()
        self._torn = True
        for segment in segments_of(buffers):
            while self._out.unread >= WINDOW:
                await self._bell.wait(until=self.into.end_arrival())
                self._check_writable(mine=True)
            self._out.push(segment)
        self._torn = False

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while not (self._closed or self._lost):
            content = self.into.take()
            if isinstance(content, bytes):
                return content
            if content is End.CLEAN:
                return b""
            if content is End.RESET:
                break
            await self._bell.wait(until=self.into.next_arrival())
        if self._closed:
            raise Closed("the stream is closed")
        raise ConnectionLost(f"lost {self._peer}")

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if not self._lost:
                self._out.push(End.RESET if self._torn else End.CLEAN)
            self._leave()

    def break_off(self) -> None:
        """Our process died."""
        self._lost = True
        self._out.break_off()
        self._leave()

    def _leave(self) -> None:
        self.into.discard()
        self._transport.streams.pop(self, None)

    def _check_writable(self, *, mine: bool = False) -> None:
        if self._closed:
            raise Closed("the stream is closed")
        if self._torn and not mine:
            raise ConnectionLost("an earlier send was cancelled half way")
        if self._lost or self.into.end_arrival() <= trio.current_time():
            raise ConnectionLost(f"lost {self._peer}")
