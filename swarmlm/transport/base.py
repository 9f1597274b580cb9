"""What the rest of swarmlm needs of a network, and nothing more.

A `Transport` has an identity, dials peers and accepts streams; a `Stream` is an ordered, reliable, authenticated byte
pipe to one peer. Implementations: `transport.memory` (simulated, virtual time) and `transport.libp2p` (real).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from swarmlm.protocol import Address, PeerId

Handler = Callable[["Stream"], Awaitable[None]]


class Stream(Protocol):
    """One reader task and one writer task use a stream; cancelling either never damages other streams of the peer."""

    @property
    def peer(self) -> PeerId:
        """The authenticated identity at the other end."""

    async def send(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        """Write all buffers in order. Raises `ConnectionLost`; `Closed` after our own `aclose`."""

    async def receive(self) -> bytes | memoryview:
        """At least one byte; b"" when the peer has closed cleanly. Raises `ConnectionLost`; `Closed` after `aclose`."""

    async def aclose(self) -> None:
        """Close both directions at once. Idempotent; never raises, never blocks for long."""


class Transport(Protocol):
    """Opened by an async context manager of its module; leaving it closes every stream."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def addresses(self) -> Sequence[Address]:
        """Where others can dial us, each ending in /p2p/<our peer id>."""

    async def open_stream(self, peer: PeerId, addresses: Sequence[Address], *, timeout: float) -> Stream:
        """Dial if needed and open a stream within `timeout` seconds. Raises `Unreachable`."""

    def set_handler(self, handler: Handler) -> None:
        """`handler(stream)` runs in a task of its own per accepted stream; the stream is closed when it returns.

        An exception of the handler is logged and ends that stream only.
        """


def own_address(address: str, peer: PeerId) -> Address:
    """`address` ending in /p2p/`peer`. Raises `ConfigError` if it names another peer or is no multiaddr at all."""
    from swarmlm.errors import ConfigError

    if not address.startswith("/"):
        raise ConfigError(f"{address!r} is no address such as /ip4/203.0.113.5/tcp/4001")
    head, mark, named = address.partition("/p2p/")
    if mark and named != peer:
        raise ConfigError(f"{address!r} names another peer than this node, {peer}")
    return Address(f"{head}/p2p/{peer}")


def peer_of(address: Address) -> PeerId:
    """The peer id that ends a multiaddr. Raises `ConfigError` if there is none."""
    from swarmlm.errors import ConfigError

    head, mark, peer = address.rpartition("/p2p/")
    if not head or not mark or not peer or "/" in peer:
        raise ConfigError(f"{address!r} is not a full peer address (it must end in /p2p/<peer id>)")
    return PeerId(peer)
