"""Refs: what you hold instead of an actor. A local and a remote one are used alike and raise alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import trio

from swarmlm.actors.core.mailbox import Mailbox, Request
from swarmlm.actors.core.message import Message
from swarmlm.actors.core.promise import Promise
from swarmlm.errors import DeadlineExceeded

A = TypeVar("A")
R = TypeVar("R")


class Ref(ABC, Generic[A]):
    """Where to send messages of role A. Holding it neither keeps the actor alive nor gives access to its state."""

    @abstractmethod
    async def call(self, message: Message[A, R], *, deadline: float, wait: bool = True) -> R:
        """Send `message` and wait for the reply, at most `deadline` seconds from now.

        A full mailbox makes the sender wait, or raises `Busy` with wait=False. Raises what the handler raised if that
        is a `SwarmError`; `ActorCrashed` (`RemoteFailure` over a link) for any other exception; `DeadlineExceeded`;
        `Closed` when the actor or the link was stopped, `ConnectionLost` when the link broke. If the deadline passes
        or the caller is cancelled, the queued message is dropped or the running handler cancelled, remotely too.
        """

    @abstractmethod
    async def cast(self, message: Message[A, Any], *, wait: bool = True) -> None:
        """Send `message` and forget it: delivered at most once, its errors are only logged.

        Returns when it is queued. Raises `Closed` or `ConnectionLost`; `Busy` if the queue is full and wait=False.
        """


class LocalRef(Ref[A]):
    """A ref to an actor of this process. It stays valid when the supervisor restarts the actor."""

    def __init__(self, mailbox: Mailbox[A]) -> None:
        self._mailbox = mailbox

    def __repr__(self) -> str:
        return f"<Ref {self._mailbox.name}>"

    async def call(self, message: Message[A, R], *, deadline: float, wait: bool = True) -> R:
        promise = Promise()
        request = Request(message, trio.current_time() + deadline, promise)
        with trio.CancelScope(deadline=request.deadline):
            try:
                await self._mailbox.put(request, wait=wait)
                answer: R = await promise.wait()
                return answer
            finally:
                request.abandon()
        raise DeadlineExceeded(
            f"{self._mailbox.name} did not answer {type(message).__name__} within {deadline:g} seconds"
        )

    async def cast(self, message: Message[A, Any], *, wait: bool = True) -> None:
        await self._mailbox.put(Request(message), wait=wait)
