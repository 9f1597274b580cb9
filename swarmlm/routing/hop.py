"""One hop of a session: blocks [start, end) of it, held by one host, over a connection of its own."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch
import trio

from swarmlm.actors.core import Connection
from swarmlm.errors import BadStep, Busy, RemoteFailure, StaleEpoch, SwarmError, UnknownSession, UsageError
from swarmlm.kernels.compression import compress, decompress
from swarmlm.protocol import CloseSession, Codec, OpenSession, Push, SessionId, Step, StepDone
from swarmlm.protocol import Hop as NextHop
from swarmlm.routing.base import SessionOptions, Swarm, Terms
from swarmlm.routing.graph import PathHop, RouteHop
from swarmlm.routing.journal import Journal, Rows

BUSY_WAITS = (0.05, 0.2, 0.5, 1.0)  # seconds between tries at a host whose mailbox is full; then another host is better
CLOSE_SECONDS = 1.0  # for a host to hear that we go; it would notice by itself
SMOOTHING = 0.2  # weight of the newest round trip in the running mean


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of a step, as every hop sees them: `shape` is [batch, tokens, hidden]."""

    position: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    padding: Rows = ()
    hypo_ids: Rows = ()
    ticket: int = 0
    after: int = 0


class HopFailed(Exception):
    """This hop cannot go on as it is. `rebuild`: the host is well, it only lost or disowned the session."""

    def __init__(self, error: SwarmError, *, rebuild: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.rebuild = rebuild


class Hop:
    """Made by `open_hop`. `held` is how many tokens the host's cache holds, None after a step that was not answered."""

    def __init__(
        self,
        place: PathHop,
        connection: Connection,
        session: SessionId,
        epoch: int,
        journal: Journal,
        next_peer: str = "",
    ) -> None:
        self.peer, self.start, self.end = place.peer, place.start, place.end
        self.session = session
        self.journal = journal
        self.held: int | None = 0
        self.failed: HopFailed | None = None
        self.next_peer = next_peer
        self.no_push_before = -math.inf  # trio's time: a push of its host was lost
        self.codec: Codec = "none"  # what the host and we agreed on
        self._connection = connection
        self._epoch = epoch
        self._ms = 0.0
        self._decodes = 0

    def __repr__(self) -> str:
        return f"<Hop {self.start}:{self.end} at {self.peer}>"

    @property
    def route(self) -> RouteHop:
        return RouteHop(self.peer, self.start, self.end, self._ms)

    async def step(
        self,
        hidden: torch.Tensor,
        position: int,
        *,
        padding: Rows = (),
        hypo_ids: Rows = (),
        ticket: int = 0,
        timeout: float,
    ) -> torch.Tensor:
        """The span's output for `hidden` [batch, tokens, hidden], in the same shape and dtype.

        Raises `HopFailed` when the hop is lost. `UsageError` and `BadStep` are the caller's fault; the host is fine.
        """
        clean = self.held == position
        part = Part(position, tuple(hidden.shape), hidden.dtype, padding, hypo_ids, ticket)
        started = trio.current_time()
        try:
            output, _ = await self.ask(part, hidden, timeout=timeout)
        except BadStep as error:
            if clean:
                raise
            # A cache that cannot go back that far (recurrent layers) is filled anew; a bad step then fails again.
            raise HopFailed(error, rebuild=True) from error
        self.held = position + hidden.shape[1]
        self.measure(hidden.shape[1], (trio.current_time() - started) * 1e3)
        return output

    async def ask(
        self, part: Part, hidden: torch.Tensor | None, *, onward: Hop | None = None, timeout: float
    ) -> tuple[torch.Tensor, StepDone]:
        """The span's output for `part` of a step, and all that the host said. Errors as `step`.

        Without `hidden` the host waits for it to be pushed, or brought by `feed`. `onward` is whom it shall push to.
        """
        shape, after = part.shape, part.position + part.shape[1]
        message = Step(
            self.session,
            self._epoch,
            part.position,
            compress(hidden, self.codec) if hidden is not None else None,
            padding=part.padding,
            hypo_ids=part.hypo_ids,
            codec=self.codec,
            next_hops=(NextHop(onward.peer, onward.session, onward._epoch),) if onward is not None else (),
            ticket=part.ticket,
            after=part.after,
        )
        try:
            done = await self._ask(message, timeout)
            output = decompress(done.hidden, self.codec)
            if output.shape != shape or done.position != after:
                got = f"{tuple(output.shape)} at {done.position}"
                raise RemoteFailure(f"{self.peer} answered with {got} instead of {shape} at {after}")
        except (UsageError, BadStep):
            raise
        except SwarmError as error:
            raise HopFailed(error, rebuild=isinstance(error, UnknownSession | StaleEpoch)) from error
        return output.to(part.dtype), done

    async def feed(self, ticket: int, hidden: torch.Tensor) -> None:
        """Bring what step number `ticket` is waiting for. Raises `HopFailed` when the connection is lost."""
        message = Push(self.session, self._epoch, ticket, compress(hidden, self.codec))
        try:
            await self._connection.ref().cast(message)
        except SwarmError as error:
            raise HopFailed(error) from error

    async def open(self, terms: Terms, epoch: int, *, timeout: float) -> None:
        """Reserve memory, or empty what is there and fence the frames of before. Raises what the host answers."""
        self.held, self._epoch = None, epoch
        ask = OpenSession(
            session=self.session,
            model=terms.model,
            fingerprint=terms.fingerprint,
            start=self.start,
            end=self.end,
            max_length=terms.max_length,
            batch=terms.batch,
            epoch=epoch,
            next_peer=self.next_peer,
        )
        opened = await self._connection.ref().call(ask, deadline=timeout)
        self.codec = terms.codec if terms.codec in opened.codecs else "none"
        self.held = 0

    async def close(self) -> bool:
        """Tell the host, within CLOSE_SECONDS, and close the connection. False if the host may not have heard."""
        heard = False
        with trio.CancelScope(shield=True), suppress(SwarmError):
            await self._connection.ref().call(CloseSession(self.session), deadline=CLOSE_SECONDS)
            heard = True
        with trio.CancelScope(deadline=trio.current_time() + CLOSE_SECONDS, shield=True):
            await self._connection.aclose()
        return heard

    async def _ask(self, message: Step, timeout: float) -> StepDone:
        self.held = None
        for wait in BUSY_WAITS:
            try:
                return await self._connection.ref().call(message, deadline=timeout)
            except Busy:
                await trio.sleep(wait)
        return await self._connection.ref().call(message, deadline=timeout)

    def measure(self, tokens: int, ms: float) -> None:
        """Take in how long a step of `tokens` tokens took."""
        if tokens == 1:
            self._ms = ms if self._decodes == 0 else self._ms + SMOOTHING * (ms - self._ms)
            self._decodes += 1
        elif self._decodes == 0:
            self._ms = ms


async def open_hop(
    swarm: Swarm,
    terms: Terms,
    place: PathHop,
    epoch: int,
    orphans: list[SessionId],
    options: SessionOptions,
    next_peer: str = "",
) -> Hop:
    """Connect and reserve memory. Raises `Unreachable`, what the host answers, or what became of the connection.

    `orphans` are sessions of ours that this host may still hold: they are closed first and taken off the list. After an
    error, a session that may have been opened all the same is on it.
    """
    connection = await swarm.connect(place.peer, timeout=options.connect_timeout)
    session: SessionId = secrets.token_bytes(16)
    hop = Hop(place, connection, session, epoch, Journal(terms.max_length), next_peer)
    try:
        while orphans:
            await connection.ref().call(CloseSession(orphans[-1]), deadline=options.open_timeout)
            orphans.pop()
        await hop.open(terms, epoch, timeout=options.open_timeout)
    except BaseException:
        if not await hop.close():
            orphans.append(session)
        raise
    return hop


async def close_hops(hops: Iterable[Hop]) -> list[Hop]:
    """Close all at once, bounded, whatever happens. Returns those whose hosts may still hold the session."""
    unheard: list[Hop] = []

    async def close(hop: Hop) -> None:
        if not await hop.close():
            unheard.append(hop)

    with trio.CancelScope(shield=True):
        async with trio.open_nursery() as nursery:
            for hop in hops:
                nursery.start_soon(close, hop)
    return unheard
