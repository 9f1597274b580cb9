"""The block host: who may open a session on our span, and whether we take new ones at all.

It answers `OpenSession`, `CloseSession` and `GetStatus`; memory and steps are the batcher's. It never computes.
"""

from __future__ import annotations

from collections.abc import Callable

from swarmlm.actors.batcher import GetLoad, Load, Release, Reserve
from swarmlm.actors.core import Actor, Message, Ref, handles
from swarmlm.actors.core.message import Ok
from swarmlm.errors import Busy, ContextTooLong, WrongModel
from swarmlm.protocol import (
    BatcherRole,
    CloseSession,
    GetStatus,
    HostRole,
    HostStatus,
    OpenSession,
    PeerId,
    SessionOpened,
    State,
)

BATCHER_SECONDS = 30.0  # the batcher answers between two batches; a prefill chunk on a slow machine takes seconds


class Admit(Message[HostRole, SessionOpened], tag="admit", frozen=True):
    """`ask`, and who asks: turns are shared between clients. Local only: the wire edge names the peer."""

    client: str
    ask: OpenSession


class SetState(Message[HostRole, Ok], tag="set_state", frozen=True):
    """Draining hosts refuse new sessions and keep the old ones. Local only."""

    state: State


class BlockHost(Actor[HostRole]):
    def __init__(
        self,
        peer: PeerId,
        batcher: Ref[BatcherRole],
        *,
        model: str,
        fingerprint: str,
        start: int,
        end: int,
        context_length: int,
        kv_token_bytes: int,
        warm: Callable[[PeerId], None] = lambda peer: None,
    ) -> None:
        self._peer = peer
        self._batcher = batcher
        self._model = model
        self._fingerprint = fingerprint
        self._start, self._end = start, end
        self._context_length = context_length
        self._kv_token_bytes = kv_token_bytes
        self._warm = warm  # makes ready to push to a peer
        self._state: State = "online"

    @handles(OpenSession)
    async def open_session(self, ask: OpenSession) -> SessionOpened:
        return await self.admit(Admit("", ask))

    @handles(Admit)
    async def admit(self, admit: Admit) -> SessionOpened:
        ask = admit.ask
        if self._state != "online":
            raise Busy("this host is leaving and takes no new sessions")
        if ask.model != self._model or ask.fingerprint != self._fingerprint:
            raise WrongModel(
                f"this host serves {self._model} ({self._fingerprint}), not {ask.model} ({ask.fingerprint})"
            )
        if not self._start <= ask.start < ask.end <= self._end:
            raise WrongModel(f"this host serves blocks {self._start}:{self._end}, not {ask.start}:{ask.end}")
        if ask.max_length > self._context_length:
            raise ContextTooLong(
                f"{ask.max_length} tokens are more than the {self._context_length} of {self._model}'s context",
                asked=ask.max_length,
                limit=self._context_length,
            )
        reserve = Reserve(
            session=ask.session,
            epoch=ask.epoch,
            start=ask.start,
            end=ask.end,
            batch=ask.batch,
            max_length=ask.max_length,
            client=admit.client,
        )
        opened = await self._batcher.call(reserve, deadline=BATCHER_SECONDS)
        if ask.next_peer:
            self._warm(PeerId(ask.next_peer))
        return opened

    @handles(CloseSession)
    async def close_session(self, ask: CloseSession) -> Ok:
        return await self._batcher.call(Release(ask.session), deadline=BATCHER_SECONDS)

    @handles(SetState)
    async def set_state(self, ask: SetState) -> Ok:
        self._state = ask.state
        return Ok()

    @handles(GetStatus)
    async def status(self, ask: GetStatus) -> HostStatus:
        load: Load = await self._batcher.call(GetLoad(), deadline=BATCHER_SECONDS)
        return HostStatus(
            peer=self._peer,
            model=self._model,
            start=self._start,
            end=self._end,
            state=self._state,
            kv_free=load.kv_free,
            kv_total=load.kv_total,
            kv_token_bytes=self._kv_token_bytes,
            queue=load.queue,
            sessions=load.sessions,
            block_ms=load.block_ms,
        )
