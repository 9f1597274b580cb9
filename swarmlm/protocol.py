"""Every message that crosses the wire, and the codec that validates it: **the trust boundary**.

Bytes from a peer become typed structs here or raise `ProtocolError`; nothing further in handles unvalidated input.
The header is standard msgpack; tensor bytes travel as segments beside it (`Blob`), never inside it.
Limits are named MAX_* with their unit and reason. Structs evolve by appending fields with defaults.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NewType

import msgpack
import msgspec

from swarmlm.actors.core.message import Blob, Body, Call, Cancel, Cast, Envelope, Failed, Message, Ok, Ping, Pong, Reply
from swarmlm.config import Codec as Codec
from swarmlm.config import Quant
from swarmlm.errors import ProtocolError

PROTOCOL = "/swarmlm/1"  # the libp2p protocol id of a link; the 1 is bumped when old peers could misread us

MAX_BLOCKS = 4096  # blocks: the deepest published decoders have under 200
MAX_TOKENS = 2**24  # tokens: 16 M positions, above any context length in use
MAX_BATCH = 4096  # rows of one session's batch
MAX_DIMS = 4  # dimensions: [batch, tokens, hidden] and one spare
MAX_TENSOR = 2**30  # bytes: 1 GiB; a 16k-token prefill chunk of a 16k-wide float32 model
MAX_NAME = 256  # characters: hub repository names end at 96 + 96
MAX_TEXT = 4096  # characters of an error text
MAX_ADDRESSES = 32  # addresses of one peer
MAX_RECORD = 8192  # bytes of one signed record; Kademlia values should stay small
MAX_LISTING = 20_000  # records in one directory listing

PeerId = NewType("PeerId", str)  # base58 text of a libp2p peer id; holds the public key, so it verifies signatures
Address = NewType("Address", str)  # multiaddr text: "/ip4/127.0.0.1/tcp/4001/p2p/12D3Koo..."

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Block = Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOCKS)]
Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
Row = Annotated[int, msgspec.Meta(ge=0, lt=MAX_BATCH)]
Batch = Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH)]
SessionId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]  # random: knowing it is the right to step it
Milliseconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
DType = Literal["float32", "float16", "bfloat16", "int64", "int8", "uint8", "bool"]
State = Literal["joining", "online", "draining"]

ITEM_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int8": 1, "uint8": 1, "bool": 1}


class Tensor(Body, frozen=True):
    """A dense row-major little-endian tensor. Its bytes match dtype and shape, or it cannot be built."""

    dtype: DType
    shape: Annotated[tuple[Tokens, ...], msgspec.Meta(max_length=MAX_DIMS)]
    data: Blob

    def __post_init__(self) -> None:
        need = math.prod(self.shape) * ITEM_BYTES[self.dtype]
        if need > MAX_TENSOR:
            raise ValueError(f"a tensor of {need} bytes is over the limit of {MAX_TENSOR}")
        if need != len(self.data):
            raise ValueError(f"a {self.dtype} tensor of shape {self.shape} needs {need} bytes, not {len(self.data)}")


# ---- roles: who may be told what -------------------------------------------------------------------------------


class HostRole:
    """swarmlm.actors.host.BlockHost: sessions, admission, drain."""


class BatcherRole:
    """swarmlm.actors.batcher.Batcher: steps, straight from the connection."""


class DirectoryRole:
    """swarmlm.actors.directory.Directory: the swarm snapshot."""


# ---- records: who serves what ----------------------------------------------------------------------------------


class HostRecord(Body, tag="host1", frozen=True):
    """One host's own words about itself. `sequence` rises with every change; `issued` is the signer's unix time."""

    peer: Name
    addresses: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_ADDRESSES)]
    model: Name
    fingerprint: Name  # of the model's config: spans of different models are never chained
    blocks: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCKS)]  # in the whole model
    start: Block
    end: Block
    sequence: Count
    issued: float
    lease: Annotated[float, msgspec.Meta(gt=0.0, le=86400.0)]  # seconds
    state: State = "online"
    dtype: DType = "float32"
    block_ms: Milliseconds = 1.0  # measured: one token through one block, batch 1
    kv_free: Count = 0  # bytes
    kv_total: Count = 0  # bytes
    kv_token_bytes: Count = 0  # bytes of KV per token and block
    queue: Count = 0  # steps waiting when the record was made
    sessions: Count = 0
    version: str = ""
    quant: Quant = "none"

    def __post_init__(self) -> None:
        if not self.start < self.end <= self.blocks:
            raise ValueError(f"blocks {self.start}:{self.end} are no span of {self.blocks}")


class SignedRecord(Body, frozen=True):
    """`body` is a packed HostRecord; the signature is checked against the key inside the record's peer id."""

    body: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD)]
    signature: Annotated[bytes, msgspec.Meta(max_length=128)]


class LeasedRecord(Body, frozen=True):
    record: SignedRecord
    seconds_left: Annotated[float, msgspec.Meta(ge=0.0, le=86400.0)]


class Listing(Body, tag="listing", frozen=True):
    records: Annotated[tuple[LeasedRecord, ...], msgspec.Meta(max_length=MAX_LISTING)]


class GetDirectory(Message[DirectoryRole, Listing], tag="get_directory", frozen=True):
    """The whole directory of one model in one round trip."""

    model: Name


class Publish(Message[DirectoryRole, Ok], tag="publish", frozen=True):
    """A host tells a neighbour about itself; `withdraw` takes the record back (leaving)."""

    record: SignedRecord
    withdraw: bool = False


# ---- sessions --------------------------------------------------------------------------------------------------


class HostStatus(Body, tag="host_status", frozen=True):
    """A host's load at this moment; times are the smoothed measurements of its batcher."""

    peer: Name
    model: Name
    start: Block
    end: Block
    state: State
    kv_free: Count
    kv_total: Count
    kv_token_bytes: Count
    queue: Count
    sessions: Count
    block_ms: Milliseconds


class GetStatus(Message[HostRole, HostStatus], tag="get_status", frozen=True):
    pass


class SessionOpened(Body, tag="session_opened", frozen=True):
    kv_reserved: Count  # bytes
    idle_seconds: float  # the session expires after that long without a step
    codecs: Annotated[tuple[Codec, ...], msgspec.Meta(max_length=8)] = ("none",)  # that its steps may use


class OpenSession(Message[HostRole, SessionOpened], tag="open_session", frozen=True):
    """Reserve KV for `max_length` tokens x `batch` rows over [start, end), or be refused at once (`PoolFull`).

    The same id again with a higher epoch empties the session and fences frames of the lower one. `next_peer` is the
    host of the blocks after `end`, which this one should be ready to push to.
    """

    session: SessionId
    model: Name
    fingerprint: Name
    start: Block
    end: Block
    max_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
    batch: Batch = 1
    epoch: Count = 0
    next_peer: Annotated[str, msgspec.Meta(max_length=MAX_NAME)] = ""


class CloseSession(Message[HostRole, Ok], tag="close_session", frozen=True):
    session: SessionId


class Hop(Body, frozen=True):
    """Where a step goes on: the session there, and its epoch."""

    peer: Name
    session: SessionId
    epoch: Count = 0


class StepDone(Body, tag="step_done", frozen=True):
    """`hidden` is the span's output, [batch, tokens, hidden]; the host now holds `position` tokens."""

    hidden: Tensor
    position: Tokens
    queue_ms: Milliseconds = 0.0
    compute_ms: Milliseconds = 0.0
    rows: Batch = 1  # rows of the device batch this step rode in
    pushed: bool = False  # the output is on its way to the next hop, too


class Step(Message[BatcherRole, StepDone], tag="step", frozen=True):
    """Run `hidden` through the session's span, in any of its uses.

    `position` is how many tokens the session holds before it: lower than held rolls back, equal appends, higher is
    refused. `padding` is the number of left-pad tokens of each row (empty: none). `hypo_ids` reorders the rows of the
    cache first (beam search). `prompts` (added per block, for deep prompt tuning) and `adapter` are reserved: hosts
    refuse them today. `codec` is how `hidden` is
    compressed, and how the answer and what is pushed shall be.

    A step may go from host to host: the client tells every host of it, only the first with `hidden`, each but the last
    with the next in `next_hops`. A host pushes its output there (`Push`) and answers the client, too. `ticket` is the
    number that a session's step has at all its hosts; one that names another as `after` waits for that to be done.
    """

    session: SessionId
    epoch: Count
    position: Tokens
    hidden: Tensor | None
    padding: Annotated[tuple[Tokens, ...], msgspec.Meta(max_length=MAX_BATCH)] = ()
    hypo_ids: Annotated[tuple[Row, ...], msgspec.Meta(max_length=MAX_BATCH)] = ()
    prompts: Tensor | None = None
    adapter: Annotated[str, msgspec.Meta(max_length=MAX_NAME)] = ""
    codec: Codec = "none"
    next_hops: Annotated[tuple[Hop, ...], msgspec.Meta(max_length=MAX_BLOCKS)] = ()
    ticket: Count = 0
    after: Count = 0


class Push(Message[BatcherRole, Ok], tag="push", frozen=True):
    """What `Step` number `ticket` is waiting for, from the host that computed it or from the client.

    It may come before the step; what comes a second time is ignored.
    """

    session: SessionId
    epoch: Count
    ticket: Count
    hidden: Tensor


# ---- training --------------------------------------------------------------------------------------------------

PassKey = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]  # random: knowing it is the right to use it


class ForwardDone(Body, tag="forward_done", frozen=True):
    """`hidden` is the output of blocks [start, end), [rows, tokens, hidden]; `kept`: a `Backward` may name the key."""

    hidden: Tensor
    kept: bool = False
    compute_ms: Milliseconds = 0.0


class Forward(Message[BatcherRole, ForwardDone], tag="forward", frozen=True):
    """Run whole sequences `hidden` [rows, tokens, hidden] through blocks [start, end), without a session or a cache.

    `padding` is the number of left-pad tokens of each row (empty: none). `prompts` are added per block. `keep` asks the
    host to keep what the gradient needs under that key, if it has memory.
    """

    model: Name
    fingerprint: Name
    start: Block
    end: Block
    hidden: Tensor
    padding: Annotated[tuple[Tokens, ...], msgspec.Meta(max_length=MAX_BATCH)] = ()
    prompts: Tensor | None = None
    adapter: Annotated[str, msgspec.Meta(max_length=MAX_NAME)] = ""
    codec: Codec = "none"
    keep: PassKey | None = None


class BackwardDone(Body, tag="backward_done", frozen=True):
    """`grad` is the gradient with respect to the input of blocks [start, end), in its shape."""

    grad: Tensor
    compute_ms: Milliseconds = 0.0


class Backward(Message[BatcherRole, BackwardDone], tag="backward", frozen=True):
    """The gradient at the input `hidden` of blocks [start, end), given `grad`, that at their output. Weights are fixed.

    `hidden` may be left out when a `Forward` was kept under the key `keep`: `UnknownSession` if it is gone, and the
    message comes again with `hidden`. A kept forward serves one `Backward`.
    """

    model: Name
    fingerprint: Name
    start: Block
    end: Block
    grad: Tensor
    hidden: Tensor | None = None
    padding: Annotated[tuple[Tokens, ...], msgspec.Meta(max_length=MAX_BATCH)] = ()
    prompts: Tensor | None = None
    adapter: Annotated[str, msgspec.Meta(max_length=MAX_NAME)] = ""
    codec: Codec = "none"
    keep: PassKey | None = None


WireMessage = GetDirectory | Publish | GetStatus | OpenSession | CloseSession | Step | Push | Forward | Backward
WireReply = Ok | Listing | HostStatus | SessionOpened | StepDone | ForwardDone | BackwardDone


# ---- codec -----------------------------------------------------------------------------------------------------


class _Call(Call, tag="call", frozen=True):
    body: WireMessage


class _Cast(Cast, tag="cast", frozen=True):
    body: WireMessage


class _Reply(Reply, tag="reply", frozen=True):
    body: WireReply


_Envelope = _Call | _Cast | _Reply | Failed | Cancel | Ping | Pong


def _pack(struct: Body) -> tuple[bytes, list[memoryview]]:
    segments: list[memoryview] = []

    def set_aside(value: Any) -> int:
        if not isinstance(value, Blob):
            raise TypeError(f"{type(value).__name__} cannot travel in a message")
        segments.append(value.view)
        return len(segments) - 1

    plain = msgspec.to_builtins(struct, enc_hook=set_aside, builtin_types=(bytes,))
    header: bytes = msgpack.packb(plain)
    return header, segments


def _unpack(kind: Any, header: bytes | memoryview, segments: list[memoryview]) -> Any:
    taken: set[int] = set()

    def restore(wanted: type, value: Any) -> Blob:
        if wanted is not Blob or type(value) is not int or not 0 <= value < len(segments) or value in taken:
            raise ValueError("a tensor names no segment of its frame, or one already used")
        taken.add(value)
        return Blob(segments[value])

    try:
        plain = msgpack.unpackb(header, strict_map_key=True)
        value = msgspec.convert(plain, kind, dec_hook=restore)
    except Exception as error:  # msgpack raises a dozen kinds; every one means "not a message of ours"
        raise ProtocolError(f"not a valid message: {error}") from error
    if len(taken) != len(segments):
        raise ProtocolError("a frame carries segments that no tensor names")
    return value


def encode(envelope: Envelope) -> tuple[bytes, list[memoryview]]:
    """(header, segments) of one envelope. The segments are views of the tensors' memory, not copies."""
    return _pack(envelope)


def decode(header: bytes | memoryview, segments: list[memoryview]) -> Envelope:
    """The validated envelope of one frame; tensors are views of `segments`. Raises `ProtocolError`."""
    envelope: Envelope = _unpack(_Envelope, header, segments)
    return envelope


def pack_record(record: HostRecord) -> bytes:
    return _pack(record)[0]


def unpack_record(body: bytes) -> HostRecord:
    """Raises `ProtocolError`."""
    if len(body) > MAX_RECORD:
        raise ProtocolError(f"a record of {len(body)} bytes is over the limit of {MAX_RECORD}")
    record: HostRecord = _unpack(HostRecord, body, [])
    return record


def pack_signed(signed: SignedRecord) -> bytes:
    """A signed record as one value, for a distributed table."""
    return _pack(signed)[0]


def unpack_signed(value: bytes) -> SignedRecord:
    """Raises `ProtocolError`."""
    if len(value) > MAX_RECORD + 256:
        raise ProtocolError(f"a signed record of {len(value)} bytes is over the limit of {MAX_RECORD}")
    signed: SignedRecord = _unpack(SignedRecord, value, [])
    return signed
