"""What a session needs of the swarm, what it may be told, and what it tells. Implemented above, by the node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from swarmlm.actors.core import Connection
from swarmlm.errors import SwarmError
from swarmlm.protocol import Codec, PeerId
from swarmlm.routing.graph import HostView


class Swarm(Protocol):
    async def views(self, model: str, fingerprint: str, *, max_length: int, batch: int, fresh: bool) -> list[HostView]:
        """Hosts that could serve a session of `batch` rows of `max_length` tokens, measured.

        `fresh` asks the swarm again instead of trusting what is known. May raise any `SwarmError`.
        """

    async def connect(self, peer: PeerId, *, timeout: float) -> Connection:
        """A running connection on a stream of its own; the session closes it. Raises `Unreachable`."""

    def report_failure(self, peer: PeerId, error: SwarmError) -> None:
        """The session has given up on `peer` for now; others should not be sent there."""


@dataclass(frozen=True)
class SessionOptions:
    """Tokens and seconds. The defaults suit hosts on home connections."""

    chunk: int = 512  # tokens of a prefill or replay step: what one message carries, and a host takes in at once
    push: bool = True  # let hosts hand their outputs to each other
    codec: Codec = "none"  # how hidden states are compressed where the host knows how; others may change tokens
    connect_timeout: float = 5.0  # a dial and a handshake, through a relay if need be
    open_timeout: float = 10.0  # reserving memory takes no time, but its answer may wait behind a prefill chunk
    step_timeout: float = 60.0  # a chunk on a slow machine; dead peers are noticed by heartbeats long before
    open_patience: float = 3.0  # a cold look-up may miss hosts that a second one finds
    patience: float = 120.0  # a host that died may be restarted, and loads its weights
    poll: float = 0.5  # between look-ups while waiting
    ban_seconds: float = 15.0  # a peer that failed comes last for that long


@dataclass(frozen=True)
class SessionEvent:
    """Something a user may want to see; `text` is one line. `seconds` is how long a recovery took."""

    kind: Literal["failover", "waiting", "recovered"]
    text: str
    start: int
    end: int
    peer: PeerId | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Terms:
    """What each hop of a session is asked to hold."""

    model: str
    fingerprint: str
    max_length: int
    batch: int
    codec: Codec = "none"
