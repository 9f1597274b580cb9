"""Hosts that live but forget, crash, answer nonsense, hang or refuse in the middle of a session."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from swarmlm.errors import BadStep, Busy, DeadlineExceeded, NoRoute, RemoteFailure
from swarmlm.protocol import Step
from swarmlm.routing.session import SessionEvent, SessionOptions
from tests.swarm.toy import toy_swarm, twin_session

SPANS = ((0, 3), (3, 5), (5, 8))
TWICE = (*SPANS, *SPANS)


async def test_a_host_that_forgot_the_session_is_given_it_again(autojump_clock: MockClock) -> None:
    events: list[SessionEvent] = []
    async with toy_swarm(*TWICE) as swarm, twin_session(swarm, 8, batch=2, events=events) as twin:
        await twin.step(5)
        host = swarm.at(twin.session, 1)
        host.sessions.clear()
        await twin.step(hypo_ids=(1, 0))
        assert swarm.at(twin.session, 1) is host
        assert twin.session.failovers == 0
        assert events == []


async def test_a_host_that_keeps_forgetting_is_left(autojump_clock: MockClock) -> None:
    async with toy_swarm(*TWICE) as swarm, twin_session(swarm, 8) as twin:
        host = swarm.at(twin.session, 1)
        host.before = lambda step: host.sessions.clear()
        await twin.step(5)
        assert swarm.at(twin.session, 1) is not host
        assert twin.session.failovers == 1


async def test_a_crashing_host_is_left(autojump_clock: MockClock) -> None:
    async with toy_swarm(*TWICE) as swarm, twin_session(swarm, 8) as twin:
        host = swarm.at(twin.session, 1)

        def bug(step: Step) -> None:
            raise ZeroDivisionError

        host.after = bug
        await twin.step(5)
        await twin.step()
        assert [(peer, type(error)) for peer, error in swarm.reported] == [(host.peer, RemoteFailure)]
        assert not host.sessions


async def test_a_step_that_crashes_every_host_ends(autojump_clock: MockClock) -> None:
    async with toy_swarm(*TWICE) as swarm, twin_session(swarm, 8, options=SessionOptions(patience=40)) as twin:
        await twin.step(5)

        def bug(step: Step) -> None:
            if step.position == 5:
                raise ZeroDivisionError

        for host in swarm.hosts[1::3]:
            host.before = bug
        began = trio.current_time()
        with pytest.raises(NoRoute):
            await twin.step()
        assert 40 <= trio.current_time() - began < 60
        assert len(swarm.reported) < 20


async def test_an_answer_of_the_wrong_shape_is_a_failure(autojump_clock: MockClock) -> None:
    async with toy_swarm(*TWICE) as swarm, twin_session(swarm, 8) as twin:
        host = swarm.at(twin.session, 1)

        def lose_a_token(step: Step) -> None:
            cache = host.sessions[step.session]
            cache.inputs = {block: held[:, :-1] for block, held in cache.inputs.items()}

        host.after = lose_a_token
        await twin.step(5)
        assert twin.session.failovers == 1


async def test_a_host_that_hangs_but_lives_is_left_at_the_deadline(autojump_clock: MockClock) -> None:
    async with toy_swarm(*TWICE) as swarm, twin_session(swarm, 8, options=SessionOptions(step_timeout=30)) as twin:
        await twin.step(5)
        host = swarm.at(twin.session, 1)
        host.delay = 1e6
        began = trio.current_time()
        await twin.step()
        assert 30 <= trio.current_time() - began < 32
        assert [(peer, type(error)) for peer, error in swarm.reported] == [(host.peer, DeadlineExceeded)]


@pytest.mark.parametrize(("times", "failovers"), [(3, 0), (9, 1)])
async def test_a_busy_host_is_asked_again_for_a_while(autojump_clock: MockClock, times: int, failovers: int) -> None:
    async with toy_swarm(*TWICE) as swarm, twin_session(swarm, 8, batch=2) as twin:
        await twin.step(5)
        host, left = swarm.at(twin.session, 1), times

        def busy(step: Step) -> None:
            nonlocal left
            left -= 1
            if left >= 0:
                raise Busy("the mailbox is full")

        host.before = busy
        await twin.step(hypo_ids=(1, 0))
        assert twin.session.failovers == failovers


async def test_a_failed_step_on_one_hop_leaves_the_others_at_rest(autojump_clock: MockClock) -> None:
    async with toy_swarm(*SPANS) as swarm, twin_session(swarm, 8) as twin:
        await twin.step(5)
        last = swarm.hosts[2]

        def refuse(step: Step) -> None:
            last.before = lambda step: None
            raise BadStep("not this one")

        last.before = refuse
        with pytest.raises(BadStep, match="not this one"):
            await twin.session.step(twin.tokens(2))
        assert twin.session.position == 5
        await twin.step(3)
        assert [step[0] for step in swarm.hosts[0].steps] == [0, 5, 5]
