"""Links to peers: a fresh one for each session and hop, one shared one per peer for small talk.

Not an actor: it owns no state but the shared links. Every accepted stream is answered with the node's own routes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import trio

from swarmlm.actors.core import Connection, Message, Ref, memory_links, serve
from swarmlm.errors import Unreachable
from swarmlm.protocol import Address, PeerId
from swarmlm.transport.base import Stream, Transport
from swarmlm.transport.link import FramedLink

R = TypeVar("R")


class Links:
    def __init__(self, transport: Transport, nursery: trio.Nursery) -> None:
        self._transport = transport
        self._nursery = nursery
        self._routes: dict[type[Message[Any, Any]], Ref[Any]] = {}
        self._shared: dict[PeerId, Connection] = {}
        self._dialling: dict[PeerId, trio.Lock] = {}
        transport.set_handler(self._accept)

    def route(self, routes: Mapping[type[Message[Any, Any]], Ref[Any]]) -> None:
        """Answer these message types on every link from now on."""
        self._routes.update(routes)

    async def connect(self, peer: PeerId, addresses: Sequence[Address], *, timeout: float) -> Connection:
        """A running connection on a stream of its own. Raises `Unreachable`. The caller closes it.

        To ourselves it stays in this process, so that a node can use what it hosts.
        """
        if peer == self._transport.peer_id:
            near, far = memory_links(peer, peer)
            self._nursery.start_soon(serve, far, self._routes)
            return await self._run(Connection(near))
        stream = await self._transport.open_stream(peer, addresses, timeout=timeout)
        return await self._run(Connection(FramedLink(stream), self._routes))

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
        await serve(FramedLink(stream), self._routes)
