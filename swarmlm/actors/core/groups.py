"""Exceptions out of the groups that trio's nurseries put them in: a nursery is how we work, not what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def only(error: BaseException) -> BaseException:
    """The one exception inside nested groups of one; else the error itself."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def sole_error(error: Exception) -> Exception:
    """`only`, for what is known to be no cancellation or interrupt."""
    inner = only(error)
    return inner if isinstance(inner, Exception) else error


@contextmanager
def unwrapped() -> Iterator[None]:
    """The body's own exception comes out of the nurseries around it as it was raised."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = only(group)
        if error is group:
            raise
        raise error from error.__cause__
