"""A swarm of host processes on this machine, for a chat that was given no peers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from swarmlm.errors import ConfigError
from swarmlm.transport.identity import Identity

HOSTS = 2  # processes: the least that is a swarm
READY_SECONDS = 300.0  # importing and loading on a slow disk, a first download of weights included
LEAVE_SECONDS = 10.0  # after SIGTERM


@asynccontextmanager
async def local_swarm(model: str, blocks: int) -> AsyncIterator[list[str]]:
    """Serve all `blocks` of `model` by host processes of one thread each; yields their addresses.

    They end with the block, by pid. Raises `ConfigError` with a host's own last line if one does not start.
    """
    cuts = [blocks * number // HOSTS for number in range(HOSTS + 1)]
    with tempfile.TemporaryDirectory(prefix="swarmlm-") as name:
        folder = Path(name)
        hosts: list[subprocess.Popen[bytes]] = []
        try:
            key, port = folder / "first.key", _free_port()
            where = f"/ip4/127.0.0.1/tcp/{port}"
            seed = f"{where}/p2p/{Identity.load_or_create(key).peer_id}"
            for number in range(HOSTS):  # all at once: the first one's address is known before it listens
                place = ["--listen", where, "--identity", str(key)] if number == 0 else ["--peers", seed]
                hosts.append(_start(folder, number, model, cuts[number], cuts[number + 1], place))
            yield [await _address(folder, number, host) for number, host in enumerate(hosts)]
        finally:
            with trio.CancelScope(shield=True):
                await _end(hosts)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(folder: Path, number: int, model: str, start: int, end: int, place: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "swarmlm.cli", "serve", model, "--blocks", f"{start}:{end}", "--threads", "1"]
    command += ["--address-file", str(folder / f"{number}.address")]
    command += place
    with (folder / f"{number}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal stops an answer, not the hosts
            env=os.environ | {"OMP_NUM_THREADS": "1"},
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
