"""How a node hears of hosts it was never told about. The libp2p kinds (Kademlia, mDNS) live in `transport.libp2p`."""

from __future__ import annotations

from typing import Protocol

from swarmlm.protocol import SignedRecord


class Discovery(Protocol):
    """A place where hosts leave their signed record under their model's name. What it returns is unverified."""

    async def publish(self, model: str, record: SignedRecord) -> None:
        """Leave or replace our record. Best effort: raises `Unavailable` if nobody stored it."""

    async def find(self, model: str) -> list[SignedRecord]:
        """Records left under `model`: possibly stale, forged or none. The directory verifies them."""


class NoDiscovery:
    """For swarms whose members all know a seed peer: the directory's own gossip finds the rest."""

    async def publish(self, model: str, record: SignedRecord) -> None:
        return None

    async def find(self, model: str) -> list[SignedRecord]:
        return []
