"""A session over healthy hosts: opening, refusals, rollback, reorder, padding, cancellation, closing."""

from __future__ import annotations

import pytest
import torch
import trio
from trio.testing import MockClock

from swarmlm.errors import BadStep, Closed, ContextTooLong, NoRoute, PoolFull, Unreachable, WrongModel
from swarmlm.routing.session import SessionEvent, SessionOptions, open_session
from tests.swarm.toy import FINGERPRINT, HIDDEN, LATENCY, MODEL, ToySwarm, toy_swarm, twin_session

THREE = ((0, 3), (3, 5), (5, 8))


async def test_a_chain_of_three_is_the_whole_model(autojump_clock: MockClock) -> None:
    async with toy_swarm(*THREE) as swarm:
        async with twin_session(swarm, 8, options=SessionOptions(chunk=4)) as twin:
            await twin.step(11)
            began = trio.current_time()
            for _ in range(5):
                await twin.step()
            assert trio.current_time() - began == pytest.approx(5 * (3 + 1) * LATENCY, rel=0.01)
            assert [hop[1:3] for hop in twin.session.route] == list(THREE)
            ways = [hop.ms / (1e3 * LATENCY) for hop in twin.session.route]
            assert ways == pytest.approx([2, 1, 1], rel=0.1)  # there and back, then what each adds to it
            assert [step[:2] for step in swarm.hosts[0].steps[:3]] == [(0, 4), (4, 4), (8, 3)]
            assert twin.session.failovers == 0
            history = twin.session.history(11)
            assert history is not None
            assert history.shape == (1, 11, HIDDEN)
            assert twin.session.history(0) is None
        assert not any(host.sessions for host in swarm.hosts)
        with pytest.raises(Closed):
            await twin.session.step(torch.ones(1, 1, HIDDEN))


async def test_overlapping_spans_are_entered_in_the_middle(autojump_clock: MockClock) -> None:
    async with toy_swarm((0, 5), (3, 8)) as swarm, twin_session(swarm, 8) as twin:
        await twin.step(4)
        await twin.step()
        assert sum(hop.end - hop.start for hop in twin.session.route) == 8


# ---- opening


async def expect_refusal(swarm: ToySwarm, kind: type[Exception], match: str, *, max_length: int = 64) -> float:
    """Seconds until opening 8 blocks failed in the expected way, leaving nothing reserved."""
    began = trio.current_time()
    with pytest.raises(kind, match=match):
        async with twin_session(swarm, 8, max_length=max_length):
            raise AssertionError("opened")
    assert not any(host.sessions for host in swarm.hosts)
    return trio.current_time() - began


async def test_a_hole_is_named_after_a_few_looks(autojump_clock: MockClock) -> None:
    async with toy_swarm((0, 3), (4, 8)) as swarm:
        assert await expect_refusal(swarm, NoRoute, r"no host serves block 3 \(3:4\)") < 4


async def test_a_swarm_that_cannot_be_asked(autojump_clock: MockClock) -> None:
    async with toy_swarm() as swarm:
        swarm.look_up_error = Unreachable("none of the given peers could be reached")
        assert await expect_refusal(swarm, Unreachable, "reached") < 4


async def test_a_host_found_late_is_waited_for(autojump_clock: MockClock) -> None:
    async with toy_swarm((0, 3)) as swarm, trio.open_nursery() as nursery:

        async def join() -> None:
            await trio.sleep(1.2)
            await swarm.add(3, 8)

        nursery.start_soon(join)
        async with twin_session(swarm, 8) as twin:
            await twin.step(3)


@pytest.mark.parametrize("told_room", [None, 10**9], ids=["told", "unknown before asking"])
async def test_a_full_pool_is_named_at_once(autojump_clock: MockClock, told_room: int | None) -> None:
    async with toy_swarm((0, 3)) as swarm:
        await swarm.add(3, 8, room=300, told_room=told_room)
        seconds = await expect_refusal(swarm, PoolFull, "needs 320 bytes, 300 free")
        assert seconds < 0.5
        with pytest.raises(PoolFull) as caught:
            async with twin_session(swarm, 8):
                pass
        assert caught.value.details == {"needed": 320, "free": 300}


async def test_a_full_host_takes_the_blocks_it_has_room_for(autojump_clock: MockClock) -> None:
    async with toy_swarm((0, 3)) as swarm:
        full = await swarm.add(3, 8, room=150, told_room=10**9)
        await swarm.add(3, 8, delay=0.01)
        async with twin_session(swarm, 8) as twin:
            await twin.step(3)
            assert [hop.end - hop.start for hop in twin.session.route if hop.peer == full.peer] == [2]


async def test_others_are_asked_if_one_refuses_or_is_gone(autojump_clock: MockClock) -> None:
    async with toy_swarm((0, 8), (0, 8), (0, 8)) as swarm:
        swarm.hosts[0].draining = True
        swarm.hosts[1].room = 10
        swarm.hosts[1].told_room = 10**9
        swarm.kill(swarm.hosts[2])
        good = await swarm.add(0, 8, delay=0.02)
        async with twin_session(swarm, 8) as twin:
            await twin.step(2)
            assert [hop.peer for hop in twin.session.route] == [good.peer]
        assert [peer for peer, _ in swarm.reported] == [swarm.hosts[2].peer]


async def test_a_host_that_the_second_plan_does_not_need_is_let_go(autojump_clock: MockClock) -> None:
    async with toy_swarm((0, 4), (4, 8)) as swarm:
        swarm.hosts[1].draining = True
        slow = await swarm.add(0, 8, delay=0.002)
        async with twin_session(swarm, 8) as twin:
            await twin.step(2)
            assert [hop.peer for hop in twin.session.route] == [slow.peer]
            assert not swarm.hosts[0].sessions


async def test_a_swarm_that_is_leaving(autojump_clock: MockClock) -> None:
    async with toy_swarm((0, 8)) as swarm:
        swarm.hosts[0].draining = True
        await expect_refusal(swarm, NoRoute, "this host is leaving")


async def test_another_model(autojump_clock: MockClock) -> None:
    async with toy_swarm((0, 8)) as swarm:
        with pytest.raises(WrongModel, match="are served here"):
            async with open_session(swarm, model=MODEL, fingerprint=FINGERPRINT + "x", blocks=8, max_length=9):
                pass


# ---- steps


async def test_rollback_goes_on_from_any_position(autojump_clock: MockClock) -> None:
    async with toy_swarm(*THREE) as swarm, twin_session(swarm, 8) as twin:
        await twin.step(9)
        for position in (8, 3, 4, 0, 2, 1):
            await twin.step(2, position=position)
        assert twin.session.position == 3


async def test_reordered_rows(autojump_clock: MockClock) -> None:
    async with toy_swarm(*THREE) as swarm, twin_session(swarm, 8, batch=3) as twin:
        await twin.step(5)
        for rows in ((0, 0, 2), (2, 1, 0), (0, 1, 2), (1, 1, 1)):
            await twin.step(hypo_ids=rows)
        await twin.step(2, position=4, hypo_ids=(2, 0, 1))


async def test_padding_is_remembered(autojump_clock: MockClock) -> None:
    async with toy_swarm(*THREE) as swarm, twin_session(swarm, 8, batch=3, options=SessionOptions(chunk=2)) as twin:
        await twin.step(5, padding=(2, 0, 3))
        await twin.step()
        assert twin.session.padding == (2, 0, 3)
        await twin.step(hypo_ids=(1, 1, 2))
        assert twin.session.padding == (0, 0, 3)
        await twin.step(3, position=0)
        assert twin.session.padding == ()


async def test_bad_steps_are_the_callers_and_cost_nothing(autojump_clock: MockClock) -> None:
    async with toy_swarm(*THREE) as swarm, twin_session(swarm, 8, max_length=10, batch=2) as twin:
        await twin.step(4)
        held, good = twin.session.position, torch.ones(2, 1, HIDDEN)
        for bad, position, kind in [
            (-good, None, BadStep),
            (good, 5, BadStep),
            (good, -1, BadStep),
            (good[:1], None, BadStep),
            (good[:, :0], None, BadStep),
            (good[0], None, BadStep),
            (good.double(), None, BadStep),
            (torch.ones(2, 7, HIDDEN), None, ContextTooLong),
        ]:
            with pytest.raises(kind):
                await twin.session.step(bad, position=position)
            assert twin.session.position == held
        for wrong in ({"padding": (1,)}, {"padding": (-1, 0)}, {"hypo_ids": (0, 2)}, {"hypo_ids": (0,)}):
            with pytest.raises(BadStep):
                await twin.session.step(good, **wrong)  # type: ignore[arg-type]
        await twin.step(6)
        assert twin.session.failovers == 0
        assert swarm.reported == []


async def test_a_cache_that_cannot_go_back_is_filled_anew(autojump_clock: MockClock) -> None:
    async with toy_swarm((0, 3)) as swarm:
        await swarm.add(3, 8, recurrent=True)
        async with twin_session(swarm, 8) as twin:
            await twin.step(6)
            await twin.step(2, position=4)
            await twin.step()
            with pytest.raises(BadStep, match="negative"):
                await twin.session.step(-torch.ones(1, 1, HIDDEN), position=3)
            await twin.step(position=3)
            assert twin.session.failovers == 0
            assert len(swarm.hosts[1].sessions) == 1


@pytest.mark.parametrize("hypo_ids", [(), (1, 1, 0)], ids=["append", "reorder"])
async def test_a_step_cancelled_at_any_moment_never_happened(
    autojump_clock: MockClock, hypo_ids: tuple[int, ...]
) -> None:
    """Three hops take 4 latencies + 3 x 4 ms = 32 ms, with a reorder 6 latencies: cancelled every 2 ms of it."""
    finished_at = 21 if hypo_ids else 16
    async with toy_swarm() as swarm:
        for start, end in THREE:
            await swarm.add(start, end, delay=0.004)
        events: list[SessionEvent] = []
        async with twin_session(swarm, 8, batch=3, max_length=4096, events=events) as twin:
            await twin.step(6, padding=(0, 1, 2))
            for number in range(24):
                with trio.move_on_after(0.001 + number * 0.002) as scope:
                    await twin.session.step(twin.tokens(2), hypo_ids=hypo_ids)
                assert scope.cancelled_caught == (number < finished_at), number
                if not scope.cancelled_caught:
                    await twin.step(1, position=0)  # the step was done: begin anew
                    await twin.step(5)
                assert twin.session.position == twin.local.position
                await twin.step(1, hypo_ids=hypo_ids)
                await twin.step(1)
            assert events == []
            assert [len(host.sessions) for host in swarm.hosts] == [1, 1, 1]


async def test_two_callers_take_turns(autojump_clock: MockClock) -> None:
    async with toy_swarm(*THREE) as swarm, twin_session(swarm, 8) as twin:
        outputs: dict[int, torch.Tensor] = {}
        hidden = twin.tokens(2)

        async def step(index: int) -> None:
            outputs[index] = await twin.session.step(hidden[:, index : index + 1])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(step, 0)
            await trio.sleep(LATENCY)
            nursery.start_soon(step, 1)
        assert torch.cat([outputs[0], outputs[1]], dim=1).equal(twin.local.run(hidden, 0))
