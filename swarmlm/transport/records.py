"""Signing and opening host records. What `open_record` returns was said by the peer it names, and not long ago."""

from __future__ import annotations

from swarmlm.errors import ProtocolError
from swarmlm.protocol import HostRecord, SignedRecord, pack_record, unpack_record
from swarmlm.transport.identity import Identity, verify

MAX_CLOCK_SKEW = 60.0  # seconds: home machines without time service drift by less
_DOMAIN = b"swarmlm record 1\0"  # so that no other signature of the same key can pass for a record's


def sign_record(record: HostRecord, identity: Identity) -> SignedRecord:
    body = pack_record(record)
    return SignedRecord(body, identity.sign(_DOMAIN + body))


def open_record(signed: SignedRecord, *, now: float) -> HostRecord:
    """The record inside, verified. `now` is unix time. Raises `ProtocolError` with the reason."""
    record = unpack_record(signed.body)
    if not verify(record.peer, _DOMAIN + signed.body, signed.signature):
        raise ProtocolError(f"a record of {record.peer} has a bad signature")
    if record.issued > now + MAX_CLOCK_SKEW:
        raise ProtocolError(f"a record of {record.peer} comes from the future")
    if record.issued + record.lease + MAX_CLOCK_SKEW < now:
        raise ProtocolError(f"a record of {record.peer} has expired")
    return record


def newer(one: HostRecord, other: HostRecord) -> HostRecord:
    """The one its peer said last."""
    return one if one.sequence >= other.sequence else other
