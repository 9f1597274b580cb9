"""Whatever callers and actor do, and in whatever order: bounds hold, order holds, every caller hears exactly once."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmlm.actors.core import Inbox, Mailbox, Request
from swarmlm.actors.core.ref import LocalRef
from swarmlm.errors import ActorCrashed, Busy, Closed, DeadlineExceeded, SwarmError
from tests.unit.core_roles import Add, CounterRole

SIZE = 3

operations = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.sampled_from([0.5, 2.0, 1000.0])),
        st.tuples(st.just("offer"), st.just(1000.0)),
        st.tuples(st.just("cast"), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 8)),
        st.tuples(st.just("get"), st.just(0)),
        st.tuples(st.just("take"), st.integers(0, 4)),
        st.tuples(st.just("answer"), st.integers(0, 8)),
        st.tuples(st.just("fail"), st.integers(0, 8)),
        st.tuples(st.just("crash"), st.just(0)),
        st.tuples(st.just("sleep"), st.sampled_from([0.3, 1.0])),
    ),
    max_size=40,
)


class World:
    """One mailbox, its callers, and an actor that does what the operations say."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.mailbox: Mailbox[CounterRole] = Mailbox(SIZE)
        self.inbox = Inbox(self.mailbox)
        self.ref = LocalRef(self.mailbox)
        self.scopes: dict[int, trio.CancelScope] = {}
        self.outcomes: dict[int, object] = {}
        self.taken: list[Request] = []
        self.order: list[int] = []
        self.sent = 0

    async def _call(self, number: int, deadline: float, wait: bool) -> None:
        self.scopes[number] = trio.CancelScope()
        outcome: object = "cancelled"
        with self.scopes[number]:
            try:
                outcome = await self.ref.call(Add(number), deadline=deadline, wait=wait)
            except SwarmError as error:
                outcome = type(error)
        assert number not in self.outcomes
        self.outcomes[number] = outcome

    async def _cast(self, number: int) -> None:
        try:
            await self.ref.cast(Add(number), wait=False)
        except Busy:
            assert len(self.mailbox) == SIZE

    def _take(self, requests: list[Request]) -> None:
        assert not any(request.abandoned for request in requests)
        self.taken += requests
        self.order += [request.message.amount for request in requests]

    async def do(self, name: str, value: float) -> None:
        chosen = self.taken[int(value) % len(self.taken)] if self.taken else None
        match name:
            case "call" | "offer":
                self.nursery.start_soon(self._call, self.sent, value, name == "call")
                self.sent += 1
            case "cast":
                self.nursery.start_soon(self._cast, self.sent)
                self.sent += 1
            case "cancel" if self.scopes:
                list(self.scopes.values())[int(value) % len(self.scopes)].cancel()
            case "get" if len(self.mailbox):
                with trio.move_on_after(0.1):
                    self._take([await self.inbox.get()])
            case "take":
                self._take(self.inbox.take_nowait(int(value)))
            case "answer" if chosen:
                chosen.answer(chosen.message.amount)
            case "fail" if chosen:
                chosen.fail(DeadlineExceeded("chosen"))
            case "crash":
                self.mailbox.fail_taken(ValueError("a bug"))
                self.taken.clear()
            case "sleep":
                await trio.sleep(value)
        await trio.testing.wait_all_tasks_blocked()
        assert len(self.mailbox) <= SIZE


@settings(max_examples=300, deadline=None)
@given(operations)
def test_every_caller_hears_exactly_once(script):
    async def main() -> World:
        async with trio.open_nursery() as nursery:
            world = World(nursery)
            for name, value in script:
                await world.do(name, value)
            world.mailbox.close()
        return world

    world = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert world.outcomes.keys() == world.scopes.keys()
    assert world.order == sorted(world.order)
    assert len(set(world.order)) == len(world.order)
    kinds = {"cancelled", Busy, Closed, ActorCrashed, DeadlineExceeded}
    assert all(outcome in kinds or outcome == number for number, outcome in world.outcomes.items())
    assert not world.mailbox._taken
    assert not world.mailbox._waiting
    assert not world.mailbox._blocked


async def test_waiting_senders_get_places_in_their_order(autojump_clock):
    mailbox: Mailbox[CounterRole] = Mailbox(1)
    inbox = Inbox(mailbox)
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(LocalRef(mailbox).cast, Add(number))
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Busy):
            await LocalRef(mailbox).cast(Add(99), wait=False)
        assert [(await inbox.get()).message.amount for _ in range(5)] == [0, 1, 2, 3, 4]


async def test_a_cancelled_get_loses_nothing(autojump_clock):
    mailbox: Mailbox[CounterRole] = Mailbox(2)
    inbox = Inbox(mailbox)
    for _ in range(3):
        with trio.move_on_after(1) as scope:
            await inbox.get()
        assert scope.cancelled_caught
    await LocalRef(mailbox).cast(Add(1))
    with trio.CancelScope() as scope:
        scope.cancel()
        await inbox.get()
    assert scope.cancelled_caught
    assert (await inbox.get()).message == Add(1)


def test_a_mailbox_needs_room():
    with pytest.raises(ValueError, match="at least one message"):
        Mailbox(0)
