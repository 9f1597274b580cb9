"""What runs together: decode steps at once, long steps in slices and by turns, a session's steps in order."""

from __future__ import annotations

import math
from typing import Any

import torch

from swarmlm.actors.core import Request
from swarmlm.actors.schedule import DECODING_SECONDS, MAX_ROWS, SLICE_ROWS, WHOLE_ROWS, Held, Pending, Schedule
from swarmlm.protocol import Step

NOW = 100.0


class Desk:
    """A schedule and sessions by name."""

    def __init__(self) -> None:
        self.sessions: dict[bytes, Held] = {}
        self.schedule = Schedule(self.sessions)

    def session(self, name: str, *, decoded: float = -math.inf) -> Held:
        """The client is what comes before a slash, else the session itself."""
        cache: Any = name  # never looked into here
        client = name.partition("/")[0]
        return self.sessions.setdefault(name.encode(), Held(cache, 0, NOW, client, decoded))

    def step(self, name: str, tokens: int, *, rows: int = 1, ticket: int = 0, after: int = 0, **more: Any) -> Pending:
        hidden = torch.zeros(rows, tokens, 2)
        step = Step(name.encode().ljust(16), 0, 0, None, ticket=ticket, after=after, **more)
        pending = Pending(Request(step), step, self.session(name), hidden, NOW)
        self.schedule.add(pending)
        return pending

    def choose(self) -> list[tuple[Pending, int]]:
        return self.schedule.choose(NOW)


def test_all_decode_steps_run_together_up_to_a_limit() -> None:
    desk = Desk()
    steps = [desk.step(f"s{number}", 1) for number in range(MAX_ROWS + 5)]
    assert desk.choose() == [(step, 1) for step in steps[:MAX_ROWS]]


def test_a_wide_decode_step_is_not_starved_by_its_width() -> None:
    desk = Desk()
    wide = desk.step("wide", 1, rows=MAX_ROWS + 1)
    desk.step("other", 1)
    assert desk.choose() == [(wide, 1)]


def test_a_long_step_alone_is_taken_whole_and_beside_others_in_slices() -> None:
    desk = Desk()
    long = desk.step("long", 2000)
    assert desk.choose() == [(long, WHOLE_ROWS)]
    token = desk.step("token", 1)
    assert desk.choose() == [(token, 1), (long, SLICE_ROWS)]
    wide = Desk()
    pair = wide.step("pair", 2000, rows=2)
    wide.session("reader", decoded=NOW - DECODING_SECONDS / 2)  # its next token is about to come
    assert wide.choose() == [(pair, SLICE_ROWS // 2)]
    wide.sessions[b"reader"].decoded = NOW - 2 * DECODING_SECONDS
    assert wide.choose() == [(pair, WHOLE_ROWS // 2)]


def test_long_steps_take_turns() -> None:
    desk = Desk()
    one, other = desk.step("one", 100), desk.step("other", 100)
    seen = []
    for _ in range(4):
        (chosen, _), *_ = desk.choose()
        seen.append(chosen)
        desk.schedule.took_turn(chosen)
    assert seen == [one, other, one, other]


def test_a_client_with_many_sessions_gets_no_more_turns_than_others() -> None:
    desk = Desk()
    crowd = [desk.step(f"crowd/{number}", 1000) for number in range(3)]
    single = desk.step("single", 1000)
    seen = []
    for _ in range(6):
        (chosen, _), *_ = desk.choose()
        seen.append(chosen)
        desk.schedule.took_turn(chosen)
    assert seen == [crowd[0], single, crowd[1], single, crowd[2], single]


def test_a_crowd_of_decode_steps_leaves_room_for_others() -> None:
    desk = Desk()
    for number in range(MAX_ROWS + 10):
        desk.step(f"crowd/{number}", 1)
    single = desk.step("single", 1)
    chosen = [pending for pending, _ in desk.choose()]
    assert len(chosen) == MAX_ROWS
    assert chosen[1] is single


def test_a_sessions_steps_run_one_at_a_time_in_the_order_of_their_tickets() -> None:
    desk = Desk()
    second = desk.step("s", 1, ticket=2, after=1)
    assert desk.choose() == []  # number 1 is on its way
    first = desk.step("s", 8, ticket=1)
    assert desk.choose() == [(first, WHOLE_ROWS)]
    desk.schedule.remove(first)
    first.held.done = 1
    assert desk.choose() == [(second, 1)]


def test_slices_start_past_the_padding_and_reorder_once() -> None:
    desk = Desk()
    step = desk.step("s", 20, rows=2, padding=(0, 9), hypo_ids=(1, 0))
    first = step.slice(4)
    assert (first.hidden.shape[1], first.position, first.hypo_ids) == (10, 0, (1, 0))
    step.taken = 10
    rest = step.slice(4)
    assert (rest.hidden.shape[1], rest.position, rest.hypo_ids) == (4, 10, ())
