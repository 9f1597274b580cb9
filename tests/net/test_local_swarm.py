"""Hosts that somebody started for himself: they come, tell their pids, and are gone when he is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swarmlm.errors import ConfigError
from swarmlm.local_swarm import local_swarm
from tests.net.harness import END_SECONDS, START_SECONDS, environment
from tests.tiny import tiny_llama

PARENT = """
import sys
import trio
from swarmlm.local_swarm import local_swarm

async def main():
    async with local_swarm(sys.argv[1], 4, hosts=3, arguments=["--kv-memory", "64MiB"]) as hosts:
        print(*(f"{host.pid}/{host.start}:{host.end}" for host in hosts), flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"  # an orphan that ended may wait for init to notice
    except FileNotFoundError:
        return False


def test_hosts_leave_when_their_parent_is_killed(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment() | {"TMPDIR": str(tmp_path)},
    )
    pids: list[int] = []
    try:
        assert parent.stdout is not None
        started = time.monotonic()
        words = [word.split("/") for word in parent.stdout.readline().split()]
        assert time.monotonic() - started < START_SECONDS
        assert [span for _, span in words] == ["0:1", "1:2", "2:4"]
        pids = [int(pid) for pid, _ in words]
        assert all(alive(pid) for pid in pids)
        parent.kill()
        deadline = time.monotonic() + END_SECONDS
        while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(alive(pid) for pid in pids)
    finally:
        parent.kill()
        parent.communicate()
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


async def test_a_host_that_does_not_start_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="31 hosts cannot share 30 blocks"):
        async with local_swarm("smollm2", 30, hosts=31):
            pass
    with pytest.raises(ConfigError, match="a local host did not start: 'lots' is no size"):
        async with local_swarm("smollm2", 30, arguments=["--kv-memory", "lots"]):
            pass
