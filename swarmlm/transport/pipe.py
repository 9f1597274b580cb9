"""One direction of a simulated stream: bytes that arrive later. Pure bookkeeping, used by `transport.memory` only.

The rules:

- Bytes travel in segments of at most `SEGMENT` bytes. A segment first waits for the wire (`bandwidth`, shared by all
  streams of one direction of a pair), then travels `latency`, plus up to `jitter`, plus a round trip each time it is
  lost. No segment overtakes another of its stream.
- While a pair is cut, nothing arrives. What was on its way is sent again when it is healed.
- The end of a stream, clean or not, travels behind its bytes like one more segment.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random

import trio

from swarmlm.errors import ConfigError

SEGMENT = 16 * 1024  # bytes lost or delayed together; real packets are a tenth, and ten times the work to simulate
WINDOW = 2**20  # bytes of a stream on their way or unread before its sender waits, in each direction

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Conditions:
    """Of one direction between two peers. Raises `ConfigError` for what no wire can be."""

    latency: float = 0.0  # seconds, one way
    bandwidth: float = math.inf  # bytes per second
    loss: float = 0.0  # share of segments lost at each attempt
    jitter: float = 0.0  # seconds: at most that much is added to the latency, evenly spread

    def __post_init__(self) -> None:
        if not (0 <= self.latency < math.inf and 0 <= self.jitter < math.inf):
            raise ConfigError(f"latency and jitter are seconds, not {self.latency} and {self.jitter}")
        if not self.bandwidth > 0:
            raise ConfigError(f"a bandwidth of {self.bandwidth} bytes per second carries nothing")
        if not 0 <= self.loss < 1:
            raise ConfigError(f"a loss of {self.loss} is no share below 1")


class Direction:
    """From one peer to another. Its dice are its own, so that chance in one pair does not depend on other pairs."""

    def __init__(self, conditions: Conditions, seed: str) -> None:
        self.conditions = conditions
        self.cut = False
        self._dice = Random(seed)
        self._wire_free_at = -math.inf

    def arrival(self, size: int) -> float:
        """When `size` bytes sent now will arrive; never, while cut."""
        if self.cut:
            return math.inf
        self._wire_free_at = max(self._wire_free_at, trio.current_time()) + size / self.conditions.bandwidth
        return self._wire_free_at + self.delay()

    def delay(self) -> float:
        """Seconds that one segment travels."""
        delay = self.conditions.latency
        if self.conditions.jitter:
            delay += self._dice.uniform(0.0, self.conditions.jitter)
        while self.conditions.loss and self._dice.random() < self.conditions.loss:
            delay += 2 * self.conditions.latency
        return delay

    def heal(self) -> None:
        self.cut = False
        self._wire_free_at = trio.current_time()


class Bell:
    """Wakes whoever waits on either end of a stream."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = trio.Event()

    async def wait(self, until: float) -> None:
        """Until it rings or the clock says `until`."""
        with trio.move_on_at(until):
            await self._event.wait()


class End(Enum):
    CLEAN = "closed"
    RESET = "reset"


@dataclass(slots=True)
class _Segment:
    arrival: float
    content: bytes | End


class Pipe:
    """`unread` counts bytes on their way or arrived and not taken."""

    def __init__(self, direction: Direction, bell: Bell) -> None:
        self.direction = direction
        self.unread = 0
        self._segments: deque[_Segment] = deque()
        self._last_arrival = -math.inf
        self._bell = bell
        self._reader_gone = False

    def push(self, content: bytes | End) -> None:
        """Send it now; into nowhere if the reader has gone."""
        if self._reader_gone:
            return
        self._segments.append(_Segment(self._arrival(content), content))
        self.unread += _size(content)
        self._bell.ring()

    def take(self) -> bytes | End | None:
        """All bytes that have arrived, or how the stream ended, or None. The end stays."""
        now = trio.current_time()
        parts: list[bytes] = []
        while self._segments and self._segments[0].arrival <= now:
            content = self._segments[0].content
            if isinstance(content, End):
                return b"".join(parts) if parts else content
            parts.append(content)
            self.unread -= len(content)
            self._segments.popleft()
            self._bell.ring()
        return b"".join(parts) if parts else None

    def next_arrival(self) -> float:
        return self._segments[0].arrival if self._segments else math.inf

    def end_arrival(self) -> float:
        """When the reader can know that the other side ended the stream."""
        last = self._segments[-1] if self._segments else None
        return last.arrival if last is not None and isinstance(last.content, End) else math.inf

    def discard(self) -> None:
        """The reader has gone."""
        self._reader_gone = True
        self._segments.clear()
        self.unread = 0
        self._bell.ring()

    def break_off(self) -> None:
        """The sender died this instant: what has not arrived never will."""
        now = trio.current_time()
        while self._segments and self._segments[-1].arrival > now:
            self.unread -= _size(self._segments.pop().content)
        self._segments.append(_Segment(math.inf if self.direction.cut else now, End.RESET))
        self._bell.ring()

    def cut(self) -> None:
        """Its direction was cut: hold what is on its way."""
        now = trio.current_time()
        for segment in self._segments:
            if segment.arrival > now:
                segment.arrival = math.inf

    def heal(self) -> None:
        """Its direction was healed: send again what was held."""
        self._last_arrival = trio.current_time()
        for segment in self._segments:
            if segment.arrival == math.inf:
                segment.arrival = self._arrival(segment.content)
        self._bell.ring()

    def _arrival(self, content: bytes | End) -> float:
        arrival = self.direction.arrival(_size(content))
        if arrival < math.inf:
            arrival = self._last_arrival = max(arrival, self._last_arrival)
        return arrival


def _size(content: bytes | End) -> int:
    return 0 if isinstance(content, End) else len(content)


def segments_of(buffers: Sequence[Buffer]) -> Iterator[bytes]:
    """The buffers' bytes, copied, in pieces of `SEGMENT` bytes and a rest; small buffers share a piece."""
    pending: list[memoryview] = []
    room = SEGMENT
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        while view:
            pending.append(view[:room])
            view = view[room:]
            room -= len(pending[-1])
            if not room:
                yield b"".join(pending)
                pending, room = [], SEGMENT
    if pending:
        yield b"".join(pending)
