"""Frames: any split of the bytes gives the same frames, and garbage is refused before memory is spent on it."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmlm.errors import ProtocolError
from swarmlm.transport.frames import MAX_FRAME, MAX_HEADER, MAX_SEGMENTS, FrameDecoder, encode_frame

frames = st.tuples(st.binary(max_size=60), st.lists(st.binary(max_size=60), max_size=4))


def encoded(header: bytes, segments: list[bytes]) -> bytes:
    return b"".join(bytes(part) for part in encode_frame(header, [memoryview(segment) for segment in segments]))


def take_all(decoder: FrameDecoder) -> list[tuple[bytes, list[bytes]]]:
    taken = []
    while (frame := decoder.next_frame()) is not None:
        taken.append((bytes(frame[0]), [bytes(segment) for segment in frame[1]]))
    return taken


@given(st.lists(frames, max_size=4), st.lists(st.integers(0, 400), max_size=6))
def test_any_split_gives_the_same_frames(sent: list[tuple[bytes, list[bytes]]], cuts: list[int]) -> None:
    data = b"".join(encoded(*frame) for frame in sent)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    decoder, received = FrameDecoder(), []
    for start, end in itertools.pairwise(edges):
        decoder.feed(data[start:end])
        received += take_all(decoder)
    assert received == sent
    decoder.close()


def test_one_byte_at_a_time() -> None:
    decoder, received = FrameDecoder(), []
    for byte in encoded(b"header", [b"", b"tensor"]) * 2:
        decoder.feed(bytes([byte]))
        received += take_all(decoder)
    assert received == [(b"header", [b"", b"tensor"])] * 2


@given(frames, st.data())
def test_a_truncated_frame_is_told_at_the_end(frame: tuple[bytes, list[bytes]], data: st.DataObject) -> None:
    whole = encoded(*frame)
    decoder = FrameDecoder()
    decoder.feed(whole[: data.draw(st.integers(1, len(whole) - 1))])
    assert take_all(decoder) == []
    with pytest.raises(ProtocolError, match="inside a frame"):
        decoder.close()


@given(st.binary(min_size=3, max_size=80).filter(lambda data: not data.startswith(b"SL\x01")))
def test_garbage_is_refused(data: bytes) -> None:
    decoder = FrameDecoder()
    decoder.feed(data)
    with pytest.raises(ProtocolError):
        decoder.next_frame()


@pytest.mark.parametrize(
    ("header", "count", "sizes"),
    [(MAX_HEADER + 1, 0, []), (0, MAX_SEGMENTS + 1, []), (0, 2, [MAX_FRAME - 10, 100])],
    ids=["header", "segments", "frame"],
)
def test_what_is_too_large_is_refused_when_announced(header: int, count: int, sizes: list[int]) -> None:
    decoder = FrameDecoder()
    decoder.feed(struct.pack(f"<2sBBIH{len(sizes)}I", b"SL", 1, 0, header, count, *sizes))
    with pytest.raises(ProtocolError, match="over the limit"):
        decoder.next_frame()


def test_segments_are_not_copied_when_sent() -> None:
    tensor = bytearray(b"tensor")
    buffers = encode_frame(b"header", [memoryview(tensor)])
    tensor[0:1] = b"T"
    assert bytes(buffers[-1]) == b"Tensor"
