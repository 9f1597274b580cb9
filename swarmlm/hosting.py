"""Becoming a host: load a span, start its actors, announce it. Called by `Node.host`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
import trio

from swarmlm.actors.announcer import LEASE_SECONDS, Announce, Announcer, AnnouncerRole, Withdraw
from swarmlm.actors.batcher import Batcher
from swarmlm.actors.core import Ref
from swarmlm.actors.host import Admit, BlockHost, SetState
from swarmlm.actors.pusher import Pusher
from swarmlm.config import default_kv_memory, parse_quant
from swarmlm.errors import ConfigError, SwarmError
from swarmlm.kernels.kv_pool import KVPool
from swarmlm.models.passes import Passes
from swarmlm.models.source import Source
from swarmlm.models.span import Span
from swarmlm.protocol import (
    Backward,
    CloseSession,
    Forward,
    GetStatus,
    HostRecord,
    HostRole,
    OpenSession,
    Push,
    Step,
)
from swarmlm.transport.base import peer_of
from swarmlm.transport.records import sign_record

if TYPE_CHECKING:
    from swarmlm.node import Node

log = logging.getLogger("swarmlm.node")

ANNOUNCE_SECONDS = 30.0  # directory, neighbours: each has its own shorter deadline
MAX_THREADS = 4096  # more than any machine's cores: a slip of the finger
KEEP_SHARE = 2  # kept training graphs may take as much as half the KV budget, on top of it
WITHDRAW_SECONDS = 5.0  # leaving does not wait for the dead
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class HostHandle:
    """What a node serves. `kv_total` in bytes, `block_ms` for one token through one block."""

    model: str
    start: int
    end: int
    blocks: int
    dtype: str
    kv_total: int
    block_ms: float
    quant: str = "none"


@dataclass(frozen=True)
class Hosting:
    """What a node keeps of its span's actors."""

    handle: HostHandle
    host: Ref[HostRole]
    announcer: Ref[AnnouncerRole]


async def load_span(
    source: Source,
    blocks: range | None,
    *,
    dtype: str | None,
    device: str,
    threads: int | None,
    quant: str | None = None,
    progress: Callable[[int, int], None] | None,
) -> Span:
    """Read the blocks (all by default) in a worker thread. Raises `BadSpan`, `ConfigError`, `ModelUnsupported`,
    `CheckpointCorrupt`.
    """
    if threads is not None:
        if not 1 <= threads <= MAX_THREADS:
            raise ConfigError(f"{threads} threads are out of range: 1 to {MAX_THREADS:,}")
        torch.set_num_threads(threads)
    chosen = blocks if blocks is not None else range(source.num_blocks)
    where = resolve_device(device)
    load = functools.partial(
        Span.load,
        source,
        chosen.start,
        chosen.stop,
        dtype=resolve_dtype(dtype, where, source.checkpoint_dtype),
        device=where,
        quant=parse_quant(quant),
        progress=progress,
    )
    return await trio.to_thread.run_sync(load)


async def start_hosting(node: Node, source: Source, span: Span, kv_memory: int | None) -> Hosting:
    """Batcher, block host and announcer of `span`; returns once the neighbours have been told."""
    block_ms = await trio.to_thread.run_sync(span.measure)
    pool = KVPool(kv_memory if kv_memory is not None else default_kv_memory())
    passes = Passes(span, keep_bytes=pool.total // KEEP_SHARE)
    pusher = Pusher(node.links, node.scout, source.name, node.nursery)
    batcher = await node.supervisor.start(
        lambda: Batcher(span, pool, block_ms=block_ms, passes=passes, push=pusher.push), name="batcher"
    )
    host = await node.supervisor.start(
        lambda: BlockHost(
            node.peer_id,
            batcher,
            model=source.name,
            fingerprint=source.fingerprint,
            start=span.start,
            end=span.end,
            context_length=source.context_length,
            kv_token_bytes=span.kv_token_bytes,
            warm=pusher.warm,
        ),
        name="host",
    )
    node.links.introduce(OpenSession, host, Admit)
    node.links.route({CloseSession: host, GetStatus: host})
    node.links.route({Step: batcher, Push: batcher, Forward: batcher, Backward: batcher})
    record = HostRecord(
        peer=node.peer_id,
        addresses=tuple(node.addresses),
        model=source.name,
        fingerprint=source.fingerprint,
        blocks=span.blocks,
        start=span.start,
        end=span.end,
        sequence=0,
        issued=0.0,
        lease=LEASE_SECONDS,
        dtype=str(span.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        block_ms=block_ms,
        kv_free=pool.free,
        kv_total=pool.total,
        kv_token_bytes=span.kv_token_bytes,
        version=version("swarmlm"),
        quant=span.quant,
    )
    announcer = await node.supervisor.start(
        lambda: Announcer(
            record,
            functools.partial(sign_record, identity=node.identity),
            host=host,
            directory=node.directory,
            links=node.links,
            scout=node.scout,
            discovery=node.discovery,
            seeds=[(peer_of(seed), seed) for seed in node.seeds],
        ),
        name="announcer",
    )
    await announcer.call(Announce(), deadline=ANNOUNCE_SECONDS)
    handle = HostHandle(source.name, span.start, span.end, span.blocks, record.dtype, pool.total, block_ms, span.quant)
    return Hosting(handle, host, announcer)


async def leave(hosting: Hosting) -> None:
    """No new sessions from here on, and the record taken back. Never raises for the world; bounded."""
    with trio.CancelScope(deadline=trio.current_time() + WITHDRAW_SECONDS, shield=True):
        try:
            await hosting.host.call(SetState("draining"), deadline=WITHDRAW_SECONDS)
            await hosting.announcer.call(Withdraw(), deadline=WITHDRAW_SECONDS)
        except SwarmError as error:
            log.debug("could not withdraw: %s", error)


def resolve_device(name: str) -> str:
    """The device of a name; "auto" is the GPU if there is one. Raises `ConfigError` for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"no device {name!r} here: {str(error).splitlines()[0]}") from None
    return name


def resolve_dtype(name: str | None, device: str, checkpoint: Any) -> Any:
    """The torch dtype of a name; None is float32 on CPU and the checkpoint's own elsewhere. Raises `ConfigError`."""
    if name is None:
        return torch.float32 if device == "cpu" else checkpoint
    if name not in DTYPES:
        raise ConfigError(f"no dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]
