"""The trust boundary: every message survives the trip, and nothing else gets through."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmlm.actors.core.message import Blob, Call, Cancel, Cast, Failed, Ok, Ping, Pong, Reply
from swarmlm.errors import _BY_CODE, PoolFull, ProtocolError, RemoteFailure, SwarmError, from_wire, to_wire
from swarmlm.protocol import (
    ITEM_BYTES,
    MAX_RECORD,
    Backward,
    BackwardDone,
    CloseSession,
    Forward,
    ForwardDone,
    GetDirectory,
    GetStatus,
    Hop,
    HostRecord,
    HostStatus,
    LeasedRecord,
    Listing,
    OpenSession,
    Publish,
    SessionOpened,
    SignedRecord,
    Step,
    StepDone,
    Tensor,
    decode,
    encode,
    pack_record,
    pack_signed,
    unpack_record,
    unpack_signed,
)

names = st.text(min_size=1, max_size=20)
counts = st.integers(0, 2**40)
blocks = st.integers(0, 100)
sessions = st.binary(min_size=16, max_size=16)
floats = st.floats(0, 1000, allow_nan=False)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size = ITEM_BYTES[dtype]
    for length in shape:
        size *= length
    return Tensor(dtype, shape, Blob(draw(st.binary(min_size=size, max_size=size))))  # type: ignore[arg-type]


@st.composite
def records(draw: st.DrawFn) -> HostRecord:
    start = draw(st.integers(0, 20))
    end = draw(st.integers(start + 1, 30))
    return HostRecord(
        peer=draw(names),
        addresses=tuple(draw(st.lists(names, max_size=3))),
        model=draw(names),
        fingerprint=draw(names),
        blocks=draw(st.integers(end, 100)),
        start=start,
        end=end,
        sequence=draw(counts),
        issued=draw(floats),
        lease=draw(st.floats(1, 100)),
        block_ms=draw(floats),
    )


signed = st.builds(SignedRecord, st.binary(max_size=50), st.binary(max_size=64))
terms = (names, names, blocks, blocks)
extras = (
    st.lists(blocks, max_size=3).map(tuple),
    st.none() | tensors(),
    st.text(max_size=5),
    st.sampled_from(["none", "float16", "int8"]),
    st.none() | sessions,
)
messages = st.one_of(
    st.builds(GetDirectory, names),
    st.builds(Publish, signed, st.booleans()),
    st.builds(GetStatus),
    st.builds(OpenSession, sessions, names, names, blocks, blocks, st.integers(1, 99), st.integers(1, 9), counts),
    st.builds(CloseSession, sessions),
    st.builds(
        Step,
        sessions,
        counts,
        blocks,
        tensors(),
        st.lists(blocks, max_size=3).map(tuple),
        st.lists(blocks, max_size=3).map(tuple),
        st.none() | tensors(),
        st.text(max_size=5),
        st.sampled_from(["none", "float16", "int8"]),
        st.lists(st.builds(Hop, names, sessions), max_size=2).map(tuple),
    ),
    st.builds(Forward, *terms, tensors(), *extras),
    st.builds(Backward, *terms, tensors(), st.none() | tensors(), *extras),
)
replies = st.one_of(
    st.builds(Ok),
    st.builds(Listing, st.lists(st.builds(LeasedRecord, signed, floats), max_size=3).map(tuple)),
    st.builds(
        HostStatus, names, names, blocks, blocks, st.just("online"), counts, counts, counts, counts, counts, floats
    ),
    st.builds(SessionOpened, counts, floats),
    st.builds(StepDone, tensors(), blocks, floats, floats, st.integers(1, 9)),
    st.builds(ForwardDone, tensors(), st.booleans(), floats),
    st.builds(BackwardDone, tensors(), floats),
)
envelopes = st.one_of(
    st.builds(Call, counts, floats, messages),
    st.builds(Cast, messages),
    st.builds(Reply, counts, replies),
    st.builds(Failed, counts, names, st.text(max_size=30), st.dictionaries(names, counts | names, max_size=3)),
    st.builds(Cancel, counts),
    st.builds(Ping, counts),
    st.builds(Pong, counts),
)


def plain(value: Any) -> Any:
    """Field by field, whatever subclass the codec made."""
    if isinstance(value, Blob):
        return bytes(value.view)
    if isinstance(value, msgspec.Struct):
        return [type(value).__name__.lstrip("_"), *(plain(getattr(value, name)) for name in value.__struct_fields__)]
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


@given(envelopes)
def test_every_message_survives_the_trip(envelope: Any) -> None:
    header, segments = encode(envelope)
    assert plain(decode(header, segments)) == plain(envelope)


@given(envelopes)
def test_the_wire_is_standard_msgpack_and_tensors_are_outside_it(envelope: Any) -> None:
    header, segments = encode(envelope)
    assert isinstance(msgpack.unpackb(header), list)
    for segment in segments:
        assert len(segment) < 8 or bytes(segment) not in header or not any(segment)


@given(st.binary(max_size=200), st.lists(st.binary(max_size=20), max_size=2))
def test_random_bytes_are_a_protocol_error_or_a_message(header: bytes, segments: list[bytes]) -> None:
    try:
        decode(header, [memoryview(segment) for segment in segments])
    except ProtocolError:
        return
    assert msgpack.unpackb(header)[0] in ("call", "cast", "reply", "failed", "cancel", "ping", "pong")


@given(envelopes, st.data())
def test_damaged_headers_raise_nothing_but_protocol_errors(envelope: Any, data: st.DataObject) -> None:
    header, segments = encode(envelope)
    damaged = bytearray(header)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        survived = decode(bytes(damaged), segments)
    except ProtocolError:
        return
    assert isinstance(survived, Call | Cast | Reply | Failed | Cancel | Ping | Pong)


def step(tensor: Tensor) -> Step:
    return Step(b"s" * 16, 0, 0, tensor)


def test_segments_must_match_their_tensors() -> None:
    header, segments = encode(Call(1, 1.0, step(Tensor("float32", (1, 2), Blob(bytes(8))))))
    for wrong in ([], [*segments, memoryview(b"more")], [memoryview(b"short")]):
        with pytest.raises(ProtocolError):
            decode(header, wrong)


def test_a_tensor_that_lies_about_its_size_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="needs 8 bytes, not 4"):
        Tensor("float32", (1, 2), Blob(bytes(4)))
    with pytest.raises(ValueError, match="over the limit"):
        Tensor("float32", (2**20, 2**20), Blob(b""))


def test_only_plain_data_travels() -> None:
    with pytest.raises(TypeError, match="cannot travel"):
        encode(Cast(object()))


@given(records())
def test_records_survive_and_oversized_ones_do_not(record: HostRecord) -> None:
    assert unpack_record(pack_record(record)) == record
    kept = SignedRecord(pack_record(record), b"s" * 64)
    assert unpack_signed(pack_signed(kept)) == kept
    with pytest.raises(ProtocolError, match="over the limit"):
        unpack_record(b"x" * (MAX_RECORD + 1))
    with pytest.raises(ProtocolError, match="over the limit"):
        unpack_signed(b"x" * (MAX_RECORD + 1000))


def test_errors_cross_the_wire_with_their_numbers() -> None:
    error = PoolFull("too little", needed=10, free=3)
    code, text, details = to_wire(error)
    back = from_wire(code, text, details)
    assert type(back) is PoolFull
    assert (str(back), back.details) == ("too little", {"needed": 10, "free": 3})


def test_every_error_has_a_code_of_its_own_and_a_stranger_is_a_remote_failure() -> None:
    def tree(kind: type[SwarmError]) -> list[type[SwarmError]]:
        return [kind, *(below for child in kind.__subclasses__() for below in tree(child))]

    kinds = [kind for kind in tree(SwarmError) if kind.__module__ == "swarmlm.errors"]
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert all(_BY_CODE[kind.code] is kind for kind in kinds)
    assert type(from_wire("from_the_future", "x", {})) is RemoteFailure
    assert to_wire(ValueError("secret")) == ("remote_failure", "internal error (ValueError)", {})
