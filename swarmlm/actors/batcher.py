"""The batcher: one per device. Inbox -> batch -> compute thread.

It owns the KV pool and every session's cache, so that memory and schedule change in one place: a session that was
promised memory has it until it is released or expires, and nothing else ever touches a cache while it computes.
`Step` comes straight from a connection, `Reserve` and `Release` from the block host. Decode steps (one token a row) of
different sessions run as one batch; a prefill chunk runs alone, in turn with them.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from dataclasses import dataclass

import trio

from swarmlm.actors.core import Actor, Inbox, Message, Request
from swarmlm.actors.core.message import Body, Ok
from swarmlm.errors import BadStep, Busy, StaleEpoch, SwarmError, UnknownSession
from swarmlm.kernels.kv_pool import KVPool
from swarmlm.kernels.wire import from_wire, to_wire
from swarmlm.models.span import Span, SpanCache, SpanJob
from swarmlm.protocol import BatcherRole, SessionId, SessionOpened, Step, StepDone

log = logging.getLogger("swarmlm.batcher")

IDLE_SECONDS = 600.0  # a client that says nothing for ten minutes has gone; its memory is wanted
MAX_ROWS = 64  # rows of one decode batch: past this a step gets slower than people read
MAX_WAITING = 1024  # steps taken in and not yet computed: their hidden states stay in memory
SWEEP_SECONDS = 5.0  # how often idle sessions are looked for
SMOOTHING = 0.2  # weight of the newest measurement in the running means


class Reserve(Message[BatcherRole, SessionOpened], tag="reserve", frozen=True):
    """Promise KV for a session over blocks [start, end), or raise `PoolFull`. A known id is emptied and re-fenced."""

    session: SessionId
    epoch: int
    start: int
    end: int
    batch: int
    max_length: int


class Release(Message[BatcherRole, Ok], tag="release", frozen=True):
    session: SessionId


class Load(Body, tag="load", frozen=True):
    kv_free: int
    kv_total: int
    queue: int
    sessions: int
    block_ms: float


class GetLoad(Message[BatcherRole, Load], tag="get_load", frozen=True):
    pass


@dataclass
class _Held:
    cache: SpanCache
    epoch: int
    used: float  # trio time of the last step


@dataclass
class _Pending:
    request: Request
    step: Step
    job: SpanJob
    held: _Held
    arrived: float


class Batcher(Actor[BatcherRole]):
    mailbox_size = 256  # taken in at once; what waits for the device is bounded by MAX_WAITING

    def __init__(self, span: Span, pool: KVPool, *, block_ms: float = 1.0, idle_seconds: float = IDLE_SECONDS) -> None:
        self._span = span
        self._pool = pool
        self._idle_seconds = idle_seconds
        self._sessions: dict[SessionId, _Held] = {}
        self._waiting: deque[_Pending] = deque()
        self._block_ms = block_ms
        self._threads = trio.CapacityLimiter(1)
        self._work = trio.Event()  # set while steps wait

    async def stopped(self) -> None:
        for session in list(self._sessions):
            self._release(session)

    async def run(self, inbox: Inbox[BatcherRole]) -> None:
        """Two tasks, so that a refusal or a look at the load never waits for a long prefill."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_requests, inbox)
            nursery.start_soon(self._sweep)
            while True:
                await self._work.wait()
                for batch in (self._next_decodes(), self._next_prefill()):
                    if batch:
                        await self._compute(batch)
                if not self._waiting:
                    self._work = trio.Event()

    async def _take_requests(self, inbox: Inbox[BatcherRole]) -> None:
        while True:
            self._take(await inbox.get())
            for request in inbox.take_nowait(self.mailbox_size):
                self._take(request)
            if self._waiting:
                self._work.set()

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_SECONDS)
            self._expire()

    # ---- taking requests in ------------------------------------------------------------------------------------

    def _take(self, request: Request) -> None:
        message = request.message
        try:
            if isinstance(message, Step):
                if len(self._waiting) >= MAX_WAITING:
                    raise Busy(f"{MAX_WAITING} steps are waiting for this device", waiting=MAX_WAITING)
                self._waiting.append(self._admit(request, message))
            elif isinstance(message, Reserve):
                request.answer(self._reserve(message))
            elif isinstance(message, Release):
                self._release(message.session)
                request.answer(Ok())
            elif isinstance(message, GetLoad):
                request.answer(self._load())
            else:
                raise BadStep(f"a batcher takes no {type(message).__name__}")
        except SwarmError as error:
            request.fail(error)

    def _admit(self, request: Request, step: Step) -> _Pending:
        held = self._sessions.get(step.session)
        if held is None:
            raise UnknownSession("this host holds no such session (it expired, was closed, or the host restarted)")
        if step.epoch != held.epoch:
            raise StaleEpoch(f"the session is at epoch {held.epoch}, the step at {step.epoch}")
        if step.prompts is not None or step.adapter or step.codec != "none" or step.next_hops:
            raise BadStep("this host takes no prompts, adapters, codecs or next hops")
        job = SpanJob(
            cache=held.cache,
            hidden=from_wire(step.hidden),
            position=step.position,
            padding=step.padding,
            hypo_ids=step.hypo_ids,
        )
        held.used = trio.current_time()
        return _Pending(request, step, job, held, time.perf_counter())

    def _reserve(self, ask: Reserve) -> SessionOpened:
        held = self._sessions.get(ask.session)
        if held is not None and ask.epoch <= held.epoch:
            raise StaleEpoch(f"the session is at epoch {held.epoch} already")
        self._release(ask.session)
        needed = self._span.cache_bytes(ask.batch, ask.max_length, start=ask.start, end=ask.end)
        self._pool.reserve(ask.session, needed)
        try:
            cache = self._span.open(ask.batch, ask.max_length, start=ask.start, end=ask.end)
        except BaseException:
            self._pool.release(ask.session)
            raise
        self._sessions[ask.session] = _Held(cache, ask.epoch, trio.current_time())
        return SessionOpened(kv_reserved=needed, idle_seconds=self._idle_seconds)

    def _release(self, session: SessionId) -> None:
        if self._sessions.pop(session, None) is not None:
            self._pool.release(session)

    def _expire(self) -> None:
        deadline = trio.current_time() - self._idle_seconds
        busy = {id(pending.held) for pending in self._waiting}
        for session, held in list(self._sessions.items()):
            if held.used < deadline and id(held) not in busy:
                log.info("session %s expired after %.0f idle seconds", session.hex()[:8], self._idle_seconds)
                self._release(session)

    def _load(self) -> Load:
        return Load(
            kv_free=self._pool.free,
            kv_total=self._pool.total,
            queue=len(self._waiting),
            sessions=len(self._sessions),
            block_ms=self._block_ms,
        )

    # ---- choosing and computing ----------------------------------------------------------------------------------

    def _next_decodes(self) -> list[_Pending]:
        """Every waiting one-token step, oldest first, at most one a session and `MAX_ROWS` rows in all."""
        chosen: list[_Pending] = []
        rows, seen = 0, set()
        for pending in self._waiting:
            size = pending.job.hidden.shape[0]
            if pending.job.hidden.dim() != 3 or pending.job.hidden.shape[1] != 1 or pending.step.session in seen:
                continue
            if chosen and rows + size > MAX_ROWS:
                break
            seen.add(pending.step.session)
            rows += size
            chosen.append(pending)
        return self._withdraw(chosen)

    def _next_prefill(self) -> list[_Pending]:
        for pending in self._waiting:
            if pending.job.hidden.dim() != 3 or pending.job.hidden.shape[1] != 1:
                return self._withdraw([pending])
        return []

    def _withdraw(self, chosen: list[_Pending]) -> list[_Pending]:
        """Take the chosen out of the queue; drop those nobody waits for; answer those that cannot run."""
        ready = []
        for pending in chosen:
            self._waiting.remove(pending)
            if pending.request.abandoned:
                continue
            try:
                if self._sessions.get(pending.step.session) is not pending.held:
                    raise UnknownSession("the session was closed while the step waited")
                self._span.check(pending.job)
            except SwarmError as error:
                pending.request.fail(error)
            else:
                ready.append(pending)
        return ready

    async def _compute(self, batch: list[_Pending]) -> None:
        started = time.perf_counter()
        try:
            outputs = await trio.to_thread.run_sync(
                functools.partial(self._span.run, [pending.job for pending in batch]), limiter=self._threads
            )
        except SwarmError as error:
            for pending in batch:
                pending.request.fail(error)
            return
        except Exception as error:
            log.exception("a batch of %d failed; its sessions are dropped", len(batch))
            for pending in batch:
                self._release(pending.step.session)  # their caches may hold half a step
                pending.request.fail(error)
            return
        compute_ms = (time.perf_counter() - started) * 1e3
        rows = sum(pending.job.hidden.shape[0] for pending in batch)
        blocks = max(pending.held.cache.end - pending.held.cache.start for pending in batch)
        if batch[0].job.hidden.shape[1] == 1:
            self._block_ms += SMOOTHING * (compute_ms / blocks - self._block_ms)
        for pending, output in zip(batch, outputs, strict=True):
            pending.held.used = trio.current_time()
            pending.request.answer(
                StepDone(
                    hidden=to_wire(output),
                    position=pending.held.cache.position,
                    queue_ms=max(0.0, (started - pending.arrived) * 1e3),
                    compute_ms=compute_ms,
                    rows=rows,
                )
            )
