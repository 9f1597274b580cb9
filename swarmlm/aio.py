"""The asyncio twin of `swarmlm.open_node`, over a portal: the same names, awaited from any asyncio app.

    async with swarmlm.aio.open_node(peers=PEERS) as node:
        async with node.session("smollm2") as session:
            async for text in session.chat("Hello"):
                print(text, end="")

Calls run in the event loop's default executor while the trio loop works, so nothing here blocks the asyncio loop.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from swarmlm.hosting import HostHandle
from swarmlm.node import Node, SwarmStatus
from swarmlm.node import open_node as open_trio_node
from swarmlm.portal import Portal
from swarmlm.session import Answer, GenerationResult, NodeSession


async def _in_thread(function: Any, *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, functools.partial(function, *args))


class AioSession:
    """A `swarmlm.session.NodeSession` for asyncio."""

    def __init__(self, portal: Portal, session: NodeSession) -> None:
        self._portal = portal
        self._session = session

    def chat(self, message: str, **options: Any) -> AsyncIterator[str]:
        """The next turn; options as `NodeSession.chat`."""
        return self._pieces(functools.partial(self._session.chat, message, **options))

    def generate(self, prompt: str | Sequence[int], **options: Any) -> AsyncIterator[str]:
        """Continue `prompt`; options as `NodeSession.generate`."""
        return self._pieces(functools.partial(self._session.generate, prompt, **options))

    async def _pieces(self, start: Any) -> AsyncIterator[str]:
        async def begin() -> Answer:
            answer: Answer = start()
            return answer

        answer = await _in_thread(self._portal.call, begin)
        try:
            while True:
                try:
                    yield await _in_thread(self._portal.call, answer.receive)
                except EOFError:
                    return
        finally:
            await _in_thread(self._portal.call, answer.aclose)

    @property
    def last(self) -> GenerationResult:
        return self._session.last

    @property
    def failovers(self) -> int:
        return self._session.failovers

    def route(self) -> list[Any]:
        return self._session.route()

    async def reset(self) -> None:
        await _in_thread(self._portal.call, self._session.reset)


class AioNode:
    """A `swarmlm.Node` for asyncio."""

    def __init__(self, portal: Portal, node: Node) -> None:
        self._portal = portal
        self._node = node

    @property
    def addresses(self) -> list[str]:
        return self._node.addresses

    async def host(self, model: str, **options: Any) -> HostHandle:
        """Serve a span; options as `Node.host`."""
        handle: HostHandle = await _in_thread(self._portal.call, functools.partial(self._node.host, model, **options))
        return handle

    async def status(self, model: str) -> SwarmStatus:
        status: SwarmStatus = await _in_thread(self._portal.call, self._node.status, model)
        return status

    @asynccontextmanager
    async def session(self, model: str, **options: Any) -> AsyncIterator[AioSession]:
        """A conversation; options as `Node.session`."""
        session = await _in_thread(self._portal.enter, self._node.session(model, **options))
        try:
            yield AioSession(self._portal, session)
        finally:
            await _in_thread(self._portal.leave, session)


@asynccontextmanager
async def open_node(peers: Sequence[str] = (), **options: Any) -> AsyncIterator[AioNode]:
    """Join or start a swarm; arguments as `swarmlm.open_node`."""
    portal = await _in_thread(Portal)
    try:
        node = await _in_thread(portal.enter, open_trio_node(peers, **options))
        yield AioNode(portal, node)
    finally:
        await _in_thread(portal.close)
