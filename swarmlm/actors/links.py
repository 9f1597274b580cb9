"""Links to peers: a fresh one for each session and hop, one shared one per peer for small talk.

Not an actor: it owns no state but the shared links. Every accepted stream is answered with the node's own routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import trio

from swarmlm.actors.core import Connection, Message, Ref, memory_links, serve
from swarmlm.errors import Unreachable
from swarmlm.protocol import Address, PeerId
from swarmlm.transport.base import Stream, Transport
from swarmlm.transport.link import FramedLink

R = TypeVar("R")

Kind = type[Message[Any, Any]]
Introduce = Callable[[PeerId, Any], Message[Any, Any]]  # (who sent it, the message) to a message that says both


class Links:
    def __init__(self, transport: Transport, nursery: trio.Nursery) -> None:
        self._transport = transport
        self._nursery = nursery
        self._routes: dict[Kind, Ref[Any]] = {}
        self._introductions: dict[Kind, tuple[Ref[Any], Introduce]] = {}
        self._shared: dict[PeerId, Connection] = {}
        self._dialling: dict[PeerId, trio.Lock] = {}
        transport.set_handler(self._accept)

    def route(self, routes: Mapping[Kind, Ref[Any]]) -> None:
        """Answer these message types on every link from now on."""
        self._routes.update(routes)

    def introduce(self, kind: Kind, ref: Ref[Any], introduce: Introduce) -> None:
        """As `route`, for a receiver that wants to know who sent it: `ref` is told `introduce(peer, message)`."""
        self._introductions[kind] = (ref, introduce)

    async def connect(self, peer: PeerId, addresses: Sequence[Address], *, timeout: float) -> Connection:
        """A running connection on a stream of its own. Raises `Unreachable`. The caller closes it.

        To ourselves it stays in this process, so that a node can use what it hosts.
        """
        if peer == self._transport.peer_id:
            near, far = memory_links(peer, peer)
            self._nursery.start_soon(serve, far, self._routes_of(peer))
            return await self._run(Connection(near))
        stream = await self._transport.open_stream(peer, addresses, timeout=timeout)
        return await self._run(Connection(FramedLink(stream), self._routes_of(peer)))

    async def _run(self, connection: Connection) -> Connection:
        await self._nursery.start(connection.run)
        return connection

    async def link(self, peer: PeerId, addresses: Sequence[Address], *, timeout: float) -> Connection:
        """The shared link to `peer`, dialled if there is none. Raises `Unreachable`."""
        async with self._dialling.setdefault(peer, trio.Lock()):
            connection = self._shared.get(peer)
            if connection is None or connection.closed:
                connection = await self.connect(peer, addresses, timeout=timeout)
                self._shared[peer] = connection
            return connection

    def ready(self, peer: PeerId) -> Connection | None:
        """The shared link to `peer` if it is up now."""
        connection = self._shared.get(peer)
        return connection if connection is not None and not connection.closed else None

    async def ask(self, peer: PeerId, addresses: Sequence[Address], message: Message[Any, R], *, timeout: float) -> R:
        """Call `message` on the shared link to `peer`. Raises what `Ref.call` raises, or `Unreachable`."""
        with trio.move_on_after(timeout):
            connection = await self.link(peer, addresses, timeout=timeout)
            return await connection.ref().call(message, deadline=timeout)
        raise Unreachable(f"{peer} did not answer within {timeout:g} s")

    async def _accept(self, stream: Stream) -> None:
        await serve(FramedLink(stream), self._routes_of(stream.peer))

    def _routes_of(self, peer: PeerId) -> Mapping[Kind, Ref[Any]]:
        return _PeerRoutes(peer, self._routes, self._introductions)


class _PeerRoutes(Mapping[Kind, Ref[Any]]):
    """The node's routes as one peer finds them, now and when they grow."""

    def __init__(
        self, peer: PeerId, routes: dict[Kind, Ref[Any]], introductions: dict[Kind, tuple[Ref[Any], Introduce]]
    ) -> None:
        self._peer = peer
        self._routes = routes
        self._introductions = introductions

    def __getitem__(self, kind: Kind) -> Ref[Any]:
        if kind in self._introductions:
            return _Introduced(self._peer, *self._introductions[kind])
        return self._routes[kind]

    def __iter__(self) -> Iterator[Kind]:
        return iter({**self._routes, **self._introductions})

    def __len__(self) -> int:
        return len({**self._routes, **self._introductions})


class _Introduced(Ref[Any]):
    def __init__(self, peer: PeerId, ref: Ref[Any], introduce: Introduce) -> None:
        self._peer = peer
        self._ref = ref
        self._introduce = introduce

    async def call(self, message: Message[Any, R], *, deadline: float, wait: bool = True) -> R:
        return await self._ref.call(self._introduce(self._peer, message), deadline=deadline, wait=wait)

    async def cast(self, message: Message[Any, Any], *, wait: bool = True) -> None:
        await self._ref.cast(self._introduce(self._peer, message), wait=wait)
