"""Whole nodes over the simulated network, with a tiny real model: hosting, asking, leaving, dying. No libp2p."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

from swarmlm.actors.pusher import Pusher
from swarmlm.config import Codec
from swarmlm.errors import NoRoute, PoolFull, UsageError
from swarmlm.models.source import open_source
from swarmlm.node import Node, open_node
from swarmlm.protocol import PeerId, Push
from swarmlm.routing.session import SessionEvent, SessionOptions, open_session
from swarmlm.transport.identity import Identity
from swarmlm.transport.memory import MemoryNetwork
from swarmlm.view import SwarmView
from tests.tiny import HIDDEN, tiny_llama

BLOCKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(path, layers=BLOCKS)
    return str(path)


class World:
    """Nodes that all know the first one."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.network = MemoryNetwork()
        self.nodes: list[Node] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> World:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def join(self, start: int | None = None, end: int | None = None, **options: int) -> Node:
        key = Identity.generate()
        transport = await self._stack.enter_async_context(self.network.open_transport(key))
        seeds = self.nodes[0].addresses if self.nodes else []
        node = await self._stack.enter_async_context(open_node(seeds, transport=transport, key=key))
        self.nodes.append(node)
        if start is not None and end is not None:
            await node.host(self.folder, blocks=range(start, end), **options)
        return node


def hidden(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


async def outputs(
    world: World, client: Node, turns: int, events: list[SessionEvent], kill_at: int = -1, codec: Codec = "none"
) -> torch.Tensor:
    """Hidden states of a prefill and some one-token steps; the last host of the route is killed before `kill_at`."""
    source = open_source(world.folder)
    view = SwarmView(client, source.name)
    done = []
    async with open_session(
        view,
        model=source.name,
        fingerprint=source.fingerprint,
        blocks=BLOCKS,
        max_length=32,
        options=SessionOptions(codec=codec),
        on_event=events.append,
    ) as session:
        for turn in range(turns):
            if turn == kill_at:
                world.network.kill(session.route[-1].peer)
            done.append(await session.step(hidden(5 if turn == 0 else 1, turn)))
        assert session.failovers == (kill_at >= 0)
    return torch.cat(done, dim=1)


async def test_a_killed_host_changes_nothing(folder: str) -> None:
    async with World(folder) as world:
        for start, end in ((0, 2), (2, 4), (2, 4)):
            await world.join(start, end)
        client = await world.join()
        events: list[SessionEvent] = []
        expected = await outputs(world, client, 6, events)
        assert events == []
        assert torch.allclose(await outputs(world, client, 6, events, kill_at=3), expected, atol=1e-5)
        assert [event.kind for event in events] == ["failover", "recovered"]


@pytest.mark.parametrize(("codec", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 5e-2)])
async def test_compressed_hidden_states_are_close_and_pushed_like_others(
    folder: str, codec: Codec, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, bool]] = []
    push = Pusher.push

    async def watched(self: Pusher, peer: PeerId, message: Push) -> bool:
        pushed = await push(self, peer, message)
        sent.append((message.hidden.dtype, pushed))
        return pushed

    monkeypatch.setattr(Pusher, "push", watched)
    async with World(folder) as world:
        for start, end in ((0, 2), (2, 4)):
            await world.join(start, end)
        client = await world.join()
        exact = await outputs(world, client, 4, [])
        close = await outputs(world, client, 4, [], codec=codec)
    assert torch.allclose(close, exact, atol=tolerance * float(exact.abs().max()))
    assert not torch.allclose(close, exact, atol=1e-6)
    names = {"int8": "uint8"}
    assert {kind for kind, _ in sent[4:]} == {names.get(codec, codec)}
    assert sum(pushed for _, pushed in sent) >= 6  # at first the hosts may not be connected yet


async def test_every_node_learns_of_every_host_from_one_seed(folder: str) -> None:
    async with World(folder) as world:
        await world.join(0, 2)
        await world.join(1, 3)
        await world.join(2, 4)
        client = await world.join()
        for node in world.nodes:
            status = await node.status(world.folder)
            assert [(row.start, row.end) for row in sorted(status.hosts, key=lambda row: row.start)] == [
                (0, 2),
                (1, 3),
                (2, 4),
            ]
            assert status.coverage == [(0, 1, 1), (1, 3, 2), (3, 4, 1)]
        assert (await client.status(world.folder)).holes == []


async def test_a_host_that_leaves_is_gone_at_once(folder: str) -> None:
    async with World(folder) as world:
        await world.join(0, 4)
        second = await world.join(2, 4)
        client = await world.join()
        assert len((await client.status(world.folder)).hosts) == 2
        await second.drain()
        status = await client.status(world.folder)
        assert {row.state for row in status.hosts if (row.start, row.end) == (2, 4)} <= {"draining"}
        assert status.coverage == [(0, 4, 1)]
        await outputs(world, client, 2, [])


async def test_missing_blocks_and_missing_memory_are_named(folder: str) -> None:
    async with World(folder) as world:
        await world.join(0, 1)
        small = await world.join(2, 4, kv_memory=2 * 10 * 2 * 2 * 8 * 4)  # ten tokens of two blocks
        client = await world.join()
        with pytest.raises(NoRoute, match="block 1"):
            await outputs(world, client, 1, [])
        await world.join(1, 2)
        with pytest.raises(PoolFull) as refused:
            await outputs(world, client, 1, [])
        assert refused.value.details["free"] == 2 * 10 * 2 * 2 * 8 * 4
        with pytest.raises(UsageError, match="serves a span already"):
            await small.host(world.folder)
