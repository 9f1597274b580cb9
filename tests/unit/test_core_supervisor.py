"""Lives and deaths of supervised actors, on virtual time."""

from __future__ import annotations

import logging

import pytest
import trio

from swarmlm.actors.core import Actor, Inbox, Ref, open_supervisor
from swarmlm.actors.core.supervisor import STOP_GRACE
from swarmlm.errors import ActorCrashed, Closed, ModelNotFound
from tests.unit.core_roles import Add, Break, Counter, CounterRole, Sleep, Total


async def crash(ref: Ref[CounterRole]) -> None:
    with pytest.raises(ActorCrashed):
        await ref.call(Break(), deadline=1.0)


class SlowStart(Counter):
    async def started(self) -> None:
        await trio.sleep(3)
        await super().started()


async def test_start_returns_when_started_has(autojump_clock):
    events: list[str] = []
    async with open_supervisor() as supervisor:
        await supervisor.start(lambda: SlowStart(events))
        assert trio.current_time() == 3.0
        assert events == ["started"]


class NoStart(Counter):
    async def started(self) -> None:
        raise ModelNotFound("no such model: nosuch")


async def test_an_error_of_started_reaches_start_and_nothing_else(autojump_clock):
    events: list[str] = []
    async with open_supervisor() as supervisor:
        other = await supervisor.start(Counter)
        with pytest.raises(ModelNotFound, match="nosuch"):
            await supervisor.start(lambda: NoStart(events))
        assert events == ["stopped"]
        assert await other.call(Add(1), deadline=1.0) == Total(1)


async def test_an_error_inside_a_nursery_of_started_comes_out_bare():
    class NurseryStart(NoStart):
        async def started(self) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(super().started)

    async with open_supervisor() as supervisor:
        with pytest.raises(ModelNotFound, match="nosuch"):
            await supervisor.start(NurseryStart)


async def test_an_error_of_the_factory_reaches_start():
    async with open_supervisor() as supervisor:
        with pytest.raises(ZeroDivisionError):
            await supervisor.start(lambda: Counter([str(1 // 0)]))


async def test_a_cancelled_start_leaves_nothing_behind(autojump_clock):
    events: list[str] = []
    async with open_supervisor() as supervisor:
        with trio.move_on_after(1):
            await supervisor.start(lambda: SlowStart(events))
        assert events == ["stopped"]


async def test_stop_waits_for_stopped_and_closes_the_callers(autojump_clock):
    events: list[str] = []
    async with open_supervisor() as supervisor, trio.open_nursery() as nursery:
        ref = await supervisor.start(lambda: Counter(events))

        async def expect_closed(seconds: float) -> None:
            with pytest.raises(Closed, match="Counter has stopped"):
                await ref.call(Sleep(seconds), deadline=60.0)

        for _ in range(1 + Counter.mailbox_size + 2):
            nursery.start_soon(expect_closed, 30.0)
        await trio.sleep(1)
        await supervisor.stop(ref)
        assert trio.current_time() == pytest.approx(1.1)
        assert events[-1] == "stopped"
        with pytest.raises(Closed):
            await ref.call(Add(1), deadline=1.0)
        await supervisor.stop(ref)


async def test_leaving_the_block_stops_the_last_started_first():
    order: list[str] = []

    class Named(Counter):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        async def stopped(self) -> None:
            order.append(self.name)

    async with open_supervisor() as supervisor:
        for name in "abc":
            await supervisor.start(lambda name=name: Named(name))
    assert order == ["c", "b", "a"]
    with pytest.raises(Closed):
        await supervisor.start(Counter)


async def test_an_exception_of_the_body_comes_out_bare_after_the_actors_stopped(autojump_clock):
    events: list[str] = []

    async def body() -> None:
        async with open_supervisor() as supervisor:
            await supervisor.start(lambda: Counter(events))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await body()
    assert events == ["started", "stopped"]


async def test_cancelling_the_block_lets_stopped_run(autojump_clock):
    events: list[str] = []
    with trio.move_on_after(1) as scope:
        async with open_supervisor() as supervisor:
            await supervisor.start(lambda: Counter(events))
            await trio.sleep(60)
    assert scope.cancelled_caught
    assert events == ["started", "stopped"]


async def test_stopped_is_bounded(autojump_clock, caplog):
    class NeverStops(Counter):
        async def stopped(self) -> None:
            await trio.sleep_forever()

    async with open_supervisor() as supervisor:
        ref = await supervisor.start(NeverStops)
        await supervisor.stop(ref)
    assert trio.current_time() == STOP_GRACE
    assert "did not stop within 5 s" in caplog.text


async def test_an_error_of_stopped_is_logged_only(caplog):
    class BadStop(Counter):
        async def stopped(self) -> None:
            raise ValueError("at the end")

    async with open_supervisor() as supervisor:
        await supervisor.start(BadStop)
    assert "at the end" in caplog.text


async def test_restarts_are_counted_within_the_window_only(autojump_clock, caplog):
    caplog.set_level(logging.CRITICAL)
    async with open_supervisor(max_restarts=2, within=10.0) as supervisor:
        ref = await supervisor.start(Counter)
        for _ in range(6):
            await crash(ref)
            await trio.sleep(6)
        assert await ref.call(Add(3), deadline=1.0) == Total(3)


async def test_too_many_crashes_end_the_block(autojump_clock, caplog):
    caplog.set_level(logging.CRITICAL)
    events: list[str] = []
    others: list[Ref[CounterRole]] = []

    async def body() -> None:
        async with open_supervisor(max_restarts=2, within=10.0) as supervisor:
            others.append(await supervisor.start(lambda: Counter(events)))
            ref = await supervisor.start(Counter, name="host")
            for _ in range(3):
                await crash(ref)
            try:
                await trio.sleep(60)
            finally:
                events.append(f"body ended at {trio.current_time():.1f}")

    with pytest.raises(ActorCrashed, match="host crashed after 2 restarts within 10 s") as caught:
        await body()
    assert isinstance(caught.value.__cause__, ValueError)
    assert events == ["started", "body ended at 0.3", "stopped"]
    with pytest.raises(Closed):
        await others[0].call(Add(1), deadline=1.0)


async def test_a_restart_that_fails_counts_as_a_crash(autojump_clock, caplog):
    caplog.set_level(logging.CRITICAL)
    lives = iter([Counter, NoStart, Counter])
    async with open_supervisor() as supervisor:
        ref = await supervisor.start(lambda: next(lives)())
        await crash(ref)
        assert await ref.call(Add(2), deadline=1.0) == Total(2)


async def test_a_factory_that_fails_at_restarts_ends_the_block(autojump_clock, caplog):
    caplog.set_level(logging.CRITICAL)
    lives = iter([Counter])

    async def body() -> None:
        async with open_supervisor() as supervisor:
            await crash(await supervisor.start(lambda: next(lives)()))
            await trio.sleep(60)

    with pytest.raises(ActorCrashed, match="after 3 restarts"):
        await body()


async def test_a_task_beside_the_handlers_crashes_its_actor(autojump_clock, caplog):
    caplog.set_level(logging.CRITICAL)
    lives: list[float] = []

    class WithSweeper(Counter):
        async def run(self, inbox: Inbox[CounterRole]) -> None:
            lives.append(trio.current_time())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.sweep)
                await super().run(inbox)

        async def sweep(self) -> None:
            await trio.sleep(5)
            if len(lives) == 1:
                raise OSError("disk")

    async with open_supervisor() as supervisor:
        ref = await supervisor.start(WithSweeper)
        with pytest.raises(ActorCrashed, match="OSError"):
            await ref.call(Sleep(20.0), deadline=60.0)
        await ref.call(Sleep(20.0), deadline=60.0)
    assert lives == [0.0, pytest.approx(5.1)]


async def test_an_actor_may_stop_another_or_itself(autojump_clock):
    class Stopper(Actor[CounterRole]):
        async def run(self, inbox: Inbox[CounterRole]) -> None:
            await inbox.get()
            await supervisor.stop(victim)
            await supervisor.stop(me)

    async with open_supervisor() as supervisor:
        victim = await supervisor.start(Counter)
        me = await supervisor.start(Stopper)
        with pytest.raises(Closed):
            await me.call(Add(1), deadline=1.0)
        with pytest.raises(Closed):
            await victim.call(Add(1), deadline=1.0)
