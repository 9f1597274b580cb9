"""The journal holds what a hop was given, compared with doing every append, rollback and reorder on a plain tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swarmlm.errors import BadStep
from swarmlm.routing.journal import Journal

MAX_LENGTH = 24


class JournalMachine(RuleBasedStateMachine):
    """`plain` is the model: a tensor that is cut, indexed and concatenated at once."""

    @initialize(batch=st.integers(1, 3))
    def begin(self, batch: int) -> None:
        self.batch = batch
        self.journal = Journal(MAX_LENGTH)
        self.plain = torch.empty(batch, 0, 2)
        self.padding: tuple[int, ...] = ()
        self.number = 0.0

    @rule(tokens=st.integers(1, 5), padded=st.booleans(), data=st.data())
    def append(self, tokens: int, padded: bool, data: st.DataObject) -> None:
        rows = torch.arange(self.batch * tokens * 2).reshape(self.batch, tokens, 2) + self.number
        self.number += 1000.0
        if self.plain.shape[1] + tokens > MAX_LENGTH:
            with pytest.raises(BadStep, match="do not fit"):
                self.journal.append(rows)
            return
        padding = tuple(data.draw(st.integers(0, 3)) for _ in range(self.batch)) if padded else ()
        self.journal.append(rows, padding)
        rows += 1  # the journal keeps a copy
        self.plain = torch.cat([self.plain, rows - 1], dim=1)
        self.padding = padding or self.padding

    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, self.plain.shape[1]))
        self.journal.rollback(position)
        self.plain = self.plain[:, :position]
        self.padding = self.padding if position else ()

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = tuple(data.draw(st.integers(0, self.batch - 1)) for _ in range(self.batch))
        self.journal.reorder(rows)
        self.plain = self.plain[list(rows)]
        self.padding = tuple(self.padding[row] for row in rows) if self.padding else ()

    @precondition(lambda self: self.plain.shape[1] + 3 <= MAX_LENGTH)
    @rule(data=st.data())
    def step_that_is_given_up(self, data: st.DataObject) -> None:
        mark = self.journal.mark()
        self.journal.reorder(tuple(data.draw(st.integers(0, self.batch - 1)) for _ in range(self.batch)))
        self.journal.append(torch.full((self.batch, 3, 2), -1.0))
        self.journal.restore(mark)

    @invariant()
    def the_same_as_plain(self) -> None:
        if not hasattr(self, "journal"):
            return
        held = self.plain.shape[1]
        assert self.journal.position == held
        assert self.journal.padding == self.padding
        if held:
            assert self.journal.rows(0, held).equal(self.plain)
            assert self.journal.rows(held // 2, held).equal(self.plain[:, held // 2 :])
        replayed = list(self.journal.chunks(5))
        assert [position for position, _ in replayed] == list(range(0, held, 5))
        if replayed:
            assert torch.cat([rows for _, rows in replayed], dim=1).equal(self.plain)


TestJournal = JournalMachine.TestCase
TestJournal.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(st.integers(1, 7))
def test_chunks_are_of_the_size_asked_for(size: int) -> None:
    journal = Journal(20)
    journal.append(torch.randn(1, 20, 2))
    assert [rows.shape[1] for _, rows in journal.chunks(size)] == [size] * (20 // size) + [20 % size] * bool(20 % size)


def test_an_empty_journal_has_nothing_to_replay() -> None:
    journal = Journal(8)
    assert list(journal.chunks(4)) == []
    with pytest.raises(BadStep, match="positions 0:1 are not in a journal of 0"):
        journal.rows(0, 1)


def test_rows_of_another_kind_are_refused_and_nothing_is_lost() -> None:
    journal = Journal(8)
    first = torch.randn(1, 2, 4)
    journal.append(first)
    for other in (torch.randn(1, 1, 5), torch.randn(2, 1, 4), torch.randn(1, 1, 4).half()):
        with pytest.raises(BadStep, match="after steps of 1 rows x 4 float32"):
            journal.append(other)
    assert journal.rows(0, 2).equal(first)
    journal.rollback(0)
    journal.append(torch.randn(1, 3, 5))
    assert journal.position == 3


def test_a_rollback_cannot_go_forward() -> None:
    journal = Journal(8)
    with pytest.raises(BadStep, match="position 1 of 0"):
        journal.rollback(1)


def test_appending_one_by_one_moves_each_row_about_once() -> None:
    journal = Journal(100_000)
    row = torch.zeros(1, 1, 4)
    spaces = set()
    for _ in range(4096):
        journal.append(row)
        spaces.add(journal.rows(0, 1).data_ptr())
    assert len(spaces) <= 13
