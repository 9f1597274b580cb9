"""`swarmlm bench hop`: our transport between two processes against bare TCP and against py-libp2p as it comes."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from subprocess import PIPE

import trio

from swarmlm.bench.hop_peer import ECHO, KINDS, LENGTH, SINK
from swarmlm.bench.options import BenchOptions
from swarmlm.bench.report import Report
from swarmlm.errors import ConfigError
from swarmlm.protocol import Address, PeerId
from swarmlm.transport.base import Stream

MESSAGE = 4096  # bytes: the hidden state of one token, of a model of hidden size 1,024 in float32
BULK = 64 * 2**20  # bytes: the hidden states of a long prompt
PIECE = 2**20  # bytes given to one send
ECHOES = 200  # a round and side: enough for a median, over in half a second
WARM_UP = 50  # echoes before the first round: buffers grown, code paths taken once
ROUNDS = 5
START_SECONDS = 60.0  # a process that imports libp2p on a busy machine
OPEN_SECONDS = 10.0  # dialling and handshakes on loopback
NAMES = {"tcp": "bare TCP (trio)", "swarmlm": "swarmlm", "stock": "stock py-libp2p"}


async def run(options: BenchOptions) -> Report:
    rounds = options.repeats or ROUNDS
    echoes: dict[str, list[float]] = {kind: [] for kind in KINDS}
    bulks: dict[str, list[float]] = {kind: [] for kind in KINDS}
    async with AsyncExitStack() as stack:
        options.progress("starting a process for each transport")
        pairs = {kind: await stack.enter_async_context(_streams(kind)) for kind in KINDS}
        for echo, bulk in pairs.values():
            await _echo(echo, WARM_UP)
            await _bulk(bulk, PIECE)
        for number in range(rounds):
            options.progress(f"round {number + 1} of {rounds}")
            for kind, (echo, bulk) in pairs.items():
                echoes[kind] += await _echo(echo, ECHOES)
                bulks[kind].append(await _bulk(bulk, BULK))
    report = Report("hop", "One stream between two processes on loopback")
    base = statistics.median(echoes["tcp"])
    for kind, laps in echoes.items():
        ratio = None if kind == "tcp" else statistics.median(laps) / base
        against = "" if kind == "tcp" else "x the time of bare TCP"
        report.add(
            f"4 KiB there and back, {NAMES[kind]}", [lap * 1e6 for lap in laps], "us", ratio=ratio, against=against
        )
    base = statistics.median(bulks["stock"])
    for kind, laps in bulks.items():
        ratio = None if kind == "stock" else base / statistics.median(laps)
        against = "" if kind == "stock" else "x the speed of stock py-libp2p"
        speeds = [BULK / lap / 1e6 for lap in laps]
        report.add(f"64 MiB one way, {NAMES[kind]}", speeds, "MB/s", ratio=ratio, against=against)
    report.notes.append(
        f"{rounds} rounds of {ECHOES} echoes and one transfer (1 MiB a send) a transport, in turn. "
        "Bare TCP is neither encrypted nor authenticated; the other two are both (noise over yamux over TCP)."
    )
    return report


@asynccontextmanager
async def _streams(kind: str) -> AsyncIterator[tuple[Stream, Stream]]:
    """An echo and a sink at a process of its own, over the transport `kind`."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "swarmlm.bench.hop_peer", kind],
        stdin=PIPE,
        stdout=PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        peer, addresses = await _greeting(process)
        async with KINDS[kind]() as transport:
            streams = []
            for role in (ECHO, SINK):
                stream = await transport.open_stream(peer, addresses, timeout=OPEN_SECONDS)
                await stream.send([role])
                streams.append(stream)
            yield streams[0], streams[1]
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()
            for end in (process.stdin, process.stdout):
                if end is not None:
                    await end.aclose()


async def _greeting(process: trio.Process) -> tuple[PeerId, list[Address]]:
    assert process.stdout is not None
    line = b""
    with trio.move_on_after(START_SECONDS):
        while not line.endswith(b"\n"):
            part = await process.stdout.receive_some()
            if not part:
                raise ConfigError("a process of the benchmark ended before it was ready")
            line += part
        peer, addresses = json.loads(line)
        return peer, addresses
    raise ConfigError(f"a process of the benchmark was not ready within {START_SECONDS:g} s")


async def _echo(stream: Stream, count: int) -> list[float]:
    """Seconds of each of `count` messages there and back."""
    message, laps = bytes(MESSAGE), []
    for _ in range(count):
        started = time.perf_counter()
        await stream.send([message])
        left = MESSAGE
        while left:
            part = await stream.receive()
            if not part:
                raise ConfigError("the far end of the benchmark closed its stream")
            left -= len(part)
        laps.append(time.perf_counter() - started)
    return laps


async def _bulk(stream: Stream, size: int) -> float:
    """Seconds until the far end says that all of `size` bytes are there."""
    piece = bytes(PIECE)
    started = time.perf_counter()
    await stream.send([size.to_bytes(LENGTH, "big")])
    for _ in range(size // PIECE):
        await stream.send([piece])
    if not await stream.receive():
        raise ConfigError("the far end of the benchmark closed its stream")
    return time.perf_counter() - started
