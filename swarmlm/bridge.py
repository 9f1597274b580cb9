"""Between worker threads, where transformers runs, and the trio loop, where sessions live."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Protocol

import torch
import trio

from swarmlm.errors import Closed, ContextTooLong
from swarmlm.routing.passes import Tape, TrainingRoute
from swarmlm.routing.session import Session


class SteppedSession(Protocol):
    """What a bridge drives: `routing.session.Session`, or the growing session of a conversation."""

    @property
    def position(self) -> int: ...

    async def step(
        self, hidden: torch.Tensor, *, position: int, padding: tuple[int, ...], hypo_ids: tuple[int, ...]
    ) -> torch.Tensor: ...


class Bridge:
    """A `BlockingSession` for code outside the trio loop: each call crosses into it and back."""

    def __init__(self, session: SteppedSession, token: trio.lowlevel.TrioToken, close: Callable[[], None]) -> None:
        self._session = session
        self._token = token
        self._close = close

    @property
    def position(self) -> int:
        return self._session.position

    def step(
        self, hidden: torch.Tensor, *, position: int, padding: tuple[int, ...] = (), hypo_ids: tuple[int, ...] = ()
    ) -> torch.Tensor:
        step = functools.partial(self._session.step, hidden, position=position, padding=padding, hypo_ids=hypo_ids)
        return trio.from_thread.run(step, trio_token=self._token)

    def close(self) -> None:
        self._close()


class PassesBridge:
    """`BlockingPasses` over a training route, for code outside the trio loop: each call crosses into it and back."""

    def __init__(self, route: TrainingRoute, token: trio.lowlevel.TrioToken) -> None:
        self._route = route
        self._token = token

    def forward(
        self, hidden: torch.Tensor, padding: tuple[int, ...], *, differentiable: bool
    ) -> tuple[torch.Tensor, Tape | None]:
        run = functools.partial(self._route.forward, hidden, padding, differentiable=differentiable)
        return trio.from_thread.run(run, trio_token=self._token)

    def backward(self, tape: Tape, grad: torch.Tensor) -> torch.Tensor:
        return trio.from_thread.run(self._route.backward, tape, grad, trio_token=self._token)


class GrowingSession:
    """A routing session that reserves a modest length first and moves to a longer one when a conversation outgrows it.

    Moving replays what was said into the longer reservation: the tokens stay the same. `stop` interrupts a step.
    """

    def __init__(self, open_at: Callable[[int], AbstractAsyncContextManager[Session]], length: int, limit: int) -> None:
        self._open_at = open_at
        self._length = length
        self._limit = limit
        self._stack = AsyncExitStack()
        self._scope: trio.CancelScope | None = None
        self._stopped = False
        self.current: Session | None = None
        self.failovers_before = 0

    async def open(self) -> None:
        self.current = await self._stack.enter_async_context(self._open_at(self._length))

    async def aclose(self) -> None:
        await self._stack.aclose()

    @property
    def session(self) -> Session:
        if self.current is None:
            raise Closed("the session is closed")
        return self.current

    @property
    def position(self) -> int:
        return self.session.position

    @property
    def failovers(self) -> int:
        return self.failovers_before + self.session.failovers

    def restart(self) -> None:
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True
        if self._scope is not None:
            self._scope.cancel()

    @property
    def stopped(self) -> bool:
        return self._stopped

    async def step(
        self, hidden: torch.Tensor, *, position: int, padding: tuple[int, ...] = (), hypo_ids: tuple[int, ...] = ()
    ) -> torch.Tensor:
        if not self._stopped:
            with trio.CancelScope() as self._scope:
                if position + hidden.shape[1] > self._length:
                    await self._grow(position, position + hidden.shape[1])
                return await self.session.step(hidden, position=position, padding=padding, hypo_ids=hypo_ids)
        raise Closed("the answer was stopped")

    async def _grow(self, position: int, needed: int) -> None:
        if needed > self._limit:
            raise ContextTooLong(f"{needed} tokens are more than the {self._limit} of this session's context")
        old = self.session
        said = old.history(position)
        self._length = min(self._limit, max(needed, 2 * self._length))
        self.failovers_before += old.failovers
        self.current = None
        await self._stack.aclose()
        self._stack = AsyncExitStack()
        await self.open()
        if said is not None:
            await self.session.step(said, position=0, padding=(), hypo_ids=())
