"""The base class of actors, and `@handles`, which says which method answers which message.

One message is handled at a time unless `run` is overridden, so a handler may trust the actor's state across its awaits.
It runs in a scope that ends at the caller's deadline, or when the caller goes away: like any trio code, it may be
cancelled at each await.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Generic, TypeVar

from swarmlm.actors.core.groups import sole_error
from swarmlm.actors.core.mailbox import Inbox, Request
from swarmlm.actors.core.message import Message
from swarmlm.errors import DeadlineExceeded, ProtocolError, SwarmError

A = TypeVar("A")
R = TypeVar("R")
S = TypeVar("S")

log = logging.getLogger("swarmlm.actors")


def handles(
    kind: type[Message[Any, R]],
) -> Callable[[Callable[[S, Any], Awaitable[R]]], Callable[[S, Any], Awaitable[R]]]:
    """Mark the method that answers messages of exactly this type. A type checker checks what it returns."""

    def mark(method: Callable[[S, Any], Awaitable[R]]) -> Callable[[S, Any], Awaitable[R]]:
        method.__handles__ = kind  # type: ignore[attr-defined]
        return method

    return mark


class Actor(Generic[A]):
    """State, a mailbox and a lifetime of its own. A is its role: the receiver that its message types name."""

    mailbox_size: int = 64  # requests waiting; beyond it local senders wait and the wire answers `Busy`
    _handlers: ClassVar[dict[type[Any], str]] = {}  # method names, so that a subclass may override the method

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = {method.__handles__: name for name, method in vars(cls).items() if hasattr(method, "__handles__")}
        cls._handlers = cls._handlers | own

    async def started(self) -> None:
        """Prepare. The actor counts as started when this returns; an exception at the first start reaches `start`."""

    async def stopped(self) -> None:
        """Clean up: runs at every exit, also after a crash or a failed `started`; shielded, for a bounded time."""

    async def run(self, inbox: Inbox[A]) -> None:
        """Handle requests one by one until cancelled. Returning stops the actor for good.

        Override it to batch (take requests, `answer` or `fail` each), or to run tasks beside the handlers:

            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.sweep)
                await super().run(inbox)
        """
        while True:
            await self.handle(await inbox.get())

    async def handle(self, request: Request) -> None:
        """Answer one request by its handler. A `SwarmError` goes to the caller; any other exception is a crash."""
        message = request.message
        method = self._handlers.get(type(message))
        if method is None:
            request.fail(ProtocolError(f"{type(self).__name__} does not handle {type(message).__name__}"))
            return
        try:
            with request.work() as scope:
                request.answer(await getattr(self, method)(message))
        except Exception as error:
            said = sole_error(error)
            if not isinstance(said, SwarmError):
                request.fail(said)
                raise
            if request.is_cast:
                log.warning("%s refused %s: %s", type(self).__name__, type(message).__name__, said)
            request.fail(said)
        else:
            if scope.cancelled_caught:
                request.fail(DeadlineExceeded(f"{type(message).__name__} was cancelled at its deadline"))
