"""Whatever is typed or sent, the answer is one clear line, and a host that was healthy stays exact."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import struct
from pathlib import Path

import pytest
import trio

import swarmlm
from tests.net.conftest import PROMPTS, Reference
from tests.net.harness import HostProcess, LocalSwarm, run_cli
from tests.tiny import tiny_llama


@pytest.fixture
def hosts(pair: LocalSwarm) -> list[HostProcess]:
    return pair.hosts


def one_line(*arguments: str, timeout: float = 120.0) -> str:
    """The single line of an expected failure."""
    done = run_cli(*arguments, timeout=timeout)
    assert done.returncode not in (0, None), done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("swarmlm: error: "), lines[0]
    return lines[0]


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(folder)
    return folder


def test_a_span_that_runs_backwards() -> None:
    assert "20:10" in one_line("serve", "--blocks", "20:10")


def test_a_span_past_the_last_block() -> None:
    line = one_line("serve", "--blocks", "0:99")
    assert "0:99" in line
    assert "30 blocks" in line


def test_an_unknown_model() -> None:
    assert "no-such-model" in one_line("serve", "no-such-model")
    assert "no-such/model" in one_line("chat", "no-such/model", "--prompt", "hello")


def test_a_corrupt_shard(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    shard = broken / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert "model.safetensors" in one_line("serve", str(broken))


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in one_line("serve", "--listen", f"/ip4/127.0.0.1/tcp/{port}")


def test_unreachable_peers(hosts: list[HostProcess]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nobody = f"/ip4/127.0.0.1/tcp/{port}/p2p/{hosts[0].peer}"
    assert "reached" in one_line("chat", "--peers", nobody, "--prompt", "hello")
    assert "reached" in one_line("serve", "--peers", nobody)
    assert "reached" in one_line("status", "--peers", nobody)


def test_no_host_for_block_seven(swarm: LocalSwarm) -> None:
    swarm.serve_spans("0:7", "8:30")
    line = one_line("chat", "--peers", ",".join(swarm.addresses), "--prompt", "hello")
    assert "block 7" in line or "7:8" in line


def test_a_prompt_longer_than_the_context(hosts: list[HostProcess]) -> None:
    line = one_line("chat", "--peers", hosts[0].address, "--prompt", "word " * 9000)
    assert "8192" in line.replace(",", "")


def test_the_hosts_are_alive_and_exact_after_random_and_truncated_frames(
    hosts: list[HostProcess], reference: Reference
) -> None:
    random.seed(7)
    for host in hosts:
        for number in range(500):
            with socket.create_connection(("127.0.0.1", host.port), timeout=5) as raw:
                raw.sendall(random.choice(GARBAGE)(random.randbytes(random.randrange(1, 400)), number))
    trio.run(send_bad_frames, hosts)
    assert all(host.alive for host in hosts), [host.output() for host in hosts]
    assert all("Traceback" not in host.output() for host in hosts)
    ids = reference.chat_ids(PROMPTS[0])
    done = run_cli("chat", "--peers", hosts[0].address, "--prompt", PROMPTS[0], "--max-tokens", "24", "--json")
    answer = json.loads(done.stdout)
    reference.assert_exact(ids, answer["tokens"], 24)
    assert "Paris" in answer["text"]


GARBAGE = [
    lambda data, number: data,
    lambda data, number: b"\x13/multistream/1.0.0\n" + data,
    lambda data, number: b"\x13/multistream/1.0.0\n\x07/noise\n" + data,
    lambda data, number: struct.pack("<2sBBIHI", b"SL", 1, 0, 2**31, 60000, number) + data,
]


async def send_bad_frames(hosts: list[HostProcess]) -> None:
    """1,000 random and truncated frames over proper streams: past the handshake, into our own decoder."""
    from swarmlm.actors.core.message import Blob, Call
    from swarmlm.protocol import Address, PeerId, Step, Tensor, encode
    from swarmlm.transport.frames import encode_frame
    from swarmlm.transport.identity import Identity
    from swarmlm.transport.libp2p import open_libp2p

    step = Step(b"x" * 16, 0, 0, Tensor("float32", (1, 2, 4), Blob(bytes(32))))
    whole = b"".join(bytes(part) for part in encode_frame(*encode(Call(1, 1.0, step))))
    async with open_libp2p(Identity.generate()) as transport:
        for number in range(1000):
            host = hosts[number % len(hosts)]
            stream = await transport.open_stream(PeerId(host.peer), [Address(host.address)], timeout=20)
            bad = bytearray(whole)
            if number % 3 == 0:
                bad = bytearray(random.randbytes(random.randrange(1, 200)))
            elif number % 3 == 1:
                bad = bad[: random.randrange(1, len(bad))]
            else:
                bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
            with contextlib.suppress(swarmlm.SwarmError):
                await stream.send([bytes(bad)])
            await stream.aclose()
