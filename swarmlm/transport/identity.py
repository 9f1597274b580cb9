"""Who a peer is: an ed25519 key, named by the libp2p peer id that contains its public half."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from swarmlm.errors import ConfigError
from swarmlm.protocol import PeerId

_ID_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])  # identity multihash of a protobuf ed25519 public key
_FILE_PREFIX = bytes([0x08, 0x01, 0x12, 0x40])  # protobuf of an ed25519 private key: 32 bytes seed, 32 bytes public


class Identity:
    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self._public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    @classmethod
    def generate(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> Identity:
        """The key in `path` (libp2p's own format), made with mode 0600 if there is none. Raises `ConfigError`."""
        file = Path(path)
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return cls._create(file)
        except OSError as error:
            raise ConfigError(f"cannot read the identity file {path}: {error.strerror}") from None
        identity = cls.from_seed(data[4:36]) if len(data) == 68 and data.startswith(_FILE_PREFIX) else None
        if identity is None or identity._public != data[36:]:
            raise ConfigError(f"{path} is no identity file (a damaged or foreign key); it was left as it is")
        return identity

    @classmethod
    def _create(cls, file: Path) -> Identity:
        identity = cls.generate()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
            with os.fdopen(handle, "wb") as out:
                out.write(_FILE_PREFIX + identity.seed + identity._public)
            os.replace(temporary, file)
        except OSError as error:
            raise ConfigError(f"cannot write the identity file {file}: {error.strerror}") from None
        return identity

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes."""
        return self._key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())

    @property
    def peer_id(self) -> PeerId:
        return PeerId(base58.b58encode(_ID_PREFIX + self._public).decode())

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)


def verify(peer_id: str, data: bytes, signature: bytes) -> bool:
    """Whether `peer_id` signed `data`. False for whatever is no ed25519 peer id; never raises."""
    try:
        raw = base58.b58decode(peer_id)
        if len(raw) != 38 or not raw.startswith(_ID_PREFIX):
            return False
        Ed25519PublicKey.from_public_bytes(raw[len(_ID_PREFIX) :]).verify(signature, data)
    except (ValueError, InvalidSignature):
        return False
    return True
