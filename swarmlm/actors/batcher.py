"""The batcher: one per device. Inbox -> batch -> compute thread.

It owns the KV pool and every session's cache, so that memory and schedule change in one place: a session that was
promised memory has it until it is released or expires, and nothing else ever touches a cache while it computes.
`Step` and `Push` come straight from connections, `Reserve` and `Release` from the block host. What runs together is
decided in `actors.schedule`; forward and backward passes of training take turns with those batches, one at a time.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections import deque

import torch
import trio

from swarmlm.actors.core import Actor, Inbox, Message, Request
from swarmlm.actors.core.message import Body, Ok
from swarmlm.actors.pusher import Pushing, no_push
from swarmlm.actors.schedule import Held, Pending, Schedule
from swarmlm.config import CODECS, Codec
from swarmlm.errors import BadStep, Busy, ContextTooLong, StaleEpoch, SwarmError, UnknownSession
from swarmlm.kernels.compression import compress, decompress
from swarmlm.kernels.kv_pool import KVPool
from swarmlm.models.passes import Passes
from swarmlm.models.span import Span, SpanJob
from swarmlm.protocol import (
    Backward,
    BatcherRole,
    Forward,
    PeerId,
    Push,
    SessionId,
    SessionOpened,
    Step,
    StepDone,
    Tensor,
)

log = logging.getLogger("swarmlm.batcher")

IDLE_SECONDS = 600.0  # a client that says nothing for ten minutes has gone; its memory is wanted
MAX_WAITING = 1024  # steps taken in and not yet computed: their hidden states stay in memory
MAX_PASSES = 8  # training passes waiting: each takes seconds, and its client can wait as well as we can
MAX_EXPECTED = 64  # steps of a session waiting for a push, and pushes for a step: a pipeline has a few in flight
CLOSED = "the session was closed while the step waited"
GATHER_SHARE = 0.5  # of the last batch's time: how long a batch waits for more rows
GATHER_SECONDS = 0.02  # at most: people notice more
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
    client: str = ""


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


class Batcher(Actor[BatcherRole]):
    mailbox_size = 256  # taken in at once; what waits for the device is bounded by MAX_WAITING

    def __init__(
        self,
        span: Span,
        pool: KVPool,
        *,
        block_ms: float = 1.0,
        idle_seconds: float = IDLE_SECONDS,
        passes: Passes | None = None,
        push: Pushing = no_push,
    ) -> None:
        self._span = span
        self._pool = pool
        self._idle_seconds = idle_seconds
        self._passes = passes
        self._push = push
        self._sessions: dict[SessionId, Held] = {}
        self._schedule = Schedule(self._sessions)
        self._training: deque[Request] = deque()
        self._block_ms = block_ms
        self._pass_at = -math.inf  # when the next training pass may run while others decode
        self._batch_seconds = 0.0  # that the last batch took
        self._computing: list[Pending] = []  # of the steps in the schedule
        self._threads = trio.CapacityLimiter(1)
        self._work = trio.Event()  # set when something may have become computable

    async def stopped(self) -> None:
        for session in list(self._sessions):
            self._release(session)

    async def run(self, inbox: Inbox[BatcherRole]) -> None:
        """Two tasks, so that a refusal or a look at the load never waits for a long prefill."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_requests, inbox)
            nursery.start_soon(self._sweep)
            while True:
                with trio.move_on_at(self._pass_at if self._training else math.inf):
                    await self._work.wait()
                self._work = trio.Event()
                while await self._compute_batch() | await self._compute_pass():
                    pass

    async def _take_requests(self, inbox: Inbox[BatcherRole]) -> None:
        while True:
            self._take(await inbox.get())
            for request in inbox.take_nowait(self.mailbox_size):
                self._take(request)
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
                self._take_step(request, message)
            elif isinstance(message, Push):
                self._take_push(message)
                request.answer(Ok())
            elif isinstance(message, Forward | Backward) and self._passes is not None:
                if len(self._training) >= MAX_PASSES:
                    raise Busy(f"{MAX_PASSES} passes are waiting for this device", waiting=MAX_PASSES)
                self._training.append(request)
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
        except Exception as error:  # nothing that a peer sends may end the sessions of others
            log.exception("%s could not be taken in", type(message).__name__)
            request.fail(error)

    def _take_step(self, request: Request, step: Step) -> None:
        if len(self._schedule) >= MAX_WAITING:
            raise Busy(f"{MAX_WAITING} steps are waiting for this device", waiting=MAX_WAITING)
        held = self._sessions.get(step.session)
        if held is None:
            raise UnknownSession("this host holds no such session (it expired, was closed, or the host restarted)")
        if step.epoch != held.epoch:
            raise StaleEpoch(f"the session is at epoch {held.epoch}, the step at {step.epoch}")
        if step.prompts is not None or step.adapter:
            raise BadStep("this host takes no prompts or adapters")
        if self._schedule.of(held) >= MAX_EXPECTED:
            raise Busy(f"{MAX_EXPECTED} steps of this session are waiting", waiting=MAX_EXPECTED)
        held.used = trio.current_time()
        given = step.hidden if step.hidden is not None else held.parked.pop(step.ticket, None)
        hidden = self._read(given, step.codec, held) if given is not None else None
        pending = Pending(request, step, held, hidden, time.perf_counter())
        if hidden is not None:
            self._schedule.add(pending)
            return
        for ticket in [ticket for ticket, other in held.expected.items() if other.request.abandoned]:
            del held.expected[ticket]
        if len(held.expected) >= MAX_EXPECTED:
            raise Busy(f"{MAX_EXPECTED} steps of this session wait for what they compute", waiting=MAX_EXPECTED)
        held.expected[step.ticket] = pending

    def _take_push(self, push: Push) -> None:
        """Complete the step that waits for it, or keep it for one that is still on its way."""
        held = self._sessions.get(push.session)
        if held is None or push.epoch != held.epoch or push.ticket <= held.done:
            return
        pending = held.expected.pop(push.ticket, None)
        if pending is not None and not pending.request.abandoned:
            try:
                pending.hidden = self._read(push.hidden, pending.step.codec, held)
            except SwarmError as error:
                pending.request.fail(error)
                return
            pending.arrived = time.perf_counter()
            self._schedule.add(pending)
        elif pending is None and not self._schedule.holds(held, push.ticket):
            waiting = sum(len(tensor.data) for tensor in held.parked.values())
            if len(held.parked) < MAX_EXPECTED and waiting + len(push.hidden.data) <= self._most_bytes(held):
                held.parked[push.ticket] = push.hidden

    def _read(self, wire: Tensor, codec: Codec, held: Held) -> torch.Tensor:
        """The hidden states of a step, [batch, tokens, hidden size]. Raises `BadStep`, `ContextTooLong`."""
        limit = held.cache.max_length
        if len(wire.shape) == 3 and wire.shape[1] > limit:
            raise ContextTooLong(f"{wire.shape[1]} tokens are more than the {limit} this session reserved")
        if len(wire.shape) == 3 and 0 not in wire.shape and len(wire.data) <= self._most_bytes(held):
            hidden = decompress(wire, codec)
            if (hidden.shape[0], hidden.shape[2]) == (held.cache.batch, self._span.hidden_size):
                return hidden
        expected = f"({held.cache.batch}, tokens, {self._span.hidden_size})"
        raise BadStep(f"hidden states of shape {tuple(wire.shape)} instead of {expected}")

    def _most_bytes(self, held: Held) -> int:
        """Of hidden states that may wait for a session: all that it can ever hold, in float32."""
        return 4 * held.cache.batch * held.cache.max_length * self._span.hidden_size

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
        self._sessions[ask.session] = Held(cache, ask.epoch, trio.current_time(), client=ask.client)
        return SessionOpened(kv_reserved=needed, idle_seconds=self._idle_seconds, codecs=CODECS)

    def _release(self, session: SessionId) -> None:
        held = self._sessions.pop(session, None)
        if held is not None:
            self._pool.release(session)
            for pending in held.expected.values():
                pending.request.fail(UnknownSession(CLOSED))
            self._tidy()

    def _expire(self) -> None:
        self._tidy()
        if self._passes is not None:
            self._passes.expire()
        deadline = trio.current_time() - self._idle_seconds
        busy = {id(pending.held) for pending in self._schedule}
        for session, held in list(self._sessions.items()):
            if held.used < deadline and id(held) not in busy:
                log.info("session %s expired after %.0f idle seconds", session.hex()[:8], self._idle_seconds)
                self._release(session)

    def _load(self) -> Load:
        return Load(
            kv_free=self._pool.free,
            kv_total=self._pool.total,
            queue=sum(not (pending.request.abandoned or pending in self._computing) for pending in self._schedule),
            sessions=len(self._sessions),
            block_ms=self._block_ms,
        )

    # ---- computing -----------------------------------------------------------------------------------------------

    async def _compute_batch(self) -> bool:
        """One batch of steps; False if there is none."""
        self._tidy()
        await self._gather()
        chosen = self._schedule.choose(trio.current_time())
        batch = [(pending, pending.slice(tokens)) for pending, tokens in chosen if self._still_good(pending)]
        if batch:
            self._computing = [pending for pending, _ in batch]
            await self._compute(batch)
            self._computing = []
        return bool(chosen)

    async def _gather(self) -> None:
        """Wait a moment for decode steps to compute together: for few rows a batch takes as long as for one."""
        until = trio.current_time() + min(GATHER_SHARE * self._batch_seconds, GATHER_SECONDS)
        while self._schedule.thin(now := trio.current_time()) and now < until:
            self._work = trio.Event()
            with trio.move_on_at(until):
                await self._work.wait()

    def _tidy(self) -> None:
        """Drop steps that nobody waits for and those of sessions that are over: they hold memory, and others up."""
        for pending in list(self._schedule):
            over = self._sessions.get(pending.step.session) is not pending.held
            if (over or pending.request.abandoned) and pending not in self._computing:
                self._schedule.remove(pending)
                pending.request.fail(UnknownSession(CLOSED))

    def _still_good(self, pending: Pending) -> bool:
        """Whether it can run; else it is answered."""
        try:
            if pending.taken == 0:
                self._span.check(pending.whole())
            return True
        except SwarmError as error:
            pending.request.fail(error)
        self._schedule.remove(pending)
        return False

    async def _compute(self, batch: list[tuple[Pending, SpanJob]]) -> None:
        jobs = [job for _, job in batch]
        started = time.perf_counter()
        try:
            outputs = await trio.to_thread.run_sync(functools.partial(self._span.run, jobs), limiter=self._threads)
        except SwarmError as error:
            if len(batch) > 1:  # one of them cannot run: the others shall
                for one in batch:
                    await self._compute([one])
                return
            self._schedule.remove(batch[0][0])
            batch[0][0].request.fail(error)
            return
        except Exception as error:
            log.exception("a batch of %d failed; its sessions are dropped", len(batch))
            for pending, _ in batch:
                self._schedule.remove(pending)
                if self._sessions.get(pending.step.session) is pending.held:
                    self._release(pending.step.session)  # their caches may hold half a step
                pending.request.fail(error)
            return
        self._batch_seconds = time.perf_counter() - started
        compute_ms = self._batch_seconds * 1e3
        rows = sum(job.hidden.shape[0] for job in jobs)
        if all(pending.is_decode for pending, _ in batch):
            blocks = max(pending.held.cache.end - pending.held.cache.start for pending, _ in batch)
            self._block_ms += SMOOTHING * (compute_ms / blocks - self._block_ms)
        for (pending, job), output in zip(batch, outputs, strict=True):
            pending.taken += job.hidden.shape[1]
            pending.compute_ms += compute_ms
            pending.outputs.append(output)
            if pending.taken < pending.tokens:
                self._schedule.took_turn(pending)
            else:
                self._schedule.remove(pending)
                await self._finish(pending, rows)

    async def _finish(self, pending: Pending, rows: int) -> None:
        """Answer a step that has run, and push its output on if it goes on elsewhere."""
        step, held = pending.step, pending.held
        held.used = trio.current_time()
        if pending.is_decode:
            held.decoded = held.used
        held.done = max(held.done, step.ticket)
        for ticket in [ticket for ticket in held.parked if ticket <= held.done]:
            del held.parked[ticket]
        output = pending.outputs[0] if len(pending.outputs) == 1 else torch.cat(pending.outputs, dim=1)
        wire = compress(output, step.codec)
        pushed = False
        if step.next_hops and not pending.request.abandoned:
            following = step.next_hops[0]
            push = Push(following.session, following.epoch, step.ticket, wire)
            pushed = await self._push(PeerId(following.peer), push)
        waited = (time.perf_counter() - pending.arrived) * 1e3
        pending.request.answer(
            StepDone(
                hidden=wire,
                position=held.cache.position,
                queue_ms=max(0.0, waited - pending.compute_ms),
                compute_ms=pending.compute_ms,
                rows=rows,
                pushed=pushed,
            )
        )

    async def _compute_pass(self) -> bool:
        """One forward or backward of training; False if there is none. Where others decode, half the time is theirs."""
        now = trio.current_time()
        while self._training and (now >= self._pass_at or not self._schedule.decoding(now)):
            request = self._training.popleft()
            if request.abandoned or self._passes is None:
                continue
            try:
                work = functools.partial(self._passes.run, request.message)
                request.answer(await trio.to_thread.run_sync(work, limiter=self._threads))
            except SwarmError as error:
                request.fail(error)
            except Exception as error:
                log.exception("a training pass failed")
                request.fail(error)
            ended = trio.current_time()
            self._pass_at = ended + (ended - now)
            return True
        return False
