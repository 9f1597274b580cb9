"""The error tree. Every error swarmlm raises on purpose derives from `SwarmError`.

    SwarmError
    |-- UsageError                you asked for something that cannot be: change the request
    |   |-- BadSpan               --blocks that are no span of this model
    |   |-- ModelNotFound         no such directory, file, package or hub repository
    |   |-- ModelUnsupported      a family or a file that swarmlm cannot serve exactly
    |   |-- CheckpointCorrupt     a shard or index that does not hold what it says
    |   |-- ContextTooLong        more tokens than the model or the session has room for
    |   `-- ConfigError           a flag, size or address that does not parse, a port in use
    |-- Refused                   a host answered "no"; the session and the host are fine
    |   |-- Busy                  its mailbox is full: safe to retry after a moment
    |   |-- PoolFull              not enough KV memory: says bytes needed and free
    |   |-- UnknownSession        expired, closed or never opened there: open it again, replay
    |   |-- StaleEpoch            a frame from before a failover: never retry it
    |   |-- BadStep               a step that contradicts the session (position, shape, dtype)
    |   `-- WrongModel            the host serves other blocks or another model
    |-- Unavailable               the world broke it: another host, or the same one later, may do
    |   |-- Unreachable           a peer could not be dialled
    |   |-- ConnectionLost        a peer went away in the middle
    |   |-- DeadlineExceeded      no answer in time; the work was cancelled
    |   `-- NoRoute               the hosts found do not cover the model: names the blocks missing
    |-- ActorCrashed              an actor failed on this message; it may have been restarted
    |-- Closed                    you closed it (actor, session, node) before using it
    |-- ProtocolError             bytes that are no valid frame or message: the link is dropped
    `-- RemoteFailure             the other side hit a bug while answering; see its log

Retrying is safe for `Unavailable` and `Busy`: steps are idempotent by position. `UsageError` and the rest of `Refused`
will be answered the same way again. Errors that cross the wire carry their `code`, their text and their `details`.
"""

from __future__ import annotations

from typing import ClassVar

Detail = int | str


class SwarmError(Exception):
    """Root of the tree. `code` names the class on the wire, `details` are its numbers and names."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str = "", **details: Detail) -> None:
        super().__init__(message or self.__class__.__name__)
        self.details = details

    def __getattr__(self, name: str) -> Detail:
        details = self.__dict__.get("details", {})
        if name in details:
            value: Detail = details[name]
            return value
        raise AttributeError(f"{type(self).__name__} has no attribute or detail {name!r}")


class UsageError(SwarmError):
    code = "usage"


class BadSpan(UsageError):
    code = "bad_span"


class ModelNotFound(UsageError):
    code = "model_not_found"


class ModelUnsupported(UsageError):
    code = "model_unsupported"


class CheckpointCorrupt(UsageError):
    code = "checkpoint_corrupt"


class ContextTooLong(UsageError):
    code = "context_too_long"


class ConfigError(UsageError):
    code = "config"


class Refused(SwarmError):
    code = "refused"


class Busy(Refused):
    code = "busy"


class PoolFull(Refused):
    """`needed` and `free` are bytes."""

    code = "pool_full"


class UnknownSession(Refused):
    code = "unknown_session"


class StaleEpoch(Refused):
    code = "stale_epoch"


class BadStep(Refused):
    code = "bad_step"


class WrongModel(Refused):
    code = "wrong_model"


class Unavailable(SwarmError):
    code = "unavailable"


class Unreachable(Unavailable):
    code = "unreachable"


class ConnectionLost(Unavailable):
    code = "connection_lost"


class DeadlineExceeded(Unavailable):
    code = "deadline"


class NoRoute(Unavailable):
    code = "no_route"


class ActorCrashed(SwarmError):
    code = "actor_crashed"


class Closed(SwarmError):
    code = "closed"


class ProtocolError(SwarmError):
    code = "protocol"


class RemoteFailure(SwarmError):
    code = "remote_failure"


def _tree(root: type[SwarmError]) -> dict[str, type[SwarmError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


_BY_CODE = _tree(SwarmError)


def to_wire(error: BaseException) -> tuple[str, str, dict[str, Detail]]:
    """(code, text, details) of an error for the other side. A bug of ours keeps its traceback at home."""
    if isinstance(error, SwarmError):
        return error.code, str(error), dict(error.details)
    return RemoteFailure.code, f"internal error ({type(error).__name__})", {}


def from_wire(code: str, text: str, details: dict[str, Detail]) -> SwarmError:
    """The error a peer reported. An unknown code (a newer peer) becomes `RemoteFailure`, never a lookup by name."""
    error = _BY_CODE.get(code, RemoteFailure)(text)
    error.details.update(details)
    return error
