"""What a user sees of an error: one line, never a traceback, unless it is a bug of ours."""

from __future__ import annotations

from swarmlm.errors import SwarmError


def one_line(error: BaseException) -> str | None:
    """The message of the error a user should read; None for a bug, which keeps its traceback."""
    while isinstance(error, BaseExceptionGroup):
        ours = [one for one in _leaves(error) if isinstance(one, SwarmError)]
        if not ours:
            return None
        error = ours[0]
    if isinstance(error, SwarmError):
        return " ".join(str(error).split())
    return None


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for one in group.exceptions:
        found += _leaves(one) if isinstance(one, BaseExceptionGroup) else [one]
    return found
