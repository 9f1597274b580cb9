"""Calls, casts, deadlines and cancellation of local actors, on virtual time."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

from swarmlm.actors.core import Actor, Inbox, Ok, Request, handles, open_supervisor
from swarmlm.errors import ActorCrashed, Busy, Closed, DeadlineExceeded, PoolFull, ProtocolError
from tests.unit.core_roles import Add, Break, BreakInside, Counter, CounterRole, Refuse, Sleep, Total, Unknown


async def test_calls_are_handled_in_order_and_answered():
    async with open_supervisor() as supervisor:
        ref = await supervisor.start(Counter)
        totals = [(await ref.call(Add(n), deadline=1.0)).value for n in range(5)]
    assert totals == [0, 1, 3, 6, 10]


async def test_a_cast_is_handled_before_a_later_call():
    async with open_supervisor() as supervisor:
        ref = await supervisor.start(Counter)
        await ref.cast(Add(40))
        assert await ref.call(Add(2), deadline=1.0) == Total(42)


async def test_a_refusal_reaches_the_caller_unchanged_and_the_actor_lives_on():
    async with open_supervisor() as supervisor:
        ref = await supervisor.start(Counter)
        await ref.call(Add(1), deadline=1.0)
        for message in (Refuse(), BreakInside(refuse=True)):
            with pytest.raises(PoolFull) as caught:
                await ref.call(message, deadline=1.0)
            assert (caught.value.needed, caught.value.free) == (7, 3)
        assert await ref.call(Add(1), deadline=1.0) == Total(2)


async def test_a_refused_cast_is_only_logged(caplog):
    async with open_supervisor() as supervisor:
        ref = await supervisor.start(Counter)
        with caplog.at_level(logging.WARNING, "swarmlm.actors"):
            await ref.cast(Refuse())
            assert await ref.call(Add(1), deadline=1.0) == Total(1)
    assert "no room" in caplog.text


async def test_a_message_that_nobody_handles_is_a_protocol_error():
    async with open_supervisor() as supervisor:
        ref = await supervisor.start(Counter)
        with pytest.raises(ProtocolError, match="does not handle Unknown"):
            await ref.call(Unknown(), deadline=1.0)


async def test_the_deadline_cancels_the_running_handler(autojump_clock):
    events: list[str] = []
    async with open_supervisor() as supervisor:
        ref = await supervisor.start(lambda: Counter(events))
        with pytest.raises(DeadlineExceeded, match="did not answer Sleep within 2 seconds"):
            await ref.call(Sleep(10.0), deadline=2.0)
        assert trio.current_time() == 2.0
        assert await ref.call(Add(1), deadline=1.0) == Total(1)
        assert trio.current_time() == 2.0
    assert events == ["started", "sleep 10", "cancelled at 2", "stopped"]


async def test_a_deadline_of_nothing_never_reaches_the_actor(autojump_clock):
    events: list[str] = []
    async with open_supervisor() as supervisor:
        ref = await supervisor.start(lambda: Counter(events))
        for deadline in (0.0, -1.0):
            with pytest.raises(DeadlineExceeded):
                await ref.call(Sleep(1.0), deadline=deadline)
    assert events == ["started", "stopped"]


async def test_a_cancelled_caller_cancels_the_running_handler_and_drops_the_queued(autojump_clock):
    events: list[str] = []
    async with open_supervisor() as supervisor, trio.open_nursery() as nursery:
        ref = await supervisor.start(lambda: Counter(events))

        async def call_for_two_seconds() -> None:
            with trio.move_on_at(2.0):
                await ref.call(Sleep(30.0), deadline=60.0)

        nursery.start_soon(call_for_two_seconds)
        nursery.start_soon(call_for_two_seconds)
        await trio.sleep(1)
        assert await ref.call(Add(1), deadline=2.0) == Total(1)
        assert trio.current_time() == 2.0
    assert events == ["started", "sleep 30", "cancelled at 2", "stopped"]


async def test_a_full_mailbox_refuses_or_waits_within_the_deadline(autojump_clock):
    async with open_supervisor() as supervisor, trio.open_nursery() as nursery:
        ref = await supervisor.start(Counter)
        for _ in range(1 + Counter.mailbox_size):
            nursery.start_soon(lambda: ref.call(Sleep(10.0), deadline=100.0))
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Busy, match="3 messages are waiting"):
            await ref.call(Add(1), deadline=1.0, wait=False)
        with pytest.raises(Busy):
            await ref.cast(Add(1), wait=False)
        with pytest.raises(DeadlineExceeded):
            await ref.call(Add(1), deadline=1.0)
        assert trio.current_time() == 1.0
        await ref.cast(Add(5))
        assert trio.current_time() == 10.0
        assert await ref.call(Add(1), deadline=100.0) == Total(6)
        assert trio.current_time() == 40.0


async def test_abandoned_messages_free_their_places(autojump_clock):
    async with open_supervisor() as supervisor, trio.open_nursery() as nursery:
        ref = await supervisor.start(Counter)
        nursery.start_soon(lambda: ref.call(Sleep(10.0), deadline=100.0))
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(1):
            async with trio.open_nursery() as impatient:
                for _ in range(Counter.mailbox_size + 2):
                    impatient.start_soon(lambda: ref.call(Add(1000), deadline=100.0))
        assert await ref.call(Add(1), deadline=100.0, wait=False) == Total(1)


async def test_a_crash_answers_its_caller_and_keeps_the_waiting_messages(caplog, autojump_clock):
    events: list[str] = []
    async with open_supervisor() as supervisor, trio.open_nursery() as nursery:
        ref = await supervisor.start(lambda: Counter(events), name="counter 7")
        await ref.call(Add(5), deadline=1.0)
        outcomes: list[object] = []

        async def keep(message: Break | Add) -> None:
            try:
                outcomes.append(await ref.call(message, deadline=5.0))
            except ActorCrashed as error:
                outcomes.append(str(error))

        for message in (Break(), Add(1)):
            nursery.start_soon(keep, message)
            await trio.sleep(0.01)
    assert outcomes == ["counter 7 crashed (ValueError); its log tells more", Total(1)]
    assert events == ["started", "stopped", "started", "stopped"]
    assert "actor counter 7 crashed and is restarted" in caplog.text
    assert "ValueError: a bug" in caplog.text


async def test_a_bug_inside_a_handlers_nursery_is_a_crash_too():
    async with open_supervisor() as supervisor:
        ref = await supervisor.start(Counter)
        with pytest.raises(ActorCrashed, match="ValueError"):
            await ref.call(BreakInside(refuse=False), deadline=1.0)
        assert await ref.call(Add(1), deadline=1.0) == Total(1)


async def test_an_error_while_being_cancelled_does_not_hurt_the_actor(autojump_clock):
    lives: list[float] = []

    class Untidy(Counter):
        async def started(self) -> None:
            lives.append(trio.current_time())

        async def sleep(self, message: Sleep) -> Ok:
            async def tidy_up_badly() -> None:
                try:
                    await trio.sleep_forever()
                finally:
                    raise PoolFull("at the end")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(tidy_up_badly)
                nursery.start_soon(trio.sleep_forever)
            return Ok()

    async with open_supervisor() as supervisor:
        ref = await supervisor.start(Untidy)
        with pytest.raises(DeadlineExceeded):
            await ref.call(Sleep(1.0), deadline=1.0)
        assert await ref.call(Add(1), deadline=1.0) == Total(1)
    assert lives == [0.0]


async def test_an_actor_may_handle_many_at_once(autojump_clock):
    class Concurrent(Counter):
        async def run(self, inbox: Inbox[CounterRole]) -> None:
            async with trio.open_nursery() as nursery:
                while True:
                    nursery.start_soon(self.handle, await inbox.get())

    async with open_supervisor() as supervisor, trio.open_nursery() as nursery:
        ref = await supervisor.start(Concurrent)
        for _ in range(20):
            nursery.start_soon(lambda: ref.call(Sleep(10.0), deadline=11.0))
        assert await ref.call(Add(1), deadline=1.0) == Total(1)
        with trio.move_on_after(1):
            await ref.call(Sleep(60.0), deadline=100.0)
        await trio.sleep(9)
        assert trio.current_time() == 10.0


class Doubling(Counter):
    async def add(self, message: Add) -> Total:
        return Total(2 * message.amount)


class Forgetful(Counter):
    @handles(Unknown)
    async def unknown(self, message: Unknown) -> Ok:
        return Ok()


async def test_handlers_are_inherited_and_may_be_overridden():
    async with open_supervisor() as supervisor:
        doubling = await supervisor.start(Doubling)
        forgetful = await supervisor.start(Forgetful)
        assert await doubling.call(Add(4), deadline=1.0) == Total(8)
        assert await forgetful.call(Add(4), deadline=1.0) == Total(4)
        assert await forgetful.call(Unknown(), deadline=1.0) == Ok()
        with pytest.raises(ProtocolError):
            await doubling.call(Unknown(), deadline=1.0)


class Batching(Actor[CounterRole]):
    """Sums what arrives within a second; crashes on a sum over 100, forgets negative sums, ends at exactly 50."""

    def __init__(self, batches: list[list[Request]]) -> None:
        self.batches = batches

    async def run(self, inbox: Inbox[CounterRole]) -> None:
        while True:
            first = await inbox.get()
            await trio.sleep(1)
            batch = [first, *inbox.take_nowait(3)]
            self.batches.append(batch)
            wanted = [request for request in batch if not request.abandoned]
            total = sum(request.message.amount for request in wanted)
            if total > 100:
                raise ValueError("too much")
            if total == 50:
                return
            for request in wanted if total >= 0 else []:
                request.answer(Total(total))


async def gather(ref, amounts: list[int], deadline: float = 10.0) -> list[object]:
    outcomes: dict[int, object] = {}

    async def call(index: int, amount: int) -> None:
        await trio.sleep(index / 1000)
        try:
            outcomes[index] = (await ref.call(Add(amount), deadline=deadline)).value
        except (ActorCrashed, Closed, DeadlineExceeded) as error:
            outcomes[index] = type(error)

    async with trio.open_nursery() as nursery:
        for index, amount in enumerate(amounts):
            nursery.start_soon(call, index, amount)
    return [outcomes[index] for index in range(len(amounts))]


async def test_a_batching_actor_takes_what_waits_up_to_its_limit(autojump_clock):
    batches: list[list[Request]] = []
    async with open_supervisor() as supervisor:
        ref = await supervisor.start(lambda: Batching(batches))
        assert await gather(ref, [1, 2, 3, 4, 5]) == [10, 10, 10, 10, 5]
    assert [[r.message.amount for r in batch] for batch in batches] == [[1, 2, 3, 4], [5]]


async def test_a_batching_actor_sees_who_gave_up(autojump_clock):
    batches: list[list[Request]] = []
    async with open_supervisor() as supervisor, trio.open_nursery() as nursery:
        ref = await supervisor.start(lambda: Batching(batches))
        nursery.start_soon(gather, ref, [1000], 0.5)
        await trio.sleep(0.1)
        nursery.start_soon(gather, ref, [2000], 0.5)
        await trio.sleep(0.1)
        assert await gather(ref, [7]) == [7]
    (batch,) = batches
    assert [(r.message.amount, r.abandoned) for r in batch] == [(1000, True), (7, False)]


async def test_seconds_left_count_down(autojump_clock):
    batches: list[list[Request]] = []
    async with open_supervisor() as supervisor:
        ref = await supervisor.start(lambda: Batching(batches))
        await gather(ref, [1])
        (request,) = batches[0]
        assert request.seconds_left == 9.0
        await trio.sleep(30)
        assert request.seconds_left == 0.0


async def test_a_crash_of_a_batch_reaches_everybody_in_it(autojump_clock):
    batches: list[list[Request]] = []
    async with open_supervisor() as supervisor:
        ref = await supervisor.start(lambda: Batching(batches))
        assert await gather(ref, [60, 60, 1, 1, 9]) == [ActorCrashed] * 4 + [9]


async def test_an_actor_that_returns_is_closed_also_for_those_it_left_unanswered(autojump_clock):
    batches: list[list[Request]] = []
    async with open_supervisor() as supervisor:
        ref = await supervisor.start(lambda: Batching(batches))
        assert await gather(ref, [25, 25, 0, 0, 3]) == [Closed] * 5
        with pytest.raises(Closed):
            await ref.cast(Add(1))


async def test_a_batching_actor_may_hand_a_bug_to_one_caller_and_live_on():
    class Judging(Batching):
        async def run(self, inbox: Inbox[CounterRole]) -> None:
            while True:
                request = await inbox.get()
                request.fail(ValueError("private"))
                request.answer(Total(0))

    async with open_supervisor(max_restarts=0) as supervisor:
        ref = await supervisor.start(lambda: Judging([]), name="judge")
        for _ in range(2):
            with pytest.raises(ActorCrashed, match=r"^judge crashed \(ValueError\); its log tells more$") as caught:
                await ref.call(Add(1), deadline=1.0)
            assert isinstance(caught.value.__cause__, ValueError)


async def test_a_request_that_is_never_answered_ends_at_its_deadline(autojump_clock):
    async with open_supervisor() as supervisor:
        ref = await supervisor.start(lambda: Batching([]))
        assert await gather(ref, [-5]) == [DeadlineExceeded]
        assert trio.current_time() == 10.0
