"""Two ends of a link inside one process, for embedding and for tests: envelopes are handed over, not encoded."""

from __future__ import annotations

import trio

from swarmlm.actors.core.message import Envelope
from swarmlm.errors import Closed, ConnectionLost

BUFFER = 16  # envelopes on their way in each direction before a sender waits


class MemoryLink:
    """A `Link` whose other end is in this process. Made in pairs by `memory_links`."""

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
