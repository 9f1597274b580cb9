"""Keys and signed records: libp2p's own names, files that are never overwritten, forgeries that are always found."""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmlm.errors import ConfigError, ProtocolError
from swarmlm.protocol import HostRecord, SignedRecord
from swarmlm.transport.identity import Identity, verify
from swarmlm.transport.records import MAX_CLOCK_SKEW, newer, open_record, sign_record

ONE, TWO = Identity.from_seed(b"1" * 32), Identity.from_seed(b"2" * 32)
NOW = 1_000_000.0


def record(**changes: object) -> HostRecord:
    made = HostRecord(
        peer=ONE.peer_id,
        addresses=(),
        model="m",
        fingerprint="f",
        blocks=4,
        start=0,
        end=4,
        sequence=1,
        issued=NOW,
        lease=30.0,
    )
    return msgspec.structs.replace(made, **changes)


def test_peer_ids_are_libp2ps() -> None:
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    assert str(ID.from_pubkey(create_new_key_pair(ONE.seed).public_key)) == ONE.peer_id


def test_a_key_file_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "host.key"
    made = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load_or_create(path).peer_id == made.peer_id
    assert [file.name for file in path.parent.iterdir()] == ["host.key"]


def test_a_key_file_is_libp2ps_protobuf(tmp_path: Path) -> None:
    from libp2p.crypto.pb.crypto_pb2 import KeyType, PrivateKey

    path = tmp_path / "host.key"
    made = Identity.load_or_create(path)
    key = PrivateKey.FromString(path.read_bytes())
    assert key.key_type == KeyType.Ed25519
    assert key.data[:32] == made.seed


@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(68), b"\x08\x01\x12\x40" + bytes(64)])
def test_a_damaged_key_file_is_named_and_left(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "host.key"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"host\.key"):
        Identity.load_or_create(path)
    assert path.read_bytes() == content


def test_a_key_file_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="identity file"):
        Identity.load_or_create(tmp_path / "file" / "host.key")


@given(st.binary(max_size=40), st.binary(max_size=70), st.text(max_size=60))
def test_only_the_signer_signs(data: bytes, signature: bytes, peer: str) -> None:
    assert verify(ONE.peer_id, data, ONE.sign(data))
    assert not verify(TWO.peer_id, data, ONE.sign(data))
    assert not verify(ONE.peer_id, data + b"x", ONE.sign(data))
    assert not verify(ONE.peer_id, data, signature)
    assert not verify(peer, data, ONE.sign(data))


def test_a_record_opens_for_its_lease_and_a_little_skew() -> None:
    signed = sign_record(record(), ONE)
    assert open_record(signed, now=NOW + 29) == record()
    assert open_record(signed, now=NOW - MAX_CLOCK_SKEW + 1) == record()
    with pytest.raises(ProtocolError, match="future"):
        open_record(signed, now=NOW - MAX_CLOCK_SKEW - 1)
    with pytest.raises(ProtocolError, match="expired"):
        open_record(signed, now=NOW + 31 + MAX_CLOCK_SKEW)


def test_forged_records_do_not_open() -> None:
    signed = sign_record(record(), ONE)
    other = sign_record(record(sequence=2), ONE)
    forgeries = [
        SignedRecord(signed.body, other.signature),
        sign_record(record(), TWO),
        SignedRecord(signed.body, ONE.sign(signed.body)),
        SignedRecord(b"", b""),
        SignedRecord(b"x" * 9000, b""),
    ]
    for forged in forgeries:
        with pytest.raises(ProtocolError):
            open_record(forged, now=NOW)


def test_the_higher_sequence_is_newer() -> None:
    assert newer(record(sequence=2), record(sequence=5)).sequence == 5
