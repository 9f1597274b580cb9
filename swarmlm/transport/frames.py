"""The frame codec, sans IO: bytes in, frames out; frames in, buffers out.

    magic "SL" | version u8 = 1 | reserved u8 = 0 | header length u32 | segments u16 | length u32 of each segment
    | header | segments                                                                    all little-endian

A header is msgpack (`swarmlm.protocol`), segments are raw tensor bytes. Anything else is a `ProtocolError` as soon as
the offending byte is seen, and memory grows only with the bytes that really came.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from swarmlm.errors import ProtocolError

MAX_HEADER = 16 * 2**20  # bytes: a directory listing of 20,000 records of some 700 bytes
MAX_SEGMENTS = 64  # tensors of one message: a step carries two
MAX_FRAME = 2**30 + 2**25  # bytes: one tensor of protocol.MAX_TENSOR and its header

_FIXED = struct.Struct("<2sBBIH")
_MAGIC = b"SL"
_VERSION = 1


def encode_frame(header: bytes, segments: Sequence[memoryview]) -> list[bytes | memoryview]:
    """The buffers of one frame, in order; segments are passed on, not copied."""
    sizes = struct.pack(f"<{len(segments)}I", *(segment.nbytes for segment in segments))
    return [_FIXED.pack(_MAGIC, _VERSION, 0, len(header), len(segments)) + sizes + header, *segments]


class FrameDecoder:
    """Feed it what arrives, take frames while there are any."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self._buffer += data

    def next_frame(self) -> tuple[memoryview, list[memoryview]] | None:
        """(header, segments) of the next whole frame, or None. Raises `ProtocolError`."""
        sizes = self._sizes()
        if sizes is None or len(self._buffer) < sum(sizes):
            return None
        frame = memoryview(self._buffer)
        self._buffer = self._buffer[sum(sizes) :]
        parts, at = [], 0
        for size in sizes:
            parts.append(frame[at : at + size])
            at += size
        return parts[1], parts[2:]

    def close(self) -> None:
        """The stream ended: raises `ProtocolError` if it did so inside a frame."""
        if self._buffer:
            raise ProtocolError(f"the stream ended inside a frame, {len(self._buffer)} bytes into it")

    def _sizes(self) -> list[int] | None:
        """Lengths of the preamble, the header and each segment, once the preamble is complete."""
        start = bytes(self._buffer[: _FIXED.size])
        if start[:2] != _MAGIC[: len(start)] or start[2:3] not in (b"", bytes([_VERSION])):
            raise ProtocolError("not a frame of ours")
        if len(start) < _FIXED.size:
            return None
        _, _, _, header, count = _FIXED.unpack(start)
        if header > MAX_HEADER:
            raise ProtocolError(f"a header of {header} bytes is over the limit of {MAX_HEADER}")
        if count > MAX_SEGMENTS:
            raise ProtocolError(f"{count} segments are over the limit of {MAX_SEGMENTS}")
        preamble = _FIXED.size + 4 * count
        if len(self._buffer) < preamble:
            return None
        sizes = [preamble, header, *struct.unpack_from(f"<{count}I", self._buffer, _FIXED.size)]
        if sum(sizes) > MAX_FRAME:
            raise ProtocolError(f"a frame of {sum(sizes)} bytes is over the limit of {MAX_FRAME}")
        return sizes
