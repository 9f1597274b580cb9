"""The client's record of what one hop was given: enough to rebuild that hop's caches anywhere, token for token.

Rows are [batch, tokens, hidden], by position. A rollback truncates. A reorder (beam search) is only noted, not carried
out: copying the record at each beam step would cost more than the step. It is applied when rows are read, so taking it
back is free, which an interrupted step needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from swarmlm.errors import BadStep

GROWTH = 2  # times the space when it runs out: each row is copied once on average

Rows = tuple[int, ...]


class Reorder(NamedTuple):
    """Row r of everything before `position` is, from then on, what row rows[r] was."""

    position: int
    rows: Rows


class Mark(NamedTuple):
    """A moment of a journal, see `Journal.mark`."""

    position: int
    reorders: tuple[Reorder, ...]
    padding: Rows


class Journal:
    """`max_length` bounds the space, in tokens; it is taken as it is needed."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._position = 0
        self._reorders: tuple[Reorder, ...] = ()
        self._padding: Rows = ()
        self._space: torch.Tensor | None = None

    @property
    def position(self) -> int:
        """Tokens recorded."""
        return self._position

    @property
    def padding(self) -> Rows:
        """Left-pad tokens of each row, as last given; () if none were."""
        return self._padding

    def append(self, hidden: torch.Tensor, padding: Rows = ()) -> None:
        """Record a copy of `hidden` [batch, tokens, hidden] at the end. Raises `BadStep` if it does not fit."""
        end = self._position + hidden.shape[1]
        if end > self._max_length:
            raise BadStep(f"{end} tokens do not fit a journal of {self._max_length}")
        space = self._grown(hidden, end)
        space[:, self._position : end] = hidden
        self._position = end
        self._padding = padding or self._padding

    def rollback(self, position: int) -> None:
        """Forget everything from `position` on. Reorders stay: they happened to what remains, too."""
        if not 0 <= position <= self._position:
            raise BadStep(f"cannot go back to position {position} of {self._position}")
        self._position = position
        self._reorders = _joined(one._replace(position=min(one.position, position)) for one in self._reorders)
        if position == 0:
            self._padding = ()

    def reorder(self, rows: Rows) -> None:
        """From now on row r is what row rows[r] was (the hosts' `hypo_ids`)."""
        self._reorders = _joined((*self._reorders, Reorder(self._position, rows)))
        self._padding = taken(self._padding, rows)

    def mark(self) -> Mark:
        """This moment, for `restore`: it holds as long as nothing before its position is overwritten."""
        return Mark(self._position, self._reorders, self._padding)

    def restore(self, mark: Mark) -> None:
        """Back to `mark`: what was appended or reordered since is forgotten."""
        self._position, self._reorders, self._padding = mark

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Positions [start, end) in today's row order: [batch, end - start, hidden]; a view if none was reordered."""
        if self._space is None or not 0 <= start < end <= self._position:
            raise BadStep(f"positions {start}:{end} are not in a journal of {self._position}")
        pieces = []
        for low, high, order in self._stretches():
            low, high = max(low, start), min(high, end)
            if low < high:
                piece = self._space[:, low:high]
                pieces.append(piece if order is None else piece[list(order)])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def chunks(self, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(position, rows) of at most `size` tokens each, from the beginning: the replay.

        The first may be longer: it reaches past all padding.
        """
        start, end = 0, max(size, max(self._padding, default=0) + 1)
        while start < self._position:
            yield start, self.rows(start, min(end, self._position))
            start, end = end, end + size

    def _stretches(self) -> list[tuple[int, int, Rows | None]]:
        """(start, end, row order) of the stretches between reorders; None is the order in which they are stored."""
        found: list[tuple[int, int, Rows | None]] = []
        high = self._position
        order: Rows | None = None
        for one in reversed(self._reorders):
            found.append((one.position, high, order))
            order = one.rows if order is None else taken(one.rows, order)
            high = one.position
        found.append((0, high, order))
        return found[::-1]

    def _grown(self, hidden: torch.Tensor, end: int) -> torch.Tensor:
        space = self._space
        if space is None or (self._position == 0 and not _alike(space, hidden)):
            space = hidden.new_empty((hidden.shape[0], end, hidden.shape[2]))
        elif not _alike(space, hidden):
            raise BadStep(f"a step of {_kind(hidden)} after steps of {_kind(space)}")
        if end > space.shape[1]:
            size = min(self._max_length, max(end, GROWTH * space.shape[1]))
            larger = space.new_empty((space.shape[0], size, space.shape[2]))
            larger[:, : self._position] = space[:, : self._position]
            space = larger
        self._space = space
        return space


def taken(values: Rows, rows: Rows) -> Rows:
    """`values` in the order `rows`; none stay none."""
    return tuple(values[row] for row in rows) if values else ()


def _joined(reorders: Iterable[Reorder]) -> tuple[Reorder, ...]:
    """Reorders at the same position in one; those of nothing dropped."""
    joined: list[Reorder] = []
    for one in reorders:
        if joined and joined[-1].position == one.position:
            one = Reorder(one.position, taken(joined.pop().rows, one.rows))
        if one.position > 0:
            joined.append(one)
    return tuple(joined)


def _alike(space: torch.Tensor, hidden: torch.Tensor) -> bool:
    return space.dtype == hidden.dtype and space.shape[0] == hidden.shape[0] and space.shape[2] == hidden.shape[2]


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.shape[0]} rows x {tensor.shape[2]} {str(tensor.dtype).removeprefix('torch.')}"
