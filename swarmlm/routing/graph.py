"""The swarm as the planner sees it: pure data. A host may be entered and left at any of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from swarmlm.protocol import PeerId


@dataclass(frozen=True)
class HostView:
    """One host as a candidate of one session. Times in milliseconds, for one token.

    `max_blocks` is how many blocks of this session's KV fit into its free memory. `kv_free` and `kv_block_bytes` (free
    there, needed there for a block) are bytes and only make the error of a full swarm more telling; 0 is unknown.
    """

    peer: PeerId
    start: int
    end: int
    rtt_ms: float
    queue_ms: float
    block_ms: float
    max_blocks: int
    kv_free: int = 0
    kv_block_bytes: int = 0

    @property
    def fixed_ms(self) -> float:
        """What a hop costs there before its first block."""
        return self.rtt_ms + self.queue_ms


@dataclass(frozen=True)
class PathHop:
    """Blocks [start, end) at `peer`."""

    peer: PeerId
    start: int
    end: int

    @property
    def blocks(self) -> int:
        return self.end - self.start


class RouteHop(NamedTuple):
    """A hop in use; `ms` is the smoothed round trip of a one-token step, before the first one that of a prefill."""

    peer: PeerId
    start: int
    end: int
    ms: float
