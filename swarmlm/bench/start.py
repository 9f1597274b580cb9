"""`swarmlm bench start`: what a host process holds in memory beside its weights, and how soon a fresh chat speaks."""

from __future__ import annotations

import os
import statistics
import sys
import time
from subprocess import DEVNULL, PIPE

import psutil
import trio

from swarmlm.bench.options import BenchOptions
from swarmlm.bench.report import Report
from swarmlm.bench.swarm import BenchSwarm, open_swarm
from swarmlm.errors import ConfigError
from swarmlm.models.loading import build_meta_model, decoder_layers

PROMPT = "What is the capital of France?"
TOKENS = 8  # of the answer
ROUNDS = 5
IMPORTS = "import torch, transformers"  # what no process that runs a model here can do without: the scale
END_SECONDS = 120.0  # for one process of a round, on a busy machine
WEIGHT_BYTES = {"none": 4.0, "int8": 1.0}  # of a weight in a host, scales aside; float32 is the default
MB = 1e6


async def run(options: BenchOptions) -> Report:
    rounds = options.repeats or ROUNDS
    first: list[float] = []
    imports: list[float] = []
    async with open_swarm(options) as swarm:
        chat = ["-m", "swarmlm.cli", "chat", options.model, "--peers", swarm.addresses[0], "--prompt", PROMPT]
        chat += ["--max-tokens", str(options.tokens or TOKENS)]
        for number in range(rounds + 1):  # the first one warms the disk cache and the hosts
            options.progress(f"round {number} of {rounds}" if number else "warming up")
            seconds = await _first_output(chat), await _first_output(["-c", f"{IMPORTS}; print('done')"])
            if number:
                first.append(seconds[0])
                imports.append(seconds[1])
        report = Report("start", f"Processes of {swarm.source.name}: memory of a host, start of a client")
        scale = statistics.median(imports)
        ratio = statistics.median(first) / scale
        report.add("fresh `swarmlm chat` to its first token", first, "s", ratio=ratio, against="x python's imports")
        report.add(f"python -c '{IMPORTS}'", imports, "s")
        await _memory(report, swarm, options)
    report.notes.append(
        f"Hosts run already, disk caches are warm; {options.threads} compute thread a process. "
        "Memory is resident (RSS), read after the answers; rest is what remains without weights and KV in use."
    )
    return report


async def _memory(report: Report, swarm: BenchSwarm, options: BenchOptions) -> None:
    status = await swarm.node.status(options.model)
    in_use = {row.addresses[0]: row.kv_total - row.kv_free for row in status.hosts}
    counts = await trio.to_thread.run_sync(_weights_by_block, swarm)
    for host in swarm.hosts:
        resident = psutil.Process(host.pid).memory_info().rss
        weights = sum(counts[host.start : host.end]) * WEIGHT_BYTES[options.quant]
        kv = in_use.get(host.address, 0)
        report.add(f"host of blocks {host.start}:{host.end}, all", [resident / MB], "MB")
        against = f"rest of {weights / MB:.0f} MB weights, {kv / MB:.0f} MB KV"
        report.add(
            f"host of blocks {host.start}:{host.end}, rest", [(resident - weights - kv) / MB], "MB", against=against
        )


def _weights_by_block(swarm: BenchSwarm) -> list[int]:
    """How many weights each block has, without loading any."""
    model = build_meta_model(swarm.source.config, causal_lm=True)
    return [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder_layers(model)]


async def _first_output(arguments: list[str]) -> float:
    """Seconds from starting `python ARGUMENTS` until its first byte of output. Waits for its end."""
    started = time.perf_counter()
    process = await trio.lowlevel.open_process(
        [sys.executable, *arguments],
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        with trio.fail_after(END_SECONDS):
            some = await process.stdout.receive_some()
            seconds = time.perf_counter() - started
            while await process.stdout.receive_some():
                pass
            if await process.wait() or not some:
                raise ConfigError(f"a process of the benchmark failed: python {' '.join(arguments[:4])} ...")
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()
            await process.stdout.aclose()
    return seconds
