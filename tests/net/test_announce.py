"""A host behind another address than it listens on: records carry the announced one, and others use it."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from swarmlm.config import ServeConfig, parse_announced
from swarmlm.errors import ConfigError
from swarmlm.local_swarm import free_port
from swarmlm.node import open_node
from swarmlm.transport.base import own_address
from swarmlm.transport.delay import open_delay
from swarmlm.transport.identity import Identity
from swarmlm.transport.memory import MemoryNetwork
from tests.tiny import tiny_llama

LATENCY = 0.03  # seconds one way
FORWARDED = "/ip4/203.0.113.5/tcp/4001"


async def test_a_host_behind_a_wire_is_reached_over_it(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "tiny", layers=2)
    listening = free_port()
    async with open_delay(("127.0.0.1", listening), latency=LATENCY) as wire:
        announced = f"/ip4/127.0.0.1/tcp/{wire.address[1]}"
        async with open_node(listen=f"/ip4/127.0.0.1/tcp/{listening}", announce=[announced]) as host:
            assert host.addresses == [f"{announced}/p2p/{host.peer_id}"]
            await host.host(str(tmp_path / "tiny"))
            async with open_node([f"/ip4/127.0.0.1/tcp/{listening}/p2p/{host.peer_id}"]) as asking:
                (record,) = await asking.scout.refresh("tiny")
                assert list(record.addresses) == host.addresses
            async with open_node(host.addresses) as client:
                (row,) = (await client.status(str(tmp_path / "tiny"))).hosts
                assert row.rtt_ms is not None
                assert row.rtt_ms >= 2e3 * LATENCY
    assert wire.connections >= 1


async def test_any_transport_can_be_announced_elsewhere(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "tiny", layers=2)
    key, network = Identity.generate(), MemoryNetwork()
    async with (
        network.open_transport(key) as transport,
        open_node(transport=transport, key=key, announce=[FORWARDED]) as host,
        network.open_transport() as other,
        open_node(transport.addresses, transport=other, key=Identity.generate()) as asking,
    ):
        await host.host(str(tmp_path / "tiny"))
        (record,) = await asking.scout.refresh("tiny")
        assert record.addresses == (f"{FORWARDED}/p2p/{key.peer_id}",)


async def test_addresses_of_others_and_nonsense_are_refused() -> None:
    ours, other = Identity.generate().peer_id, Identity.generate().peer_id
    assert own_address(FORWARDED, ours) == own_address(f"{FORWARDED}/p2p/{ours}", ours) == f"{FORWARDED}/p2p/{ours}"
    for announced in (f"{FORWARDED}/p2p/{other}", "203.0.113.5:4001", "/ip4/203.0.113.5/udp/4001"):
        with pytest.raises(ConfigError) as refused:
            async with open_node(announce=[announced]):
                await trio.sleep(0)
        assert announced in str(refused.value)


def test_what_the_command_line_takes() -> None:
    assert parse_announced(f"{FORWARDED}, /dns4/host.example/tcp/1") == (FORWARDED, "/dns4/host.example/tcp/1")
    assert ServeConfig().announce == ()
    for text in ("", "host:4001"):
        with pytest.raises(ConfigError, match="no address such as"):
            parse_announced(text)
