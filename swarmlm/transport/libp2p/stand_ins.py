"""What libp2p's host offers and a swarm never uses stays unloaded: ACME certificates, mDNS, UPnP.

They bring requests, rich, zeroconf and more: 0.15 s and 14 MB in every process. While libp2p is imported, stand-ins
take their places: functions that import the real thing when they are called. Afterwards the real modules import.

Only for processes that are ours alone, called by the cli: another user of libp2p may want the classes themselves.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STAND_INS = {  # what libp2p.host.basic_host takes from each, to be called by its options only
    "libp2p.discovery.mdns.mdns": ("MDNSDiscovery", "create_mdns_discovery"),
    "libp2p.discovery.upnp.upnp": ("UpnpManager",),
    "libp2p.security.tls.autotls.acme": ("ACMEClient", "compute_b36_peer_id"),
    "libp2p.security.tls.autotls.broker": ("BrokerClient",),
}


def import_libp2p() -> None:
    """Import libp2p without what stands in `STAND_INS`; as it comes if something has imported it before."""
    if "libp2p" not in sys.modules:
        with _stand_ins():
            try:
                importlib.import_module("libp2p")
                return
            except ImportError:  # a release that takes more from these modules: the import below is the whole one
                for name in [name for name in sys.modules if name.partition(".")[0] == "libp2p"]:
                    del sys.modules[name]
        importlib.import_module("libp2p")


@contextmanager
def _stand_ins() -> Iterator[None]:
    placed = {}
    for module, names in STAND_INS.items():
        placed[module] = types.ModuleType(module)
        vars(placed[module]).update({name: _when_called(module, name) for name in names})
    sys.modules.update(placed)
    try:
        yield
    finally:
        for module, stand_in in placed.items():
            if sys.modules.get(module) is stand_in:
                del sys.modules[module]


def _when_called(module: str, name: str) -> Callable[..., Any]:
    def real(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return real
