"""The peer's calls: each is given to the local actor that its type is routed to. Used by `remote` only."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import trio

from swarmlm.actors.core.message import Body, Call, Cast, Failed, Message, Reply
from swarmlm.actors.core.outbox import Outbox
from swarmlm.actors.core.ref import Ref
from swarmlm.errors import ActorCrashed, Busy, ProtocolError, RemoteFailure, SwarmError, to_wire

MAX_ERROR_TEXT = 4096  # characters of an error that crosses the wire: one line for a user, with room for names

log = logging.getLogger("swarmlm.actors")


class Answering:
    """A task per running call, in the connection's nursery; at most `max_calls` of them."""

    def __init__(
        self, peer: str, routes: Mapping[type[Message[Any, Any]], Ref[Any]], max_calls: int, outbox: Outbox
    ) -> None:
        self._peer = peer
        self._routes = routes
        self._max_calls = max_calls
        self._outbox = outbox
        self._running: dict[int, trio.CancelScope] = {}

    def call(self, call: Call, nursery: trio.Nursery) -> None:
        """Start answering. Raises `ProtocolError` if the call's number is taken."""
        ref = self._routes.get(type(call.body))
        if call.id in self._running:
            raise ProtocolError(f"{self._peer} used the number of a running call again")
        if ref is None:
            self._fail(call, ProtocolError(f"nobody here handles {type(call.body).__name__}"))
        elif len(self._running) >= self._max_calls:
            self._fail(call, Busy(f"{self._max_calls} calls of this link are running", running=self._max_calls))
        else:
            scope = self._running[call.id] = trio.CancelScope()
            nursery.start_soon(self._answer, ref, call, scope)

    def cancel(self, number: int) -> None:
        """The caller went away: no answer is sent. An unknown number was answered in the meantime."""
        scope = self._running.get(number)
        if scope is not None:
            scope.cancel()

    async def cast(self, cast: Cast) -> None:
        """Pass it on if there is room; a cast has nobody to tell otherwise."""
        name = type(cast.body).__name__
        ref = self._routes.get(type(cast.body))
        if ref is None:
            log.warning("%s sent %s, which nobody here handles", self._peer, name)
            return
        try:
            await ref.cast(cast.body, wait=False)
        except SwarmError as error:
            log.warning("%s of %s was dropped: %s", name, self._peer, error)

    async def _answer(self, ref: Ref[Any], call: Call, scope: trio.CancelScope) -> None:
        try:
            with scope:
                body = await ref.call(call.body, deadline=call.seconds_left, wait=False)
                if not isinstance(body, Body):
                    raise TypeError(f"{type(call.body).__name__} was answered with {type(body).__name__}, not a Body")
                await self._outbox.put(Reply(id=call.id, body=body))
        except ActorCrashed as error:
            self._fail(call, RemoteFailure(str(error)))
        except SwarmError as error:
            self._fail(call, error)
        except Exception as error:
            log.exception("answering %s of %s failed", type(call.body).__name__, self._peer)
            self._fail(call, error)
        finally:
            del self._running[call.id]

    def _fail(self, call: Call, error: Exception) -> None:
        code, text, details = to_wire(error)
        self._outbox.post(Failed(id=call.id, code=code, text=text[:MAX_ERROR_TEXT], details=details))
