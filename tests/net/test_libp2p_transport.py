"""The libp2p transport between real processes on loopback."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from swarmlm.errors import Closed, ConfigError, ConnectionLost, Unavailable, Unreachable
from swarmlm.protocol import Address
from swarmlm.transport.base import Stream, Transport
from swarmlm.transport.libp2p import muxer, open_kademlia, open_libp2p
from tests.net.libp2p_peers import PeerProcess, identity, peer_process, serve

SECONDS = 5.0  # for anything that takes milliseconds when the machine is not busy


@asynccontextmanager
async def pair(seed: int) -> AsyncIterator[tuple[Transport, PeerProcess]]:
    async with peer_process(seed) as peer, open_libp2p(identity(seed + 1)) as transport:
        yield transport, peer


async def open_to(transport: Transport, peer: PeerProcess, kind: bytes) -> Stream:
    stream = await transport.open_stream(peer.peer_id, peer.addresses, timeout=SECONDS)
    await stream.send([kind])
    return stream


async def exactly(stream: Stream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = await stream.receive()
        assert part, "the stream ended early"
        data += part
    return data


async def test_echo_both_ways_and_a_clean_end() -> None:
    async with pair(100) as (transport, peer):
        stream = await open_to(transport, peer, b"e")
        assert stream.peer == peer.peer_id
        payload = os.urandom(100_000)
        await stream.send([payload[:1], memoryview(payload)[1:70_000], bytearray(payload[70_000:])])
        with trio.fail_after(SECONDS):
            assert await exactly(stream, len(payload)) == payload
        await stream.aclose()
        await stream.aclose()
        with pytest.raises(Closed):
            await stream.send([b"x"])
        with pytest.raises(Closed):
            await stream.receive()
        goodbye = await open_to(transport, peer, b"q")
        with trio.fail_after(SECONDS):
            assert bytes(await exactly(goodbye, 3)) == b"bye"
            assert await goodbye.receive() == b""
            assert await goodbye.receive() == b""


async def test_streams_opened_by_the_other_side_are_authenticated() -> None:
    async with open_libp2p(identity(110)) as one, open_libp2p(identity(111)) as two:
        seen: list[str] = []

        async def handler(stream: Stream) -> None:
            seen.append(stream.peer)
            await serve(stream)

        one.set_handler(handler)
        stream = await two.open_stream(one.peer_id, one.addresses, timeout=SECONDS)
        await stream.send([b"e", b"hello"])
        with trio.fail_after(SECONDS):
            assert await exactly(stream, 5) == b"hello"
        assert seen == [two.peer_id]
        assert all(address.endswith(f"/p2p/{one.peer_id}") and "/tcp/0/" not in address for address in one.addresses)


async def test_a_failing_handler_ends_its_own_stream_only() -> None:
    async with pair(120) as (transport, peer):
        echo = await open_to(transport, peer, b"e")
        broken = await open_to(transport, peer, b"x")
        with trio.fail_after(SECONDS):
            assert await broken.receive() == b""
            await echo.send([b"still here"])
            assert await exactly(echo, 10) == b"still here"


async def test_64_mib() -> None:
    async with pair(130) as (transport, peer):
        stream = await open_to(transport, peer, b"s")
        payload = os.urandom(64 * 1024 * 1024)
        started = time.perf_counter()
        with trio.fail_after(60):
            await stream.send([len(payload).to_bytes(8, "big"), payload])
            assert await exactly(stream, 4) == b"done"
        seconds = time.perf_counter() - started
        print(f"64 MiB: {len(payload) / seconds / 1e6:.0f} MB/s")


async def test_latency_of_streams_and_of_4_kib() -> None:
    async with pair(140) as (transport, peer):
        opened = []
        for _ in range(30):
            started = time.perf_counter()
            stream = await transport.open_stream(peer.peer_id, peer.addresses, timeout=SECONDS)
            opened.append(time.perf_counter() - started)
            await stream.aclose()
        stream = await open_to(transport, peer, b"e")
        payload, trips = os.urandom(4096), []
        for _ in range(300):
            started = time.perf_counter()
            await stream.send([payload])
            await exactly(stream, len(payload))
            trips.append(time.perf_counter() - started)
        print(
            f"first stream {opened[0] * 1e3:.1f} ms, then {sorted(opened)[15] * 1e3:.2f} ms; "
            f"4 KiB there and back {sorted(trips)[150] * 1e6:.0f} us"
        )
        assert sorted(opened)[15] < 0.1
        assert sorted(trips)[150] < 0.05


async def test_kill_9_is_noticed_at_once() -> None:
    async with pair(150) as (transport, peer):
        stream = await open_to(transport, peer, b"e")
        await stream.send([b"x"])
        await exactly(stream, 1)
        killed = []

        async def kill() -> None:
            await trio.sleep(0.1)
            killed.append(time.perf_counter())
            peer.process.kill()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            with trio.fail_after(SECONDS), pytest.raises(ConnectionLost):
                await stream.receive()
        print(f"kill -9 noticed after {(time.perf_counter() - killed[0]) * 1e3:.1f} ms")
        assert time.perf_counter() - killed[0] < 0.5
        with pytest.raises(ConnectionLost):
            await stream.send([b"x"])
        started = time.perf_counter()
        with pytest.raises(Unreachable, match="refused"):
            await transport.open_stream(peer.peer_id, peer.addresses, timeout=SECONDS)
        assert time.perf_counter() - started < 2.0


async def test_a_restarted_peer_is_reached_at_once() -> None:
    async with open_libp2p(identity(161)) as transport:
        async with peer_process(160) as peer:
            await (await open_to(transport, peer, b"e")).aclose()
            listen = [peer.addresses[0].split("/p2p/")[0]]
            await peer.kill()
            for _ in range(3):  # failed dials are not held against it
                with pytest.raises(Unreachable):
                    await transport.open_stream(peer.peer_id, peer.addresses, timeout=1.0)
        async with peer_process(160, listen=listen) as again:
            started = time.perf_counter()
            stream = await open_to(transport, again, b"e")
            print(f"restarted peer reached in {(time.perf_counter() - started) * 1e3:.1f} ms")
            assert time.perf_counter() - started < 2.0
            await stream.send([b"back"])
            assert await exactly(stream, 4) == b"back"


async def test_a_stopped_peer_costs_the_timeout_and_no_more() -> None:
    async with pair(165) as (transport, peer):
        await (await open_to(transport, peer, b"e")).aclose()
        peer.stop()
        started = time.perf_counter()
        with pytest.raises(Unreachable, match="timed out"):
            await transport.open_stream(peer.peer_id, peer.addresses, timeout=1.0)
        assert time.perf_counter() - started < 1.6


async def test_unreachable_says_why() -> None:
    async with pair(170) as (transport, peer):
        with pytest.raises(Unreachable, match="another peer"):
            await transport.open_stream(identity(179).peer_id, peer.addresses, timeout=SECONDS)
        with pytest.raises(Unreachable, match="no usable address"):
            await transport.open_stream(identity(178).peer_id, [], timeout=SECONDS)
        malformed = [Address(f"/dns4/{'x' * 70}.org/tcp/1"), Address("/ip4/127.0.0.1/udp/1"), Address("nonsense")]
        with pytest.raises(Unreachable, match="no usable address"):
            await transport.open_stream(identity(178).peer_id, malformed, timeout=SECONDS)
        with pytest.raises(Unreachable, match="itself"):
            await transport.open_stream(transport.peer_id, transport.addresses, timeout=SECONDS)
        with pytest.raises(Unreachable, match="peer id"):
            await transport.open_stream("0 is no base58", peer.addresses, timeout=SECONDS)  # type: ignore[arg-type]
        with socket.create_server(("127.0.0.1", 0)) as silent:
            where = Address(f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}")
            with pytest.raises(Unreachable, match="timed out"):
                await transport.open_stream(identity(177).peer_id, [where], timeout=0.5)
        dead = Address("/ip4/127.0.0.1/tcp/1")
        stream = await transport.open_stream(peer.peer_id, [dead, *peer.addresses], timeout=SECONDS)
        await stream.aclose()


async def test_bad_listen_addresses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for listen in (f"/ip4/127.0.0.1/tcp/{port}", "nonsense", "/ip4/127.0.0.1/udp/1", "/dns4/example.org/tcp/1"):
            with pytest.raises(ConfigError) as caught:
                async with open_libp2p(identity(180), listen=[Address(listen)]):
                    pass
            assert listen in str(caught.value)
            assert "\n" not in str(caught.value)
    async with open_libp2p(identity(180), listen=[Address("/ip4/0.0.0.0/tcp/0")]) as transport:
        assert any(address.startswith("/ip4/127.0.0.1/tcp/") for address in transport.addresses)
        assert not any("/0.0.0.0/" in address for address in transport.addresses)
    async with open_libp2p(identity(181), listen=[]) as transport:
        assert list(transport.addresses) == []


async def test_no_cancelled_caller_breaks_the_connection() -> None:
    async with pair(190) as (transport, peer):
        steady = await open_to(transport, peer, b"e")
        flood = await open_to(transport, peer, b"f")
        rng = random.Random(7)

        async def drain() -> None:
            while True:
                await flood.receive()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            for turn in range(50):
                victim = await open_to(transport, peer, b"e" if turn % 2 else b"f")
                with trio.move_on_after(rng.random() * 0.01):
                    if turn % 2:
                        await victim.send([bytes(8_000_000)])
                    while True:
                        await victim.receive()
                await victim.aclose()
                with trio.fail_after(SECONDS):
                    await steady.send([f"{turn:04}".encode()])
                    assert await exactly(steady, 4) == f"{turn:04}".encode()
            nursery.cancel_scope.cancel()
        connections = [each for found in transport.network.connections.values() for each in found]  # type: ignore[attr-defined]
        assert len(connections) == 1, "the one connection has served throughout"


async def test_a_cancelled_receive_loses_nothing() -> None:
    async with pair(195) as (transport, peer):
        stream = await open_to(transport, peer, b"e")
        payload = os.urandom(300_000)
        received = b""
        await stream.send([payload])
        with trio.fail_after(SECONDS):
            while len(received) < len(payload):
                with trio.move_on_after(0.0003):
                    received += await stream.receive()
        assert received == payload


async def test_both_directions_full_at_once() -> None:
    async with pair(192) as (transport, peer):
        stream = await open_to(transport, peer, b"e")
        payload = os.urandom(32 * 1024 * 1024)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send, [payload])
                assert await exactly(stream, len(payload)) == payload


async def test_a_peer_that_does_not_read_holds_up_its_own_stream_only() -> None:
    async with pair(193) as (transport, peer):
        stuck = await open_to(transport, peer, b"n")
        with trio.move_on_after(0.3) as waited:
            await stuck.send([bytes(16 * 1024 * 1024)])
        assert waited.cancelled_caught
        with pytest.raises(ConnectionLost, match="half way"):
            await stuck.send([b"the rest of the frame is missing"])
        echo = await open_to(transport, peer, b"e")
        await echo.send([b"meanwhile"])
        with trio.fail_after(SECONDS):
            assert await exactly(echo, 9) == b"meanwhile"


async def test_a_peer_that_falls_silent_is_lost_and_an_idle_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muxer, "PING_SECONDS", 0.2)
    monkeypatch.setattr(muxer, "DEAD_SECONDS", 1.0)
    async with pair(194) as (transport, peer):
        stream = await open_to(transport, peer, b"e")
        with trio.move_on_after(2.0) as idle:
            await stream.receive()
        assert idle.cancelled_caught
        peer.stop()
        started = time.perf_counter()
        with trio.fail_after(SECONDS), pytest.raises(ConnectionLost):
            await stream.receive()
        assert 0.5 < time.perf_counter() - started < 2.5


async def test_garbage_does_no_harm() -> None:
    async with pair(200) as (transport, peer):
        port = int(peer.addresses[0].split("/")[4])
        rng = random.Random(1)
        opening = b"\x13/multistream/1.0.0\n\x07/noise\n"

        async def throw(payload: bytes) -> None:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            async with stream:
                with trio.move_on_after(1.0):
                    try:
                        await stream.send_all(payload)
                        if rng.random() < 0.3:
                            await stream.receive_some()
                    except trio.BrokenResourceError:
                        pass

        for _ in range(20):
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    noise = rng.randbytes(rng.randrange(400))
                    handshake = opening[: rng.randrange(len(opening) + 1)]
                    sized = len(noise).to_bytes(2, "big") + noise
                    nursery.start_soon(throw, rng.choice([noise, handshake, opening + noise, opening + sized]))
        stream = await open_to(transport, peer, b"e")
        await stream.send([b"unharmed"])
        with trio.fail_after(SECONDS):
            assert await exactly(stream, 8) == b"unharmed"
        assert peer.process.poll() is None


async def test_silent_strangers_do_not_lock_newcomers_out() -> None:
    async with pair(210) as (transport, peer):
        port = int(peer.addresses[0].split("/")[4])
        strangers = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(300)]
        try:
            started = time.perf_counter()
            stream = await open_to(transport, peer, b"e")
            print(f"a newcomer among 300 silent connections: {(time.perf_counter() - started) * 1e3:.1f} ms")
            assert time.perf_counter() - started < 2.0
            await stream.aclose()
        finally:
            for stranger in strangers:
                await stranger.aclose()


async def test_an_error_in_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with open_libp2p(identity(215)) as transport, open_kademlia(transport, server=True):
            raise KeyError("mine")


def test_importing_the_package_does_not_import_libp2p() -> None:
    check = "import sys, swarmlm.transport, swarmlm.transport.libp2p; sys.exit('libp2p' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0


async def test_leaving_closes_every_stream() -> None:
    async with open_libp2p(identity(220)) as host:
        ended = trio.Event()

        async def handler(stream: Stream) -> None:
            try:
                while await stream.receive():
                    pass
            except Unavailable:
                pass
            ended.set()

        host.set_handler(handler)
        async with open_libp2p(identity(221)) as guest:
            stream = await guest.open_stream(host.peer_id, host.addresses, timeout=SECONDS)
            await stream.send([b"x"])
        with trio.fail_after(SECONDS):
            await ended.wait()
        with pytest.raises((Closed, ConnectionLost)):
            await stream.receive()


async def test_two_peers_that_dial_each_other_at_once() -> None:
    async with open_libp2p(identity(230)) as one, open_libp2p(identity(231)) as two:
        one.set_handler(serve)
        two.set_handler(serve)

        async def talk(here: Transport, there: Transport) -> None:
            for _ in range(5):
                stream = await here.open_stream(there.peer_id, there.addresses, timeout=SECONDS)
                await stream.send([b"ehi"])
                assert await exactly(stream, 2) == b"hi"
                await stream.aclose()

        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(talk, one, two)
                    nursery.start_soon(talk, two, one)
