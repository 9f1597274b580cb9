"""What actors say to each other, in process and over the wire alike.

A message type names its receiver and its reply, so a type checker rejects a message sent to the wrong actor:

    class Ask(Message[Oracle, Answer], tag="ask", frozen=True):
        question: str

    answer = await oracle.call(Ask("why?"), deadline=5.0)      # oracle: Ref[Oracle]; answer: Answer

Bodies are frozen msgspec structs written as arrays. They evolve by appending fields with defaults, and hold plain data
only: never a `Ref`, never a class name. `Blob` is the one exception to "plain": bytes that a codec keeps out of the
header, so that a tensor is never copied into msgpack.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar

import msgspec

from swarmlm.errors import Detail

A_contra = TypeVar("A_contra", contravariant=True)  # the receiver, a marker class such as `Oracle`
R_co = TypeVar("R_co", covariant=True)  # what it answers

CallId = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=86400.0)]  # a deadline; a day is longer than any call lives


class Blob:
    """Raw bytes outside the header: a segment of the frame over the wire, the sender's own memory in process."""

    __slots__ = ("view",)

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        self.view = view if view.format == "B" and view.ndim == 1 else view.cast("B")

    def __len__(self) -> int:
        return self.view.nbytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blob) and self.view == other.view

    def __hash__(self) -> int:
        return hash(bytes(self.view))


class Body(msgspec.Struct, frozen=True, array_like=True):
    """Anything that may travel: messages, replies, and the structs inside them."""


class Message(Body, Generic[A_contra, R_co], frozen=True):
    """Something an actor of role A is told or asked; `call` returns R. Subclasses give `tag=` and `frozen=True`."""


class Ok(Body, tag="ok", frozen=True):
    """The reply of a message that has nothing to say but "done"."""


# Envelopes: what a link carries. `body` is decoded against a closed union by the link, never looked up by name.


class Call(Body, tag="call", frozen=True):
    id: CallId
    seconds_left: Seconds
    body: Any


class Cast(Body, tag="cast", frozen=True):
    body: Any


class Reply(Body, tag="reply", frozen=True):
    id: CallId
    body: Any


class Failed(Body, tag="failed", frozen=True):
    id: CallId
    code: str
    text: str
    details: dict[str, Detail] = {}


class Cancel(Body, tag="cancel", frozen=True):
    """The caller went away: drop the queued call or cancel the running one."""

    id: CallId


class Ping(Body, tag="ping", frozen=True):
    """A heartbeat, answered by the reader itself so that a busy actor still counts as alive."""

    number: int


class Pong(Body, tag="pong", frozen=True):
    number: int


Envelope = Call | Cast | Reply | Failed | Cancel | Ping | Pong
