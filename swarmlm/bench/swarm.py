"""What several benchmarks need: host processes of a model, a node that joined them, a blocking client model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trio

from swarmlm.bench.options import BenchOptions
from swarmlm.local_swarm import HOSTS, LocalHost, local_swarm
from swarmlm.models.source import Source, open_source
from swarmlm.node import Node, open_node


@dataclass(frozen=True)
class BenchSwarm:
    """`hosts` serve all blocks of `model` in order; `node` is this process's."""

    model: str
    source: Source
    hosts: list[LocalHost]
    node: Node

    @property
    def addresses(self) -> list[str]:
        return [host.address for host in self.hosts]


@asynccontextmanager
async def open_swarm(options: BenchOptions) -> AsyncIterator[BenchSwarm]:
    """`options.hosts` processes (2 by default) of `options.threads` threads. This process computes with as many."""
    torch.set_num_threads(options.threads)
    source = await trio.to_thread.run_sync(open_source, options.model)
    count = options.hosts or min(HOSTS, source.num_blocks)
    arguments = ["--quant", options.quant]
    options.progress(f"starting {count} hosts of {source.describe()}")
    async with AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(
            local_swarm(options.model, source.num_blocks, hosts=count, threads=options.threads, arguments=arguments)
        )
        node = await stack.enter_async_context(open_node([host.address for host in hosts]))
        yield BenchSwarm(options.model, source, hosts, node)


@asynccontextmanager
async def open_client_model(swarm: BenchSwarm, codec: str = "none") -> AsyncIterator[Any]:
    """transformers' model of the client whose blocks are the swarm's. It blocks: use it in worker threads."""
    from swarmlm.auto import AutoDistributedModelForCausalLM

    def load() -> Any:
        return AutoDistributedModelForCausalLM.from_pretrained(swarm.model, initial_peers=swarm.addresses, codec=codec)

    model = await trio.to_thread.run_sync(load)
    try:
        yield model
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(model.close_swarm)
