"""What `swarmlm bench` was asked for. Every benchmark is a module of this package with

    async def run(options: BenchOptions) -> Report

that raises `ConfigError` for what it cannot do. The cli runs it, one benchmark a process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swarmlm.config import DEFAULT_MODEL, Quant

NAMES = (
    "hop",
    "decode",
    "prefill",
    "batch",
    "train",
    "wan",
    "plan",
    "start",
    "wire",
)  # modules, in the order of the page


def silent(text: str) -> None:
    """Shows no progress."""


@dataclass(frozen=True)
class BenchOptions:
    """None leaves a choice to the benchmark.

    `tokens` are those of an answer (decode, batch) or of a prompt (prefill, train). `hosts` are processes of `threads`
    compute threads each; the client and the reference have as many threads. `repeats` is the number of rounds. `quant`
    goes to `swarmlm serve --quant`. `progress(text)` shows a line to whoever waits.
    """

    model: str = DEFAULT_MODEL
    tokens: int | None = None
    repeats: int | None = None
    quant: Quant = "none"
    threads: int = 1
    hosts: int | None = None
    rtt_ms: float | None = None  # of the simulated network between all peers (wan)
    mbit: float | None = None  # per second and direction, of the simulated network (wan)
    progress: Callable[[str], None] = silent
