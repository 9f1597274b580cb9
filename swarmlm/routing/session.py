"""The client's side of a session: hidden states go through a chain of hosts, and come out the same if hosts die.

    async with open_session(swarm, model="m", fingerprint="f", blocks=30, max_length=512) as session:
        out = await session.step(hidden)                 # appends; [batch, tokens, hidden] in and out
        out = await session.step(hidden, position=7)     # rolls back to 7 tokens first

The rules a `Session` keeps:

- A step counts when every hop has answered: only then `position` moves on. Until then its tokens may be anywhere, and
  the next step, coming at a lower position than such a host holds, makes it forget them.
- A hop that failed is replaced alone, by one host or several, over the same blocks. They are given what it was given
  (its journal), and then the interrupted step. The other hops notice nothing.
- A reorder (`hypo_ids`) is not idempotent as an append at a position is: done twice, it mixes up rows. So it is never
  sent twice to the same cache. A hop that does not answer it is lost, and is rebuilt from its journal as of before. If
  the step as a whole is given up, each hop that may have carried it out is rebuilt likewise before the next step.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch
import trio

from swarmlm.errors import BadStep, Closed, ContextTooLong, NoRoute, SwarmError
from swarmlm.routing.base import SessionEvent, SessionOptions, Swarm, Terms
from swarmlm.routing.failover import Recruiter, replay
from swarmlm.routing.flow import Flow
from swarmlm.routing.graph import RouteHop
from swarmlm.routing.hop import Hop, HopFailed, Part
from swarmlm.routing.journal import Mark, Rows, taken

__all__ = ["Session", "SessionEvent", "SessionOptions", "Swarm", "open_session"]

log = logging.getLogger("swarmlm.routing")

MIN_CHUNK = 64  # tokens: below it a host computes a token more slowly than in longer chunks
CHUNKS_A_HOP = 4  # of a prompt, for each hop: the pipeline fills and drains in a fraction of its length


class Session:
    """Made by `open_session`. One step at a time: a second caller waits for its turn."""

    def __init__(
        self, hops: list[Hop], recruiter: Recruiter, options: SessionOptions, emit: Callable[[SessionEvent], None]
    ) -> None:
        self.position = 0
        self.failovers = 0
        self._hops = hops
        self._recruiter = recruiter
        self._options = options
        self._emit = emit
        self._turn = trio.Lock()
        self._give_up_at: float | None = None  # set by the first failure in a step
        self._rebuilt: set[Hop] = set()  # in this step: once each
        self._ticket = 0  # of the last part of a step that was sent
        self._closed = False

    @property
    def route(self) -> list[RouteHop]:
        """The hosts in order."""
        return [hop.route for hop in self._hops]

    @property
    def padding(self) -> Rows:
        """Left-pad tokens of each row of what is held; () if none."""
        return self._hops[0].journal.padding

    def history(self, position: int) -> torch.Tensor | None:
        """A copy of the first `position` inputs, [batch, position, hidden]; None for 0. Past the end: `BadStep`."""
        return self._hops[0].journal.rows(0, position).clone() if position else None

    async def step(
        self, hidden: torch.Tensor, *, position: int | None = None, padding: Rows = (), hypo_ids: Rows = ()
    ) -> torch.Tensor:
        """The output of all blocks for `hidden`, both [batch, tokens, hidden].

        `position` below the session's rolls back, for good, even if the step then fails. `padding` is the number of
        left-pad tokens of each row, remembered until position 0; `hypo_ids` reorders the rows held before the step.
        Raises `BadStep` and `ContextTooLong` (the session stays usable), `NoRoute` when a lost host could not be
        replaced in time (a later step tries again), `Closed`.
        """
        async with self._turn:
            at = self.position if position is None else position
            padding, hypo_ids = tuple(padding), tuple(hypo_ids)
            self._check(hidden, at, padding, hypo_ids)
            if at == 0 or hypo_ids == tuple(range(self._recruiter.terms.batch)):
                hypo_ids = ()
            self.position = at
            for hop in self._hops:
                hop.journal.rollback(at)
            padding = padding or (taken(self.padding, hypo_ids) if hypo_ids else self.padding)
            before = [(hop, hop.journal.mark()) for hop in self._hops]
            self._give_up_at = None
            self._rebuilt.clear()
            try:
                outputs = await self._run_all(hidden, at, padding, hypo_ids)
            except BaseException:
                await self._take_back(before, reordered=bool(hypo_ids))
                raise
            self.position = at + hidden.shape[1]
            return outputs[0].clone() if len(outputs) == 1 else torch.cat(outputs, dim=1)

    async def aclose(self) -> None:
        """Tell the hosts, within a second or so. Never raises; closing twice is fine."""
        if not self._closed:
            self._closed = True
            await self._recruiter.release(self._hops)

    def _check(self, hidden: torch.Tensor, position: int, padding: Rows, hypo_ids: Rows) -> None:
        if self._closed:
            raise Closed("the session is closed")
        batch, limit = self._recruiter.terms.batch, self._recruiter.terms.max_length
        if hidden.dim() != 3 or hidden.shape[0] != batch or hidden.shape[1] < 1:
            raise BadStep(f"a step is [{batch}, tokens, hidden], not {list(hidden.shape)}")
        if not 0 <= position <= self.position:
            raise BadStep(f"a step at position {position} of a session that holds {self.position} tokens")
        asked = position + hidden.shape[1]
        if asked > limit:
            raise ContextTooLong(f"{asked} tokens do not fit a session of {limit}", asked=asked, limit=limit)
        if padding and (len(padding) != batch or min(padding) < 0):
            raise BadStep(f"padding needs a count for each of {batch} rows, not {list(padding)}")
        if hypo_ids and (len(hypo_ids) != batch or not all(0 <= row < batch for row in hypo_ids)):
            raise BadStep(f"hypo_ids needs a row below {batch} for each of {batch} rows, not {list(hypo_ids)}")

    async def _run_all(self, hidden: torch.Tensor, position: int, padding: Rows, hypo_ids: Rows) -> list[torch.Tensor]:
        """The step's chunks through all hops: at once where nothing stands against it, else hop by hop."""
        size = self._chunk_size(hidden.shape[1])
        first = max(size, max(padding, default=0) + 1 - position)  # past all padding, so that no row of it is empty
        starts = [0, *range(first, hidden.shape[1], size)]
        ends = [*starts[1:], hidden.shape[1]]
        chunks = [(position + start, hidden[:, start:end]) for start, end in zip(starts, ends, strict=True)]
        known: list[dict[Hop, torch.Tensor]] = [{} for _ in chunks]
        if self._options.push and not hypo_ids and (len(self._hops) > 1 or len(chunks) > 1):
            known = await self._run_together(chunks, padding)
        outputs = []
        for (at, chunk), done in zip(chunks, known, strict=True):
            outputs.append(await self._run(chunk, at, padding, hypo_ids if at == position else (), done))
        return outputs

    def _chunk_size(self, tokens: int) -> int:
        """Short enough that a prompt's chunks keep all hosts busy, long enough that products of matrices stay large."""
        if not self._options.push or len(self._hops) < 2:
            return self._options.chunk
        return min(self._options.chunk, max(MIN_CHUNK, tokens // (CHUNKS_A_HOP * len(self._hops))))

    async def _run_together(
        self, chunks: list[tuple[int, torch.Tensor]], padding: Rows
    ) -> list[dict[Hop, torch.Tensor]]:
        """For each chunk the outputs of the hops it came through: of all, if nothing fails."""
        if any(hop.failed is not None for hop in self._hops):
            return [{} for _ in chunks]
        flow = Flow(self._hops, timeout=self._options.step_timeout)
        parts = [(Part(at, tuple(chunk.shape), chunk.dtype, padding), chunk) for at, chunk in chunks]
        await flow.run(parts, self._next_ticket)
        if flow.refused is not None:
            raise flow.refused
        return [flow.outputs(number) for number in range(len(chunks))]

    def _next_ticket(self) -> int:
        self._ticket += 1
        return self._ticket

    async def _run(
        self, hidden: torch.Tensor, position: int, padding: Rows, hypo_ids: Rows, known: dict[Hop, torch.Tensor]
    ) -> torch.Tensor:
        """One chunk through all hops, one after another. Of some hops the outputs may be `known` already."""
        index = 0
        while index < len(self._hops):
            hop = self._hops[index]
            if hop.failed is not None:
                await self._recover(index, hop.failed)
                continue
            output = known.get(hop)
            if output is None:
                try:
                    output = await hop.step(
                        hidden,
                        position,
                        padding=padding,
                        hypo_ids=hypo_ids,
                        ticket=self._next_ticket(),
                        timeout=self._options.step_timeout,
                    )
                except HopFailed as failure:
                    hop.failed = failure
                    continue
            if hypo_ids:
                hop.journal.reorder(hypo_ids)
            hop.journal.append(hidden, padding)
            hidden = output
            index += 1
        return hidden

    async def _take_back(self, before: list[tuple[Hop, Mark]], *, reordered: bool) -> None:
        """After a step that was given up: journals agree on the old position and order again."""
        if not reordered:
            for hop in self._hops:
                hop.journal.rollback(self.position)
            return
        kept = [hop for hop, _ in before]
        newcomers = [hop for hop in self._hops if hop not in kept]
        self._hops = kept
        for hop, mark in before:
            hop.journal.restore(mark)
            if hop.failed is None and hop.held != self.position:
                hop.failed = HopFailed(Closed("a reorder was given up"), rebuild=True)
        await self._recruiter.release(newcomers)

    # ---- failures

    async def _recover(self, index: int, failure: HopFailed) -> None:
        """Put hosts with the same caches where hop `index` is, or raise `NoRoute` when patience ends."""
        hop, began = self._hops[index], trio.current_time()
        if self._give_up_at is None:
            self._give_up_at = began + self._options.patience
        if failure.rebuild and hop not in self._rebuilt:
            self._rebuilt.add(hop)
            if await self._rebuild(hop):
                return
            failure = hop.failed or failure
        where = f"blocks {hop.start}:{hop.end}"
        self._emit(SessionEvent("failover", f"lost {hop.peer} for {where}: {failure}", hop.start, hop.end, hop.peer))
        self._recruiter.blame(hop.peer, failure.error)
        await self._recruiter.release([hop])
        hops = await self._replacements(hop)
        self._hops[index : index + 1] = hops
        self.failovers += 1
        seconds = trio.current_time() - began
        peers = ", ".join(one.peer for one in hops)
        text = f"{where} run at {peers} now, after {seconds:.1f} s"
        self._emit(SessionEvent("recovered", text, hop.start, hop.end, hops[0].peer, seconds))

    async def _rebuild(self, hop: Hop) -> bool:
        """On the same host, which is well; False if it turns out not to be."""
        try:
            await hop.open(self._recruiter.terms, self._recruiter.next_epoch(), timeout=self._options.open_timeout)
            await replay([hop], hop.journal, options=self._options)
        except SwarmError as error:
            hop.failed = HopFailed(error)
        except HopFailed as failure:
            hop.failed = HopFailed(failure.error)
        else:
            hop.failed = None
        return hop.failed is None

    async def _replacements(self, lost: Hop) -> list[Hop]:
        until = self._give_up_at or trio.current_time()
        while True:
            hops = await self._recruiter.recruit(lost.start, lost.end, until=until)
            try:
                await replay(hops, lost.journal, options=self._options)
            except HopFailed as failure:
                for hop in hops:
                    if hop.failed is failure:
                        self._recruiter.blame(hop.peer, failure.error)
                await self._recruiter.release(hops)
                if trio.current_time() >= until:
                    where = f"{lost.start}:{lost.end}"
                    raise NoRoute(f"every host tried for blocks {where} failed: {failure}", missing=where) from failure
            except BaseException:
                await self._recruiter.release(hops)
                raise
            else:
                return hops


@asynccontextmanager
async def open_session(
    swarm: Swarm,
    *,
    model: str,
    fingerprint: str,
    blocks: int,
    max_length: int,
    batch: int = 1,
    options: SessionOptions | None = None,
    on_event: Callable[[SessionEvent], None] | None = None,
) -> AsyncIterator[Session]:
    """A session of `batch` rows of up to `max_length` tokens over all `blocks` of `model`.

    `on_event` is told of failures and recoveries as they happen. Raises `NoRoute` (naming the blocks without a host),
    `PoolFull` (naming bytes needed and free), `ContextTooLong`, `WrongModel`, or what the swarm's look-up raised.
    """

    def emit(event: SessionEvent) -> None:
        log.info("%s", event.text)
        if on_event is not None:
            on_event(event)

    options = options or SessionOptions()
    recruiter = Recruiter(swarm, Terms(model, fingerprint, max_length, batch, options.codec), options, emit)
    until = trio.current_time() + options.open_patience
    session = Session(await recruiter.recruit(0, blocks, until=until, opening=True), recruiter, options, emit)
    try:
        yield session
    finally:
        await session.aclose()
