"""A step on its way through all hops at once: hosts hand it to each other, and its chunks follow one another.

Every hop is told of every chunk; only the first is sent the hidden states. A host answers the client and pushes its
output to the next host, so that a step takes one way to the first host, one from each to the next, and one back: n + 1
ways instead of 2 n. Where a host cannot push, its answer says so and the client brings the output itself; where a push
seems lost, the client brings it too, and what comes twice is ignored.

A flow changes no journal and repairs nothing. When a hop fails it stops, and the session goes on hop by hop from what
is known by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import trio

from swarmlm.errors import BadStep, DeadlineExceeded, SwarmError, UsageError
from swarmlm.protocol import StepDone
from swarmlm.routing.hop import Hop, HopFailed, Part

PUSH_GRACE = 1.0  # seconds after which a push is believed lost: computing takes less, and bringing it twice is harmless
NO_PUSH_SECONDS = 30.0  # after a push that was lost: the hosts' link may be dead without their knowing
PUSH_TIMES = 4.0  # times what the hop before took: a slow machine is given longer


@dataclass(eq=False)
class _Chunk:
    part: Part
    hidden: torch.Tensor
    outputs: list[torch.Tensor | None]  # of each hop
    answered: list[trio.Event] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # when it was sent, and when each answer came


class Flow:
    """One step, used once."""

    def __init__(self, hops: Sequence[Hop], *, timeout: float) -> None:
        self._hops = hops
        self._timeout = timeout
        self._window = len(hops) + 1  # chunks on their way: enough to keep every host busy
        self._chunks: list[_Chunk] = []
        self._held: list[int | None] = []
        self._scope = trio.CancelScope()
        self.refused: SwarmError | None = None  # by a host whose cache was as it should be

    async def run(self, parts: Sequence[tuple[Part, torch.Tensor]], tickets: Callable[[], int]) -> None:
        """Until all `parts` came through, or a hop has `failed`, or the step is `refused`."""
        self._held = [hop.held for hop in self._hops]
        for hop in self._hops:
            hop.held = None
        after = 0
        for part, hidden in parts:
            ticket = tickets()
            part = replace(part, ticket=ticket, after=after)
            chunk = _Chunk(part, hidden, [None] * len(self._hops), [trio.Event() for _ in self._hops])
            self._chunks.append(chunk)
            after = ticket
        with self._scope:
            async with trio.open_nursery() as nursery:
                for number, chunk in enumerate(self._chunks):
                    if number >= self._window:
                        await self._chunks[number - self._window].answered[-1].wait()
                    for index in range(len(self._hops)):
                        await nursery.start(self._ask, chunk, index)  # in this order, also on the wire
        for index, hop in enumerate(self._hops):
            if all(chunk.answered[index].is_set() for chunk in self._chunks):
                last = self._chunks[-1].part
                hop.held = last.position + last.shape[1]

    def outputs(self, number: int) -> dict[Hop, torch.Tensor]:
        """What is known of chunk `number`: the outputs of the hops that it came through."""
        found = zip(self._hops, self._chunks[number].outputs, strict=True)
        return {hop: output for hop, output in found if output is not None}

    async def _ask(self, chunk: _Chunk, index: int, *, task_status: Any) -> None:
        """Chunk `chunk` at hop `index`, and whatever it takes to get its output to the next one."""
        hop = self._hops[index]
        onward = self._hops[index + 1] if index + 1 < len(self._hops) else None
        if index == 0:
            chunk.times.append(trio.current_time())
        task_status.started()
        try:
            given = chunk.hidden if index == 0 else None
            target = onward if trio.current_time() >= hop.no_push_before else None
            output, done = await hop.ask(chunk.part, given, onward=target, timeout=self._patience(chunk, index))
            chunk.outputs[index] = output
            chunk.answered[index].set()
            chunk.times.append(trio.current_time())
            hop.measure(chunk.part.shape[1], (chunk.times[-1] - chunk.times[-2]) * 1e3)  # what this hop adds
        except HopFailed as failure:
            self._stop(hop, failure)
        except (UsageError, BadStep) as error:
            if chunk is self._chunks[0] and self._held[index] == chunk.part.position:
                self.refused = error
            self._scope.cancel()
        else:
            if onward is not None:
                await self._see_on(chunk, index, done)

    async def _see_on(self, chunk: _Chunk, index: int, done: StepDone) -> None:
        """Hop `index` has answered: wait until the next one has, and bring it what was not pushed or got lost."""
        onward, answered, output = self._hops[index + 1], chunk.answered[index + 1], chunk.outputs[index]
        assert output is not None
        number = self._chunks.index(chunk)
        if number:
            await self._chunks[number - 1].answered[index + 1].wait()  # until then this one waits its turn there
        try:
            with trio.move_on_after(self._timeout):
                if done.pushed:
                    with trio.move_on_after(max(PUSH_GRACE, PUSH_TIMES * done.compute_ms / 1e3)):
                        await answered.wait()
                if not answered.is_set():
                    if done.pushed:
                        self._hops[index].no_push_before = trio.current_time() + NO_PUSH_SECONDS
                    await onward.feed(chunk.part.ticket, output)
                    await answered.wait()
        except HopFailed as failure:
            self._stop(onward, failure)
        else:
            if not answered.is_set():
                text = f"{onward.peer} did not answer Step within {self._timeout:g} seconds"
                self._stop(onward, HopFailed(DeadlineExceeded(text)))

    def _patience(self, chunk: _Chunk, index: int) -> float:
        """Seconds for a call. The first hop has its time from the chunk before; the others are watched by `_see_on`."""
        queued = min(self._chunks.index(chunk), self._window)
        return self._timeout * (1 + queued) if index == 0 else self._timeout * (2 + index + self._window)

    def _stop(self, hop: Hop, failure: HopFailed) -> None:
        if not self._scope.cancel_called:
            hop.failed = failure
            self._scope.cancel()
