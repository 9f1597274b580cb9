"""A link over a stream: frames on the wire, envelopes to the actors."""

from __future__ import annotations

from swarmlm.actors.core.message import Envelope
from swarmlm.protocol import PeerId, decode, encode
from swarmlm.transport.base import Stream
from swarmlm.transport.frames import FrameDecoder, encode_frame


class FramedLink:
    """Implements `actors.core.Link`: one reader and one writer task use it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._frames = FrameDecoder()
        self.bytes_received = 0  # grows while a long reply is still arriving

    @property
    def peer(self) -> PeerId:
        return self._stream.peer

    async def send(self, envelope: Envelope) -> None:
        await self._stream.send(encode_frame(*encode(envelope)))

    async def receive(self) -> Envelope | None:
        """The next envelope; None when the peer closed between two frames. Raises `ProtocolError`."""
        while (frame := self._frames.next_frame()) is None:
            data = await self._stream.receive()
            if not data:
                self._frames.close()
                return None
            self.bytes_received += len(data)
            self._frames.feed(data)
        return decode(*frame)

    async def aclose(self) -> None:
        await self._stream.aclose()
