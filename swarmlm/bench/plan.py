"""`swarmlm bench plan`: how long the planner takes for many hosts, and how that grows with their number."""

from __future__ import annotations

import random
import statistics

from swarmlm.bench.options import BenchOptions
from swarmlm.bench.report import Report, alternate, timed
from swarmlm.errors import ConfigError
from swarmlm.protocol import PeerId
from swarmlm.routing.graph import HostView
from swarmlm.routing.planner import plan

BLOCKS = 80  # as a model of 70B parameters has
FEW = 1_000  # hosts
GROWTH = 10  # times as many hosts in the second row
ROUNDS = 9  # an odd number of laps: the median is one of them
LIMITS_MS = (20.0, 200.0)  # what the two sizes may take: a session's start should not feel its plan


def random_hosts(count: int, blocks: int, seed: int = 1) -> list[HostView]:
    """Spans, times and memory of all kinds, the same ones for a seed; some hosts are nearly full.

    The first one serves everything, slower than all others: even a few hosts have a chain.
    """
    rng = random.Random(seed)
    hosts = [HostView(PeerId("h"), 0, blocks, rtt_ms=80.0, queue_ms=20.0, block_ms=5.0, max_blocks=blocks)]
    for number in range(1, count):
        start = rng.randrange(blocks)
        end = rng.randrange(start, blocks) + 1
        times = rng.uniform(1, 80), rng.uniform(0, 20), rng.uniform(0.5, 5)  # ms: round trip, queue, a block
        hosts.append(HostView(PeerId(f"h{number:06}"), start, end, *times, max_blocks=rng.randrange(1, blocks + 1)))
    return hosts


async def run(options: BenchOptions) -> Report:
    few = options.hosts or FEW
    if few < 2:
        raise ConfigError("a plan over fewer than 2 hosts is no measurement")
    many = few * GROWTH
    swarms = {count: random_hosts(count, BLOCKS) for count in (few, many)}
    options.progress(f"planning over {few:,} and {many:,} hosts")
    laps = alternate(
        options.repeats or ROUNDS,
        few=lambda: timed(lambda: plan(swarms[few], 0, BLOCKS)) * 1e3,
        many=lambda: timed(lambda: plan(swarms[many], 0, BLOCKS)) * 1e3,
    )
    growth = statistics.median(laps["many"]) / statistics.median(laps["few"])
    report = Report("plan", f"The fastest chain over {BLOCKS} blocks, exactly")
    report.add(f"{few:,} random hosts", laps["few"], "ms")
    report.add(f"{many:,} random hosts", laps["many"], "ms", ratio=growth, against=f"x the time of {few:,} hosts")
    report.notes.append("Hosts differ in span, round trip, queue, time a block and free memory; one thread.")
    if few == FEW:
        report.notes.append(f"At most {LIMITS_MS[0]:g} and {LIMITS_MS[1]:g} ms are wanted.")
    return report
