"""The portal: one trio loop in a background thread, for code that is not trio's: scripts, notebooks, asyncio.

`call` runs an async function there and waits for it; `enter` keeps an async context manager open there until `leave`.
Every method may be called from any thread but the portal's own. A bridge costs about 0.2 ms.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import trio

from swarmlm.errors import Closed

T = TypeVar("T")


class Portal:
    def __init__(self) -> None:
        self._ready = threading.Event()
        self._open: dict[int, tuple[trio.Event, trio.Event]] = {}
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._stop: trio.Event | None = None
        self._thread = threading.Thread(target=self._main, name="swarmlm-portal", daemon=True)
        self._thread.start()
        self._ready.wait()

    def _main(self) -> None:
        trio.run(self._loop)

    async def _loop(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._token = trio.lowlevel.current_trio_token()
            self._stop = trio.Event()
            self._ready.set()
            await self._stop.wait()
            for leave, _ in list(self._open.values()):
                leave.set()

    @property
    def token(self) -> trio.lowlevel.TrioToken:
        """Of the portal's loop, for `trio.from_thread`."""
        assert self._token is not None
        return self._token

    def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run `await function(*args)` in the portal's loop and return or raise what it does."""
        if not self._thread.is_alive():
            raise Closed("the portal is closed")
        result: T = trio.from_thread.run(function, *args, trio_token=self._token)
        return result

    def enter(self, manager: AbstractAsyncContextManager[T]) -> T:
        """Enter `manager` in a task of its own in the portal; `leave(value)` or `close()` exits it there."""
        value: T = self.call(self._enter, manager)
        return value

    async def _enter(self, manager: AbstractAsyncContextManager[T]) -> T:
        assert self._nursery is not None
        outcome: list[T] = []
        failure: list[BaseException] = []
        entered, leave, left = trio.Event(), trio.Event(), trio.Event()

        async def hold() -> None:
            try:
                async with manager as value:
                    outcome.append(value)
                    entered.set()
                    await leave.wait()
            except Exception as error:
                failure.append(error)  # before `entered`: raised by enter; after: nobody is waiting for it
            finally:
                entered.set()
                left.set()

        self._nursery.start_soon(hold)
        await entered.wait()
        if not outcome:
            raise failure[0]
        self._open[id(outcome[0])] = (leave, left)
        return outcome[0]

    def leave(self, value: object) -> None:
        """Exit the context manager that `enter` returned `value` of, and wait for it."""

        async def exit_it() -> None:
            leave, left = self._open.pop(id(value), (None, None))
            if leave is not None and left is not None:
                leave.set()
                await left.wait()

        self.call(exit_it)

    def close(self) -> None:
        """Leave everything entered and end the thread. Idempotent."""
        if self._thread.is_alive() and self._token is not None and self._stop is not None:
            self._token.run_sync_soon(self._stop.set)
        self._thread.join()


class Client:
    """A blocking handle on a swarm for plain scripts and notebooks. Made by `connect`."""

    def __init__(self, peers: Sequence[str]) -> None:
        from swarmlm.node import open_node

        self._portal = Portal()
        try:
            self._node = self._portal.enter(open_node(peers))
        except BaseException:
            self._portal.close()
            raise

    def generate(self, model: str, prompt: str, **options: Any) -> Iterator[str]:
        """Continue `prompt` piece by piece; options as `NodeSession.generate`."""
        session = self._portal.enter(self._node.session(model))

        async def begin() -> Any:
            return session.generate(prompt, **options)

        try:
            answer = self._portal.call(begin)
            while True:
                try:
                    yield self._portal.call(answer.receive)
                except EOFError:
                    return
        finally:
            self._portal.leave(session)

    def close(self) -> None:
        self._portal.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(peers: Sequence[str]) -> Client:
    """Join the swarm of `peers` from blocking code:

    for text in swarmlm.connect(PEERS).generate("smollm2", "Hello"):
        print(text, end="")
    """
    return Client(peers)
