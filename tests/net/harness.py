"""Real hosts for tests: `swarmlm serve` processes on free loopback ports, waited for with bounds, ended by pid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from swarmlm.transport.identity import Identity

START_SECONDS = 120.0  # importing torch and loading a span, on a machine busy with other tests
END_SECONDS = 20.0  # a host leaves within its withdrawal deadline


def environment() -> dict[str, str]:
    """One compute thread a process: two hosts and a client share two cores."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb"}


def run_cli(*arguments: str, timeout: float = 180.0, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """`swarmlm ARGUMENTS` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "swarmlm.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        input=stdin,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class HostProcess:
    def __init__(self, folder: Path, name: str, arguments: Sequence[str]) -> None:
        self.name = name
        self.address_file = folder / f"{name}.address"
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "swarmlm.cli", "serve", *arguments, "--address-file", str(self.address_file)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(),
            )

    def wait_ready(self, seconds: float = START_SECONDS) -> str:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.address_file.exists():
                return self.address
            if self.process.poll() is not None:
                raise AssertionError(f"{self.name} exited with {self.process.returncode}:\n{self.output()}")
            time.sleep(0.05)
        raise AssertionError(f"{self.name} was not ready within {seconds} s:\n{self.output()}")

    @property
    def address(self) -> str:
        return self.address_file.read_text().strip()

    @property
    def peer(self) -> str:
        return self.address.rpartition("/p2p/")[2]

    @property
    def port(self) -> int:
        return int(self.address.split("/tcp/")[1].split("/")[0])

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(END_SECONDS)

    def terminate(self) -> int:
        """SIGTERM, and its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_SECONDS)


class LocalSwarm:
    """Start hosts, all members of one swarm; every process is gone after the `with` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts: list[HostProcess] = []

    def __enter__(self) -> LocalSwarm:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            if host.alive:
                host.process.kill()
        for host in self.hosts:
            host.process.wait(END_SECONDS)

    def serve(self, *arguments: str, model: str = "smollm2", peers: Sequence[str] | None = None) -> HostProcess:
        """Start a host without waiting for it. `peers` defaults to the first live host of this swarm, if any."""
        if peers is None:
            peers = [host.wait_ready() for host in self.hosts if host.alive][:1]
        join = ["--peers", ",".join(peers)] if peers else []
        host = HostProcess(self.folder, f"host{len(self.hosts)}", [model, "--threads", "1", *join, *arguments])
        self.hosts.append(host)
        return host

    def serve_spans(self, *spans: str) -> list[HostProcess]:
        """One ready host for each "A:B", started together: the first one's address is fixed beforehand."""
        key, port = self.folder / f"host{len(self.hosts)}.key", free_port()
        where = f"/ip4/127.0.0.1/tcp/{port}"
        seed = f"{where}/p2p/{Identity.load_or_create(key).peer_id}"
        hosts = [self.serve("--blocks", spans[0], "--listen", where, "--identity", str(key), peers=[])]
        hosts += [self.serve("--blocks", span, peers=[seed]) for span in spans[1:]]
        for host in hosts:
            host.wait_ready()
        return hosts

    @property
    def addresses(self) -> list[str]:
        return [host.address for host in self.hosts if host.alive and host.address_file.exists()]
