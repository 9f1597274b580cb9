"""A swarm of host processes on this machine, for a chat without peers and for benchmarks. Called by cli and bench."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from swarmlm.errors import ConfigError
from swarmlm.transport.identity import Identity

HOSTS = 2  # processes: the least that is a swarm
READY_SECONDS = 300.0  # importing and loading on a slow disk, a first download of weights included
LEAVE_SECONDS = 10.0  # after SIGTERM


@dataclass(frozen=True)
class LocalHost:
    """One ready process: blocks [start, end), where it is reached, and its pid."""

    pid: int
    address: str
    start: int
    end: int


@asynccontextmanager
async def local_swarm(
    model: str,
    blocks: int,
    *,
    hosts: int = HOSTS,
    threads: int = 1,
    arguments: Sequence[str] = (),
    each: Sequence[Sequence[str]] = (),
) -> AsyncIterator[list[LocalHost]]:
    """Serve all `blocks` of `model` by `hosts` processes of `threads` compute threads; yields them in block order.

    `arguments` are further ones of `swarmlm serve` for every host, `each[number]` for one of them; they win over those
    made here. The processes end with the block, by pid, and by themselves when this process is gone, however it went.
    Raises `ConfigError` with a host's own last line if one does not start.
    """
    if not 1 <= hosts <= blocks:
        raise ConfigError(f"{hosts} hosts cannot share {blocks} blocks")
    cuts = [blocks * number // hosts for number in range(hosts + 1)]
    with tempfile.TemporaryDirectory(prefix="swarmlm-") as name:
        folder = Path(name)
        processes: list[subprocess.Popen[bytes]] = []
        try:
            key, port = folder / "first.key", free_port()
            where = f"/ip4/127.0.0.1/tcp/{port}"
            seed = f"{where}/p2p/{Identity.load_or_create(key).peer_id}"
            for number in range(hosts):  # all at once: the first one's address is known before it listens
                place = ["--listen", where, "--identity", str(key)] if number == 0 else ["--peers", seed]
                own = [*place, *arguments, *(each[number] if number < len(each) else ())]
                span = f"{cuts[number]}:{cuts[number + 1]}"
                processes.append(_start(folder, number, [model, "--blocks", span, "--threads", str(threads), *own]))
            yield [
                LocalHost(process.pid, await _address(folder, number, process), cuts[number], cuts[number + 1])
                for number, process in enumerate(processes)
            ]
        finally:
            with trio.CancelScope(shield=True):
                await _end(processes)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(folder: Path, number: int, arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "swarmlm.cli", "serve", *arguments]
    command += ["--address-file", str(folder / f"{number}.address"), "--leave-at-eof"]
    with (folder / f"{number}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # held open, never written: it ends with this process
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal stops an answer, not the hosts
            env=os.environ | {"OMP_NUM_THREADS": arguments[arguments.index("--threads") + 1]},
        )


async def _address(folder: Path, number: int, host: subprocess.Popen[bytes]) -> str:
    file = folder / f"{number}.address"
    with trio.move_on_after(READY_SECONDS):
        while not file.exists():
            if host.poll() is not None:
                lines = (folder / f"{number}.log").read_text(errors="replace").strip().splitlines()
                reason = lines[-1].removeprefix("swarmlm: error: ") if lines else f"exit status {host.returncode}"
                raise ConfigError(f"a local host did not start: {reason}")
            await trio.sleep(0.05)
        return file.read_text().strip()
    raise ConfigError(f"a local host was not ready within {READY_SECONDS:g} s")


async def _end(hosts: list[subprocess.Popen[bytes]]) -> None:
    for host in hosts:
        with contextlib.suppress(ProcessLookupError):
            host.send_signal(signal.SIGTERM)
    for host in hosts:
        with trio.move_on_after(LEAVE_SECONDS):
            while host.poll() is None:
                await trio.sleep(0.02)
        if host.poll() is None:
            host.kill()
            host.wait()
        if host.stdin is not None:
            host.stdin.close()
