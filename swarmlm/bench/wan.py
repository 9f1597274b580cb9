"""Decoding and prefill when every message takes long: 100 ms round trips and 100 Mbit/s between all peers by default.

Twice: nodes of this process on the simulated network, with a small random model; and host processes with the real one,
each behind a proxy that delays (`transport.delay`) and announced under the proxy's address.

The reference is what the wires alone allow: a step that passes from host to host travels (hosts + 1) times one way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import torch
import trio

from swarmlm.bench.options import BenchOptions
from swarmlm.bench.report import Report
from swarmlm.bench.timed import TimedAnswer, endless_client, open_timed_session
from swarmlm.errors import ConfigError
from swarmlm.local_swarm import free_port, local_swarm
from swarmlm.node import Node, open_node
from swarmlm.transport.identity import Identity
from swarmlm.transport.memory import MemoryNetwork

RTT_MS = 100.0  # between continents
MBIT = 100.0  # per second: a home connection
HOSTS = 3
TOKENS = 16  # of one answer: 5 s of it
REPEATS = 3
PROMPT = 512  # tokens of the long prompt
WARM_UP = 3  # tokens before anything is measured: first calls allocate
SHORT = 8  # tokens of the prompt before a measured answer
READY_SECONDS = 20.0  # for the process of the wires to listen
SMALL = {  # the simulated half: hidden states as wide as the default model's, blocks that cost next to nothing
    "hidden_size": 576,
    "intermediate_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
}


async def run(options: BenchOptions) -> Report:
    """Raises `ConfigError` for a wire that cannot be, and what serving and opening sessions raise."""
    rtt = (options.rtt_ms if options.rtt_ms is not None else RTT_MS) / 1e3
    mbit = options.mbit if options.mbit is not None else MBIT
    hosts = options.hosts if options.hosts is not None else HOSTS
    if rtt < 0 or mbit <= 0 or hosts < 1:
        raise ConfigError(f"{hosts} hosts with {rtt * 1e3:g} ms and {mbit:g} Mbit/s between them are no network")
    torch.set_num_threads(options.threads)
    report = Report("wan", f"{hosts} hosts, {rtt * 1e3:g} ms round trips and {mbit:g} Mbit/s between all peers")
    options.progress("simulated network: starting nodes")
    async with _simulated(hosts, rtt, mbit) as (node, model):
        await _measure(report, "simulated", node, model, rtt, mbit, options)
    options.progress("sockets: starting host processes")
    async with _sockets(options, hosts, rtt, mbit) as node:
        await _measure(report, "sockets", node, options.model, rtt, mbit, options)
    report.notes.append(
        f"decode against (hosts + 1) x RTT/2 + compute: {(hosts + 1) * rtt * 500:g} ms of wire; a step that came back "
        f"to the client between hosts would be {hosts * rtt * 1e3:g} ms of it"
    )
    report.notes.append("compute: one token through the hosts' blocks, as they measure it, and the client's own share")
    report.notes.append(f"prefill of {PROMPT} tokens against the wire alone: (hosts + 1) x (RTT/2 + sending it once)")
    report.notes.append(
        f"{options.threads} compute threads a process; the simulated half has {SMALL['hidden_size']}-wide"
    )
    report.notes[-1] += f" random blocks in one process, the other half {options.model} in {hosts} host processes"
    return report


async def _measure(
    report: Report, where: str, node: Node, model: str, rtt: float, mbit: float, options: BenchOptions
) -> None:
    source = await node.source(model)
    client = await endless_client(node, model)
    tokens = options.tokens if options.tokens is not None else TOKENS
    repeats = options.repeats if options.repeats is not None else REPEATS
    prompt = [1 + index % 300 for index in range(PROMPT)]
    decoded: list[TimedAnswer] = []
    prefilled: list[TimedAnswer] = []
    started = time.perf_counter()
    async with open_timed_session(node, model, client, max_length=PROMPT + tokens + SHORT) as session:
        opened = time.perf_counter() - started
        await session.generate(prompt[:SHORT], tokens=WARM_UP)
        for round_ in range(repeats):
            options.progress(f"{where}: round {round_ + 1} of {repeats}")
            decoded.append(await session.generate(prompt[:SHORT], tokens=tokens + 1))
            prefilled.append(await session.generate(prompt, tokens=1))
        rows = (await node.status(model)).hosts
    hosts = len(rows)
    compute = sum(row.block_ms * (row.end - row.start) for row in rows) / 1e3
    own = statistics.median(one for answer in decoded for one in answer.client)
    ideal = (hosts + 1) * rtt / 2 + compute + own
    gaps = [gap * 1e3 for answer in decoded for gap in answer.gaps]
    against = f"x (n+1) RTT/2 + compute = {ideal * 1e3:.0f} ms"
    report.add(f"{where}: decode, a token", gaps, "ms", ratio=statistics.median(gaps) / ideal / 1e3, against=against)
    report.add(f"{where}: of it compute of the hosts", [compute * 1e3], "ms")
    report.add(f"{where}: of it the client's share", [own * 1e3], "ms")
    if rtt:
        crossings = (statistics.median(gaps) / 1e3 - compute - own) / (rtt / 2)
        report.add(
            f"{where}: one-way trips a token", [crossings], "trips", ratio=crossings / (hosts + 1), against="x n+1"
        )
    sending = PROMPT * int(source.config.hidden_size) * 4 * 8 / (mbit * 1e6)
    wire = (hosts + 1) * (rtt / 2 + sending)
    firsts = [answer.first for answer in prefilled]
    report.add(
        f"{where}: prefill of {PROMPT} tokens",
        firsts,
        "s",
        ratio=statistics.median(firsts) / wire,
        against=f"x the wire's {wire:.2f} s",
    )
    report.add(f"{where}: opening a session, cold", [opened], "s")


@asynccontextmanager
async def _simulated(hosts: int, rtt: float, mbit: float) -> AsyncIterator[tuple[Node, str]]:
    """A client of `hosts` nodes in this process, and the model's folder."""
    network = MemoryNetwork(latency=rtt / 2, bandwidth=mbit * 1e6 / 8)
    blocks = SMALL["num_hidden_layers"]
    cuts = [blocks * number // hosts for number in range(hosts + 1)]
    with tempfile.TemporaryDirectory(prefix="swarmlm-") as folder:
        await trio.to_thread.run_sync(_make_small, folder)
        async with AsyncExitStack() as stack:
            seeds: Sequence[str] = ()
            for number in range(hosts + 1):
                key = Identity.generate()
                transport = await stack.enter_async_context(network.open_transport(key))
                node = await stack.enter_async_context(open_node(seeds, transport=transport, key=key))
                seeds = seeds or node.addresses
                if number < hosts:
                    await node.host(folder, blocks=range(cuts[number], cuts[number + 1]))
            yield node, folder


def _make_small(folder: str) -> None:
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    weights = LlamaForCausalLM(config).state_dict()
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})


@asynccontextmanager
async def _sockets(options: BenchOptions, hosts: int, rtt: float, mbit: float) -> AsyncIterator[Node]:
    """A client of `hosts` processes, each reached over its wire only, by the client and by the others."""
    ports = [(free_port(), free_port()) for _ in range(hosts)]
    with tempfile.TemporaryDirectory(prefix="swarmlm-") as folder:
        key = Path(folder) / "first.key"
        first = f"/ip4/127.0.0.1/tcp/{ports[0][0]}/p2p/{Identity.load_or_create(key).peer_id}"
        each = [
            [
                *("--listen", f"/ip4/127.0.0.1/tcp/{target}", "--announce", f"/ip4/127.0.0.1/tcp/{listen}"),
                *(("--identity", str(key)) if number == 0 else ("--peers", first)),
                "--quant",
                options.quant,
            ]
            for number, (listen, target) in enumerate(ports)
        ]
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(_wires(ports, rtt, mbit))
            probe = await stack.enter_async_context(open_node())
            blocks = (await probe.source(options.model)).num_blocks
            swarm = local_swarm(options.model, blocks, hosts=hosts, threads=options.threads, each=each)
            ready = await stack.enter_async_context(swarm)
            yield await stack.enter_async_context(open_node([host.address for host in ready]))


@asynccontextmanager
async def _wires(ports: Sequence[tuple[int, int]], rtt: float, mbit: float) -> AsyncIterator[None]:
    """A process that passes each (listen, target) pair on with delay."""
    command = [sys.executable, "-m", "swarmlm.transport.delay", "--latency-ms", str(rtt * 500), "--mbit", str(mbit)]
    command += [f"{listen}:{target}" for listen, target in ports]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        said = b""
        with trio.move_on_after(READY_SECONDS):
            async with trio.lowlevel.FdStream(os.dup(process.stdout.fileno())) as output:
                said = await output.receive_some()
        if not said.startswith(b"ready"):
            raise ConfigError("the process of the simulated wires did not start")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
