"""Supervision: actors run in a nursery, are replaced when they crash, and are stopped when the block ends.

A crash is any exception that escapes an actor's `run`, except a `SwarmError` raised by a handler. The actor's factory
is run again and the new actor takes over the mailbox, so refs stay valid and waiting messages are not lost; whoever was
being answered gets `ActorCrashed`. More than `max_restarts` restarts within `within` seconds, all actors together, mean
that restarting does not help: everything is stopped and the supervisor's block raises `ActorCrashed`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import trio

from swarmlm.actors.core.actor import Actor
from swarmlm.actors.core.groups import sole_error
from swarmlm.actors.core.mailbox import Inbox, Mailbox
from swarmlm.actors.core.ref import LocalRef, Ref
from swarmlm.errors import ActorCrashed, Closed

A = TypeVar("A")

STOP_GRACE = 5.0  # seconds for `stopped`: long enough to say goodbye to peers, short enough for a Ctrl-C

log = logging.getLogger("swarmlm.actors")


class _Child(Generic[A]):
    """One supervised actor through all its restarts."""

    def __init__(self, factory: Callable[[], Actor[A]], name: str | None) -> None:
        self.factory = factory
        self.actor = factory()
        self.name = name or type(self.actor).__name__
        self.mailbox: Mailbox[A] = Mailbox(self.actor.mailbox_size, self.name)
        self.ref: LocalRef[A] = LocalRef(self.mailbox)
        self.scope = trio.CancelScope()
        self.finished = trio.Event()
        self.ready = False

    async def live(self, task_status: Any) -> None:
        """One life of the actor, from `started` to `stopped`."""
        if self.ready:
            self.actor = self.factory()
        try:
            await self.actor.started()
            if not self.ready:
                self.ready = True
                task_status.started(self.ref)
            await self.actor.run(Inbox(self.mailbox))
        except Exception as error:
            self.mailbox.fail_taken(sole_error(error))
            raise
        finally:
            with trio.CancelScope(deadline=trio.current_time() + STOP_GRACE, shield=True) as grace:
                try:
                    await self.actor.stopped()
                except Exception:
                    log.exception("actor %s failed while stopping", self.name)
            if grace.cancelled_caught:
                log.error("actor %s did not stop within %g s", self.name, STOP_GRACE)


class Supervisor:
    """Made by `open_supervisor`. Its methods may be called from any task of the same trio run."""

    def __init__(self, nursery: trio.Nursery, max_restarts: int, within: float) -> None:
        self._nursery = nursery
        self._max_restarts = max_restarts
        self._within = within
        self._restarts: deque[float] = deque()
        self._children: dict[Ref[Any], _Child[Any]] = {}
        self._ending = False
        self.failure: ActorCrashed | None = None

    async def start(self, factory: Callable[[], Actor[A]], *, name: str | None = None) -> Ref[A]:
        """Start an actor; returns when its `started` has returned, and raises what that raised.

        `factory` makes a fresh actor here and at every restart; `name` is for logs and errors. Raises `Closed` when
        the supervisor is ending.
        """
        if self._ending:
            raise Closed("the supervisor has stopped")
        ref: Ref[A] = await self._nursery.start(self._keep, _Child(factory, name))
        return ref

    async def stop(self, ref: Ref[Any]) -> None:
        """Stop an actor and wait until its `stopped` has run; its callers get `Closed`. Stopped already: nothing."""
        child = self._children.get(ref)
        if child is not None:
            child.scope.cancel()
            await child.finished.wait()

    async def stop_all(self) -> None:
        """Stop every actor, the last started first, so that those others lean on go last."""
        self._ending = True
        for ref in reversed(list(self._children)):
            await self.stop(ref)

    async def _keep(self, child: _Child[A], *, task_status: Any) -> None:
        self._children[child.ref] = child
        try:
            with child.scope:
                while await self._live_once(child, task_status):
                    pass
        except Exception as error:
            if not child.ready:
                raise sole_error(error) from None
            log.error("actor %s crashed for good", child.name, exc_info=error)
            self._give_up(child, error)
        finally:
            child.mailbox.close()
            del self._children[child.ref]
            child.finished.set()

    async def _live_once(self, child: _Child[A], task_status: Any) -> bool:
        """One life; True if it ended in a crash that a restart may mend."""
        try:
            await child.live(task_status)
        except Exception as error:
            if not child.ready or not self._may_restart():
                raise
            log.error("actor %s crashed and is restarted", child.name, exc_info=error)
            return True
        return False

    def _may_restart(self) -> bool:
        now = trio.current_time()
        while self._restarts and now - self._restarts[0] > self._within:
            self._restarts.popleft()
        if len(self._restarts) >= self._max_restarts:
            return False
        self._restarts.append(now)
        return True

    def _give_up(self, child: _Child[Any], error: Exception) -> None:
        if self._ending or child.scope.cancel_called:
            return
        times = f"after {len(self._restarts)} restarts within {self._within:g} s"
        self.failure = ActorCrashed(f"{child.name} crashed {times} ({type(sole_error(error)).__name__}): {error}")
        self.failure.__cause__ = error
        self._ending = True
        self._nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_supervisor(*, max_restarts: int = 3, within: float = 60.0) -> AsyncIterator[Supervisor]:
    """A block in which actors live. Leaving it stops them; `within` is in seconds.

    An exception of the block's body leaves it unchanged (no exception group). Raises `ActorCrashed` when an actor keeps
    crashing; the body is cancelled then.
    """
    error: BaseException | None = None
    supervisor: Supervisor | None = None
    try:
        async with trio.open_nursery() as nursery:
            supervisor = Supervisor(nursery, max_restarts, within)
            try:
                yield supervisor
            finally:
                with trio.CancelScope(shield=True):
                    await supervisor.stop_all()
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        error = group.exceptions[0]
    if supervisor is not None and supervisor.failure is not None:
        raise supervisor.failure
    if error is not None:
        raise error
