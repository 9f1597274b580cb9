"""The client's side of training: whole batches forward and backward through the hosts of all blocks.

    async with open_training(swarm, model=..., fingerprint=..., blocks=30) as route:
        output, tape = await route.forward(hidden, padding)
        gradient = await route.backward(tape, grad)          # with respect to `hidden`

A batch is cut along its rows into micro-batches that follow each other through the hosts, so that all of them work at
the same time. Hosts hold nothing that matters: the tape keeps what went into each span, and a host that is lost in
either direction is replaced by others over its blocks, which compute the same again.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import torch
import trio
from msgspec import structs

from swarmlm.errors import BadStep, Closed, RemoteFailure, UnknownSession
from swarmlm.kernels.wire import from_wire, to_wire
from swarmlm.protocol import Backward, BackwardDone, Forward, ForwardDone, PassKey, PeerId, Tensor
from swarmlm.routing.base import SessionEvent, SessionOptions, Swarm
from swarmlm.routing.graph import PathHop
from swarmlm.routing.journal import Rows
from swarmlm.routing.pass_hosts import HostLost, PassHosts

MICRO_TOKENS = 256  # tokens of a micro-batch: enough for matrices to be used well, few enough to fill a pipeline
MIN_MICRO_BATCHES = 2  # where there are rows for it: with one, all hosts but one would always wait
PASS_TIMEOUT = 300.0  # seconds: the micro-batches before it, then a backward with its recompute on a slow machine

T = TypeVar("T")

log = logging.getLogger("swarmlm.routing")


@dataclass(frozen=True)
class _Leg:
    """Blocks [start, end) for one micro-batch: what went in, and who may have kept its graph under `key`."""

    start: int
    end: int
    hidden: torch.Tensor
    peer: PeerId
    key: PassKey | None


@dataclass(frozen=True)
class _Micro:
    """Some rows of the batch on their way."""

    padding: Rows
    legs: tuple[_Leg, ...]


@dataclass(frozen=True)
class Tape:
    """What a backward needs of its forward. Made by `TrainingRoute.forward`; may be used more than once."""

    shape: torch.Size
    dtype: torch.dtype
    micros: tuple[_Micro, ...] = field(repr=False)


class TrainingRoute:
    """Hosts over all blocks of a model. Made by `open_training`; several batches may be under way at a time."""

    def __init__(self, hosts: PassHosts, micro_tokens: int) -> None:
        self._hosts = hosts
        self._micro_tokens = micro_tokens

    @property
    def route(self) -> list[PathHop]:
        """The hosts in order; empty before the first forward."""
        return list(self._hosts.route)

    @property
    def failovers(self) -> int:
        return self._hosts.failovers

    async def forward(
        self, hidden: torch.Tensor, padding: Rows = (), *, differentiable: bool = True
    ) -> tuple[torch.Tensor, Tape | None]:
        """(output of all blocks for `hidden`, both [rows, tokens, hidden]; the tape, None if not `differentiable`).

        `padding` is the number of left-pad tokens of each row. Raises `BadStep` and `ContextTooLong` (the request's
        fault), `NoRoute` when no host was found for some blocks in time, `Closed`.
        """
        self._check(hidden, padding)
        await self._hosts.plan_route()
        if differentiable:
            hidden = hidden.detach().cpu().clone()  # the tape outlives what the caller may write into it
        parts = self._parts(hidden.shape[0], hidden.shape[1])

        async def run(index: int) -> tuple[torch.Tensor, _Micro]:
            rows = parts[index]
            pads = padding[rows.start : rows.stop]
            output, legs = await self._through(0, self._hosts.blocks, hidden[rows], pads, keep=differentiable)
            return output, _Micro(pads, tuple(legs))

        done = await _all(run, len(parts))
        output = torch.cat([part for part, _ in done])
        return output, Tape(hidden.shape, hidden.dtype, tuple(micro for _, micro in done)) if differentiable else None

    async def backward(self, tape: Tape, grad: torch.Tensor) -> torch.Tensor:
        """The gradient at the input of the forward that made `tape`, given `grad`, that at its output. Same errors."""
        if self._hosts.closed:
            raise Closed("the training route is closed")
        if grad.shape != tape.shape:
            raise BadStep(f"gradients of shape {list(grad.shape)} for a batch of {list(tape.shape)}")
        grads = torch.split(grad.detach(), [micro.legs[0].hidden.shape[0] for micro in tape.micros])

        async def run(index: int) -> torch.Tensor:
            return await self._back(tape.micros[index], grads[index])

        return torch.cat(await _all(run, len(grads))).to(tape.dtype)

    def _check(self, hidden: torch.Tensor, padding: Rows) -> None:
        if self._hosts.closed:
            raise Closed("the training route is closed")
        if hidden.dim() != 3 or 0 in hidden.shape:
            raise BadStep(f"a batch is [rows, tokens, hidden], not {list(hidden.shape)}")
        if padding and (len(padding) != hidden.shape[0] or not 0 <= min(padding) <= max(padding) < hidden.shape[1]):
            raise BadStep(f"padding needs a count below {hidden.shape[1]} for each row, not {list(padding)}")

    def _parts(self, rows: int, tokens: int) -> list[slice]:
        """Rows of each micro-batch: as many of them as have `micro_tokens` each, their rows as equal as may be."""
        count = max(rows // -(-self._micro_tokens // tokens), min(MIN_MICRO_BATCHES, rows))
        edges = [rows * index // count for index in range(count + 1)]
        return [slice(low, high) for low, high in pairwise(edges)]

    # ---- one micro-batch

    async def _through(
        self, start: int, end: int, hidden: torch.Tensor, padding: Rows, *, keep: bool
    ) -> tuple[torch.Tensor, list[_Leg]]:
        legs: list[_Leg] = []
        while start < end:
            place = self._hosts.places(start, end)[0]
            try:
                output, leg = await self._forward(place, hidden, padding, keep)
            except HostLost as lost:
                await self._hosts.replace_host(lost.peer)
                continue
            if keep:
                legs.append(leg)
            hidden, start = output, place.end
        return hidden, legs

    async def _back(self, micro: _Micro, grad: torch.Tensor) -> torch.Tensor:
        legs = list(micro.legs)
        while legs:
            leg = legs.pop()
            places = self._hosts.places(leg.start, leg.end)
            if len(places) > 1:  # its host was replaced by several: what goes into the later ones is not known yet
                _, again = await self._through(leg.start, leg.end, leg.hidden, micro.padding, keep=True)
                legs += again
                continue
            try:
                grad = await self._backward(places[0], leg, grad, micro.padding)
            except HostLost as lost:
                await self._hosts.replace_host(lost.peer)
                legs.append(leg)
        return grad

    async def _forward(
        self, place: PathHop, hidden: torch.Tensor, padding: Rows, keep: bool
    ) -> tuple[torch.Tensor, _Leg]:
        key: PassKey | None = secrets.token_bytes(16) if keep else None
        message = Forward(
            self._hosts.model,
            self._hosts.fingerprint,
            place.start,
            place.end,
            to_wire(hidden),
            padding=padding,
            keep=key,
        )

        def read(done: ForwardDone) -> tuple[torch.Tensor, _Leg]:
            leg = _Leg(place.start, place.end, hidden, place.peer, key if done.kept else None)
            return _answer(done.hidden, hidden), leg

        return await self._hosts.ask(place.peer, message, read)

    async def _backward(self, place: PathHop, leg: _Leg, grad: torch.Tensor, padding: Rows) -> torch.Tensor:
        message = Backward(
            self._hosts.model,
            self._hosts.fingerprint,
            leg.start,
            leg.end,
            to_wire(grad),
            to_wire(leg.hidden),
            padding=padding,
        )

        def read(done: BackwardDone) -> torch.Tensor:
            return _answer(done.grad, grad)

        if leg.key is not None and leg.peer == place.peer:
            short = structs.replace(message, hidden=None, keep=leg.key)
            with suppress(UnknownSession):  # it ran out of memory or patience: the hidden states go again
                return await self._hosts.ask(place.peer, short, read, may_forget=True)
        return await self._hosts.ask(place.peer, message, read)


def _answer(answer: Tensor, given: torch.Tensor) -> torch.Tensor:
    """The tensor answered to `given`, which has its shape, in its dtype."""
    tensor = from_wire(answer)
    if tensor.shape != given.shape or not tensor.is_floating_point():
        raise RemoteFailure(f"an answer of {answer.dtype} {list(tensor.shape)} to one of {list(given.shape)}")
    return tensor.to(given.dtype)


async def _all(work: Callable[[int], Awaitable[T]], count: int) -> list[T]:
    """`work(0)` to `work(count - 1)` at the same time; the first error cancels the others and is raised as it is."""
    results: dict[int, T] = {}
    errors: list[Exception] = []

    async def one(index: int) -> None:
        try:
            results[index] = await work(index)
        except Exception as error:
            errors.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for index in range(count):
            nursery.start_soon(one, index)
    if errors:
        raise errors[0]
    return [results[index] for index in range(count)]


@asynccontextmanager
async def open_training(
    swarm: Swarm,
    *,
    model: str,
    fingerprint: str,
    blocks: int,
    micro_tokens: int = MICRO_TOKENS,
    pass_timeout: float = PASS_TIMEOUT,
    options: SessionOptions | None = None,
    on_event: Callable[[SessionEvent], None] | None = None,
) -> AsyncIterator[TrainingRoute]:
    """A way to train through all `blocks` of `model`. Hosts are looked for by the first forward.

    Micro-batches have at least `micro_tokens` tokens each where the batch has as many; a host may take `pass_timeout`
    seconds for one. `on_event` is told of failures and recoveries as they happen.
    """

    def emit(event: SessionEvent) -> None:
        log.info("%s", event.text)
        if on_event is not None:
            on_event(event)

    hosts = PassHosts(swarm, (model, fingerprint, blocks), pass_timeout, options or SessionOptions(), emit)
    try:
        yield TrainingRoute(hosts, micro_tokens)
    finally:
        await hosts.aclose()
