"""swarmlm: pool small machines to run a language model that none of them could hold.

    4   cli/                                    parse, call the node, render
    3   node, hosting, session, view, bridge,   composition: wires the layers below
        portal, auto, aio, local_swarm, bench/
    2   actors/                                 host, batcher, directory, scout, announcer
    1b  models/  routing/                       any decoder as spans; plans, sessions, failover
    1a  kernels/  transport/                    KV pool, tensors; frames, libp2p, the simulated network
    0   actors/core/  protocol  config  errors  messages, refs, supervision: no torch, no libp2p

Imports go downward only. Names below are loaded when first used: `import swarmlm` imports neither torch nor libp2p.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from swarmlm.errors import (
    ActorCrashed,
    BadSpan,
    BadStep,
    Busy,
    CheckpointCorrupt,
    Closed,
    ConfigError,
    ConnectionLost,
    ContextTooLong,
    DeadlineExceeded,
    ModelNotFound,
    ModelUnsupported,
    NoRoute,
    PoolFull,
    ProtocolError,
    Refused,
    RemoteFailure,
    StaleEpoch,
    SwarmError,
    Unavailable,
    UnknownSession,
    Unreachable,
    UsageError,
    WrongModel,
)

if TYPE_CHECKING:
    from swarmlm import aio
    from swarmlm.auto import AutoDistributedModelForCausalLM
    from swarmlm.config import ServeConfig
    from swarmlm.node import Node, open_node
    from swarmlm.portal import connect
    from swarmlm.routing.session import SessionEvent
    from swarmlm.session import NodeSession as Session

_LAZY = {
    "AutoDistributedModelForCausalLM": "swarmlm.auto",
    "Node": "swarmlm.node",
    "ServeConfig": "swarmlm.config",
    "Session": "swarmlm.session:NodeSession",
    "SessionEvent": "swarmlm.routing.session",
    "connect": "swarmlm.portal",
    "open_node": "swarmlm.node",
}

__all__ = [
    "ActorCrashed",
    "AutoDistributedModelForCausalLM",
    "BadSpan",
    "BadStep",
    "Busy",
    "CheckpointCorrupt",
    "Closed",
    "ConfigError",
    "ConnectionLost",
    "ContextTooLong",
    "DeadlineExceeded",
    "ModelNotFound",
    "ModelUnsupported",
    "NoRoute",
    "Node",
    "PoolFull",
    "ProtocolError",
    "Refused",
    "RemoteFailure",
    "ServeConfig",
    "Session",
    "SessionEvent",
    "StaleEpoch",
    "SwarmError",
    "Unavailable",
    "UnknownSession",
    "Unreachable",
    "UsageError",
    "WrongModel",
    "aio",
    "connect",
    "open_node",
]


def __getattr__(name: str) -> Any:
    if name == "aio":
        return importlib.import_module("swarmlm.aio")
    if name not in _LAZY:
        raise AttributeError(f"module 'swarmlm' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    value = getattr(importlib.import_module(module), attribute or name)
    globals()[name] = value
    return value
