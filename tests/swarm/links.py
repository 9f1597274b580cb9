"""Connections over memory links, and what tests ask of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing

from swarmlm.actors.core import Connection, Message, Ref, memory_links
from swarmlm.actors.core.link import MemoryLink
from swarmlm.actors.core.message import Envelope
from swarmlm.errors import SwarmError
from tests.unit.core_roles import Add, Break, CounterRole, Refuse, Sleep

Routes = Mapping[type[Message[Any, Any]], Ref[Any]]


def routes(ref: Ref[CounterRole]) -> Routes:
    return dict.fromkeys((Add, Sleep, Refuse, Break), ref)


@asynccontextmanager
async def connected(
    ours: Routes | None = None, theirs: Routes | None = None, **options: Any
) -> AsyncIterator[tuple[Connection, Connection]]:
    """Two running connections, joined."""
    link_a, link_b = memory_links("alice", "bob")
    a, b = Connection(link_a, ours, **options), Connection(link_b, theirs, **options)
    async with trio.open_nursery() as nursery:
        await nursery.start(a.run)
        await nursery.start(b.run)
        yield a, b
        await a.aclose()
        await b.wait_closed()


@asynccontextmanager
async def raw(**options: Any) -> AsyncIterator[tuple[Connection, MemoryLink]]:
    """A running connection, and the bare other end of its link for the test to play the peer."""
    link_a, link_b = memory_links("alice", "bob")
    connection = Connection(link_a, **options)
    async with trio.open_nursery() as nursery:
        await nursery.start(connection.run)
        yield connection, link_b
        await connection.aclose()


async def outcome_of(ref: Ref[Any], message: Message[Any, Any], deadline: float = 1000.0) -> object:
    try:
        return await ref.call(message, deadline=deadline)
    except SwarmError as error:
        return error


async def call_until(ref: Ref[Any], message: Message[Any, Any], at: float) -> None:
    with trio.move_on_at(at):
        await ref.call(message, deadline=1000.0)


class Outcomes:
    """Calls running in tasks, and what became of each and when."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.found: list[tuple[float, object]] = []

    def call(self, ref: Ref[Any], message: Message[Any, Any], deadline: float = 1000.0) -> None:
        async def run() -> None:
            outcome = await outcome_of(ref, message, deadline)
            self.found.append((trio.current_time(), outcome))

        self.nursery.start_soon(run)


class SlowLink(MemoryLink):
    """A link whose sends take as long as the test says; `stuck` ones never end."""

    seconds = 0.0
    sent = 0

    async def send(self, envelope: Envelope) -> None:
        await trio.sleep(self.seconds)
        await super().send(envelope)
        self.sent += 1


def slow_links() -> tuple[SlowLink, MemoryLink]:
    link_a, link_b = memory_links("alice", "bob")
    return SlowLink(link_a.peer, link_a._out, link_a._into), link_b
