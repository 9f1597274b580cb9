"""What a connection needs of a stream to another process, and two ends of one inside this process.

The real link, framed messages over a transport's stream, is `swarmlm.transport.link`; an embedder may bring its own.
"""

from __future__ import annotations

from typing import Protocol

import trio

from swarmlm.actors.core.message import Envelope
from swarmlm.errors import Closed, ConnectionLost

BUFFER = 16  # envelopes on their way in each direction of a memory link before a sender waits


class Link(Protocol):
    """An ordered, reliable pipe of envelopes to one peer; one task sends, one receives.

    A link may also have `bytes_received`, a growing int: then a large envelope that trickles in counts as being heard.
    """

    @property
    def peer(self) -> str:
        """Who is at the other end, for errors and logs."""

    async def send(self, envelope: Envelope) -> None:
        """Raises `ConnectionLost`, or `Closed` after our own `aclose`."""

    async def receive(self) -> Envelope | None:
        """The next envelope, None at a clean end. Raises `ProtocolError`, `ConnectionLost`, `Closed`."""

    async def aclose(self) -> None:
        """Close both directions. Idempotent, never raises."""


class MemoryLink:
    """A link whose other end is in this process: envelopes are handed over, not encoded. See `memory_links`."""

    def __init__(
        self, peer: str, out: trio.MemorySendChannel[Envelope], into: trio.MemoryReceiveChannel[Envelope]
    ) -> None:
        self.peer = peer
        self._out = out
        self._into = into

    async def send(self, envelope: Envelope) -> None:
        """Raises `ConnectionLost` if the other end has closed, `Closed` if this one has."""
        try:
            await self._out.send(envelope)
        except trio.BrokenResourceError:
            raise ConnectionLost(f"{self.peer} closed the link") from None
        except trio.ClosedResourceError:
            raise Closed(f"the link to {self.peer} is closed") from None

    async def receive(self) -> Envelope | None:
        """The next envelope, None when the other end has closed. Raises `Closed` if this end has."""
        try:
            return await self._into.receive()
        except trio.EndOfChannel:
            return None
        except trio.ClosedResourceError:
            raise Closed(f"the link to {self.peer} is closed") from None

    async def aclose(self) -> None:
        self._out.close()
        self._into.close()


def memory_links(a: str = "a", b: str = "b") -> tuple[MemoryLink, MemoryLink]:
    """The two ends of a link between `a` and `b`: first the one that `a` holds, whose peer is `b`."""
    to_b, from_a = trio.open_memory_channel[Envelope](BUFFER)
    to_a, from_b = trio.open_memory_channel[Envelope](BUFFER)
    return MemoryLink(b, to_b, from_b), MemoryLink(a, to_a, from_a)
