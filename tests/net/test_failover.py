"""Hosts die by SIGKILL in the middle of a sentence; the sentence stays the same."""

from __future__ import annotations

import signal
import time

import pytest
import trio

import swarmlm
from tests.net.conftest import PROMPTS, Reference
from tests.net.harness import HostProcess, LocalSwarm

NEW_TOKENS = 64


def serving(hosts: list[HostProcess], session, block: int) -> HostProcess:
    peer = next(hop.peer for hop in session.route() if hop.start <= block < hop.end)
    return next(host for host in hosts if host.peer == peer)


class Stopwatch:
    """Gaps between the tokens of an answer, in seconds."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.gaps: list[float] = []

    def lap(self) -> None:
        now = time.perf_counter()
        self.gaps.append(now - self.last)
        self.last = now


@pytest.mark.parametrize("kills", [(20,), (20, 40)], ids=["once", "twice"])
async def test_killed_replicas_do_not_change_a_token(
    swarm: LocalSwarm, reference: Reference, kills: tuple[int, ...]
) -> None:
    hosts = swarm.serve_spans("0:15", *["15:30"] * (len(kills) + 1))
    ids = reference.chat_ids(PROMPTS[2])
    events: list[str] = []
    async with (
        swarmlm.open_node([hosts[0].address]) as node,
        node.session("smollm2", max_length=256, on_event=lambda event: events.append(event.text)) as session,
    ):
        watch = Stopwatch()
        seen = 0
        async for _ in session.generate(ids, max_tokens=NEW_TOKENS):
            watch.lap()
            seen += 1
            if seen in kills:
                await trio.to_thread.run_sync(serving(hosts, session, 20).kill)
                watch.last = time.perf_counter()
        assert session.failovers == len(kills), events
        tokens = list(session.last.tokens)
    reference.assert_exact(ids, tokens, NEW_TOKENS)
    usual = sorted(watch.gaps)[len(watch.gaps) // 2]
    worst = sorted(watch.gaps[1:])[-len(kills) :]
    print(f"\ntokens equal; usual gap {usual * 1e3:.0f} ms, lost {', '.join(f'{gap - usual:.2f} s' for gap in worst)}")
    assert max(worst) < 10


async def test_when_the_only_holder_dies_the_session_waits_for_another(swarm: LocalSwarm, reference: Reference) -> None:
    hosts = swarm.serve_spans("0:15", "15:30")
    ids = reference.chat_ids(PROMPTS[2])
    events: list[swarmlm.SessionEvent] = []
    async with (
        swarmlm.open_node([hosts[0].address]) as node,
        node.session("smollm2", max_length=256, on_event=events.append) as session,
    ):
        seen = 0
        killed_at = 0.0
        async for _ in session.generate(ids, max_tokens=NEW_TOKENS):
            seen += 1
            if seen == 20:
                await trio.to_thread.run_sync(hosts[1].kill)
                killed_at = time.perf_counter()
                swarm.serve("--blocks", "15:30", peers=[hosts[0].address])
            elif killed_at and events and seen > 21:
                print(f"\nwaited {time.perf_counter() - killed_at:.1f} s: {[event.text for event in events]}")
                killed_at = 0.0
        tokens = list(session.last.tokens)
    assert any(event.kind == "waiting" and "15:30" in event.text for event in events)
    reference.assert_exact(ids, tokens, NEW_TOKENS)


async def test_a_stopped_process_is_noticed_and_left(swarm: LocalSwarm, reference: Reference) -> None:
    """SIGSTOP: the sockets stay open and silent, only heartbeats can tell."""
    hosts = swarm.serve_spans("0:15", "15:30", "15:30")
    ids = reference.chat_ids(PROMPTS[3])
    async with swarmlm.open_node([hosts[0].address]) as node, node.session("smollm2", max_length=256) as session:
        seen, started = 0, 0.0
        async for _ in session.generate(ids, max_tokens=32):
            seen += 1
            if seen == 10:
                serving(hosts, session, 20).process.send_signal(signal.SIGSTOP)
                started = time.perf_counter()
            elif seen == 12:
                print(f"\nleft a silent host after {time.perf_counter() - started:.1f} s")
        assert session.failovers == 1
        tokens = list(session.last.tokens)
    reference.assert_exact(ids, tokens, 32)
