"""The libp2p transport and its Kademlia table: the only package that imports libp2p.

    async with open_libp2p(identity, listen=["/ip4/0.0.0.0/tcp/4001"]) as transport:
        async with open_kademlia(transport, server=True) as kademlia:
            await kademlia.bootstrap(seeds)

    stand_ins.py what libp2p imports and nobody here uses, left out by the commands
    sockets.py   TCP below libp2p: cancel-safe writes, buffered reads, bounded accepting
    yamux.py     the numbers of the yamux protocol
    stream.py    one stream: flow control, ends
    muxer.py     many streams over one secured connection
    network.py   the swarm: dialling, accepting, handshakes with deadlines
    host.py      `Transport` and `Stream` of transport.base on top of it
    walk.py      one Kademlia lookup: parallel, with a deadline for every question
    kademlia.py  `Discovery` of transport.discovery on top of that

The names below import libp2p (1-2 s) on first use, so importing this package is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarmlm.transport.libp2p.host import Libp2pTransport as Libp2pTransport
    from swarmlm.transport.libp2p.host import open_libp2p as open_libp2p
    from swarmlm.transport.libp2p.kademlia import Kademlia as Kademlia
    from swarmlm.transport.libp2p.kademlia import open_kademlia as open_kademlia

_HOME = {"Libp2pTransport": "host", "open_libp2p": "host", "Kademlia": "kademlia", "open_kademlia": "kademlia"}

__all__ = ["Kademlia", "Libp2pTransport", "open_kademlia", "open_libp2p"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
