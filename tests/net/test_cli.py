"""The commands as a person runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

from tests.net.conftest import PROMPTS, Reference
from tests.net.harness import LocalSwarm, environment, run_cli


def test_chat_without_peers_starts_its_own_swarm_and_answers_paris() -> None:
    done = run_cli("chat", "--prompt", PROMPTS[0], "--max-tokens", "24")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_serve_chat_status_and_a_clean_leave(swarm: LocalSwarm, reference: Reference) -> None:
    first, second = swarm.serve_spans("0:18", "12:30")
    assert first.address in first.output()
    assert f"--peers {first.address}" in first.output()

    done = run_cli("chat", "--peers", first.address, "--prompt", PROMPTS[3], "--max-tokens", "32", "--json")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    answer = json.loads(done.stdout)
    assert set(answer) >= {"text", "tokens", "tokens_per_second", "route", "failovers"}
    reference.assert_exact(reference.chat_ids(PROMPTS[3]), answer["tokens"], 32)
    assert answer["failovers"] == 0
    assert answer["route"][0]["start"] == 0
    assert answer["route"][-1]["end"] == 30
    assert {hop["peer"] for hop in answer["route"]} == {first.peer, second.peer}
    assert answer["tokens_per_second"] > 0

    status = json.loads(run_cli("status", "--peers", second.address, "--json").stdout)
    assert {(host["start"], host["end"]) for host in status["hosts"]} == {(0, 18), (12, 30)}
    assert status["holes"] == []

    assert second.terminate() == 0
    assert "Traceback" not in second.output()
    status = json.loads(run_cli("status", "--peers", first.address, "--json").stdout)
    assert status["holes"] == [[18, 30]]
    assert first.terminate() == 0


def test_a_conversation_from_a_pipe(pair: LocalSwarm) -> None:
    script = "What is the capital of France?\nAnd of Italy?\n/route\n/stats\n/reset\n/nonsense\n/help\n/quit\n"
    done = run_cli("chat", "--peers", pair.addresses[0], "--max-tokens", "24", stdin=script)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "Rome" in done.stdout
    assert "answers: 2" in done.stdout
    assert "there is no /nonsense" in done.stderr
    assert "0:15" in done.stdout
    assert "15:30" in done.stdout


def test_sigterm_ends_a_local_swarm_with_its_children() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "swarmlm.cli", "chat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write("Say hello.\n")
    process.stdin.flush()
    children = wait_for_children(process.pid, 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert not [pid for pid in children if os.path.exists(f"/proc/{pid}")]


def wait_for_children(pid: int, count: int) -> list[int]:
    import time

    for _ in range(600):
        with open(f"/proc/{pid}/task/{pid}/children") as children:
            found = [int(child) for child in children.read().split()]
        if len(found) >= count:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{pid} started {found} instead of {count} children")
