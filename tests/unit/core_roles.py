"""Messages and small actors shared by the tests of the actor core."""

from __future__ import annotations

import trio

from swarmlm.actors.core import Actor, Body, Message, Ok, handles
from swarmlm.errors import PoolFull


class CounterRole:
    pass


class Total(Body, tag="total", frozen=True):
    value: int


class Add(Message[CounterRole, Total], tag="add", frozen=True):
    amount: int


class Sleep(Message[CounterRole, Ok], tag="sleep", frozen=True):
    seconds: float


class Refuse(Message[CounterRole, Ok], tag="refuse", frozen=True):
    pass


class Break(Message[CounterRole, Ok], tag="break", frozen=True):
    pass


class BreakInside(Message[CounterRole, Ok], tag="break_inside", frozen=True):
    """Fails in a nursery of the handler's own; `refuse` picks an error of ours or a bug."""

    refuse: bool


class Unknown(Message[CounterRole, Ok], tag="unknown", frozen=True):
    pass


class Counter(Actor[CounterRole]):
    """Adds numbers; `events` outlives its restarts."""

    mailbox_size = 3

    def __init__(self, events: list[str] | None = None) -> None:
        self.total = 0
        self.events = events if events is not None else []

    async def started(self) -> None:
        self.events.append("started")

    async def stopped(self) -> None:
        await trio.sleep(0.1)
        self.events.append("stopped")

    @handles(Add)
    async def add(self, message: Add) -> Total:
        self.total += message.amount
        return Total(self.total)

    @handles(Sleep)
    async def sleep(self, message: Sleep) -> Ok:
        self.events.append(f"sleep {message.seconds:g}")
        try:
            await trio.sleep(message.seconds)
        except trio.Cancelled:
            self.events.append(f"cancelled at {trio.current_time():g}")
            raise
        return Ok()

    @handles(Refuse)
    async def refuse(self, message: Refuse) -> Ok:
        raise PoolFull("no room", needed=7, free=3)

    @handles(Break)
    async def break_(self, message: Break) -> Ok:
        raise ValueError("a bug")

    @handles(BreakInside)
    async def break_inside(self, message: BreakInside) -> Ok:
        async def fail() -> None:
            raise PoolFull("no room", needed=7, free=3) if message.refuse else ValueError("a bug")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
        return Ok()
