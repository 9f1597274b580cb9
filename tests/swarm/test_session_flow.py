"""Steps that go from host to host, on virtual time: what they save, and what happens when a push is lost."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from swarmlm.routing.flow import PUSH_GRACE
from swarmlm.routing.session import SessionOptions
from tests.swarm.toy import LATENCY, toy_swarm, twin_session

THREE = ((0, 3), (3, 5), (5, 8))
PROMPT = 64 * 12  # tokens: a chunk for each hop and turn
LONG = 2 * PROMPT


async def test_a_step_takes_one_way_to_each_host_and_one_back(autojump_clock: MockClock) -> None:
    async with toy_swarm(*THREE) as swarm, twin_session(swarm, 8) as twin:
        await twin.step(5)
        began = trio.current_time()
        for _ in range(10):
            await twin.step()
        assert trio.current_time() - began == pytest.approx(10 * (3 + 1) * LATENCY, rel=0.01)
        assert [host.pushes for host in swarm.hosts] == [11, 11, 0]


async def test_without_push_it_takes_a_round_trip_to_each(autojump_clock: MockClock) -> None:
    async with toy_swarm(*THREE) as swarm, twin_session(swarm, 8, options=SessionOptions(push=False)) as twin:
        await twin.step(5)
        began = trio.current_time()
        for _ in range(10):
            await twin.step()
        assert trio.current_time() - began == pytest.approx(10 * 3 * 2 * LATENCY, rel=0.01)
        assert not any(host.pushes for host in swarm.hosts)


async def test_a_prompts_chunks_keep_all_hosts_busy(autojump_clock: MockClock) -> None:
    """Twelve chunks of 0.1 s at three hosts: 1.4 s at best, 3.6 s one after another."""
    async with toy_swarm() as swarm:
        for start, end in THREE:
            await swarm.add(start, end, delay=0.1)
        async with twin_session(swarm, 8, max_length=LONG) as twin:
            began = trio.current_time()
            await twin.step(PROMPT)
            assert trio.current_time() - began == pytest.approx(14 * 0.1, rel=0.1)
            assert all(len(host.steps) == 12 for host in swarm.hosts)
            await twin.step()


@pytest.mark.parametrize("spans", [(0,), (0, 1), (0, 1, 2)])
async def test_hosts_that_do_not_push_are_carried_for(autojump_clock: MockClock, spans: tuple[int, ...]) -> None:
    async with toy_swarm() as swarm:
        for number, (start, end) in enumerate(THREE):
            await swarm.add(start, end, pushing=number not in spans)
        async with twin_session(swarm, 8, max_length=LONG) as twin:
            for tokens in (PROMPT, 1, 1):
                await twin.step(tokens)
            assert twin.session.failovers == 0


async def test_hosts_that_cannot_reach_each_other_are_carried_for(autojump_clock: MockClock) -> None:
    """From the start, where no push is tried, and later, where the first ones are lost on the way."""
    async with toy_swarm(*THREE) as swarm:
        swarm.network.partition({swarm.hosts[0].peer}, {swarm.hosts[1].peer})
        async with twin_session(swarm, 8) as twin:
            for _ in range(5):
                await twin.step()
            assert swarm.hosts[0].pushes == 0
            swarm.network.partition({swarm.hosts[1].peer}, {swarm.hosts[2].peer})
            began = trio.current_time()
            await twin.step()
            assert PUSH_GRACE < trio.current_time() - began < 2 * PUSH_GRACE
            await twin.step(7)
            assert twin.session.failovers == 0
        assert not any(host.sessions for host in swarm.hosts)


@pytest.mark.parametrize("hop", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 5, 12])
async def test_a_host_dies_in_the_middle_of_a_prompt(autojump_clock: MockClock, hop: int, chunk: int) -> None:
    async with toy_swarm() as swarm:
        for start, end in THREE:
            await swarm.add(start, end, delay=0.01)
        async with twin_session(swarm, 8, max_length=LONG) as twin:
            doomed = swarm.at(twin.session, hop)
            await swarm.add(doomed.start, doomed.end, delay=0.01)

            def kill(step: object) -> None:
                if len(doomed.steps) == chunk - 1:
                    swarm.kill(doomed)

            doomed.before = kill
            await twin.step(PROMPT)
            assert twin.session.failovers == 1
            await twin.step()
            await twin.step(position=PROMPT - 100)


async def test_a_prompt_is_cancelled_and_another_takes_its_place(autojump_clock: MockClock) -> None:
    async with toy_swarm() as swarm:
        for start, end in THREE:
            await swarm.add(start, end, delay=0.01)
        async with twin_session(swarm, 8, max_length=LONG) as twin:
            await twin.step(3)
            for moment in (0.004, 0.02, 0.05, 0.09, 0.13):
                with trio.move_on_after(moment) as scope:
                    await twin.session.step(twin.tokens(PROMPT))
                assert scope.cancelled_caught
                await twin.step(2)
            assert twin.session.failovers == 0


async def test_a_dead_link_between_hosts_costs_one_wait(autojump_clock: MockClock) -> None:
    async with toy_swarm(*THREE) as swarm, twin_session(swarm, 8) as twin:
        await twin.step(3)
        await twin.step()
        swarm.network.partition({swarm.hosts[0].peer}, {swarm.hosts[1].peer})
        times = []
        for _ in range(6):
            began = trio.current_time()
            await twin.step()
            times.append(trio.current_time() - began)
        assert times[0] > PUSH_GRACE
        assert max(times[1:]) < 0.1
        assert twin.session.failovers == 0


async def test_a_prompt_with_more_padding_than_a_chunk(autojump_clock: MockClock) -> None:
    async with toy_swarm(*THREE) as swarm, twin_session(swarm, 8, batch=2, max_length=LONG) as twin:
        doomed = swarm.hosts[1]
        await swarm.add(doomed.start, doomed.end)
        await twin.step(PROMPT, padding=(200, 0))
        assert swarm.hosts[0].steps[0][:2] == (0, 201)
        swarm.kill(swarm.at(twin.session, 1))
        await twin.step()
        assert twin.session.failovers == 1
