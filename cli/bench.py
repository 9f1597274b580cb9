"""`swarmlm bench`: measure one part of the system against its reference, on this machine, now."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys

from swarmlm.bench.options import BenchOptions
from swarmlm.config import parse_quant
from swarmlm.errors import ConfigError

from .render import report_table

LARGEST = 1_000_000  # of any number here: more is a slip of the finger
COUNTS = ("tokens", "repeats", "threads", "hosts")


def options_of(arguments: argparse.Namespace) -> BenchOptions:
    """Raises `ConfigError` before anything is started."""
    for name in (*COUNTS, "rtt", "mbit"):
        value = getattr(arguments, name)
        if value is not None and not (0 < value <= LARGEST and math.isfinite(value)):
            raise ConfigError(f"--{name} {value:g} is out of range: it must be above 0 and at most {LARGEST:,}")
    return BenchOptions(
        model=arguments.model,
        tokens=arguments.tokens,
        repeats=arguments.repeats,
        quant=parse_quant(arguments.quant),
        threads=arguments.threads,
        hosts=arguments.hosts,
        rtt_ms=arguments.rtt,
        mbit=arguments.mbit,
        progress=_note,
    )


def run(arguments: argparse.Namespace) -> int:
    options = options_of(arguments)
    import trio

    benchmark = importlib.import_module(f"swarmlm.bench.{arguments.name}")
    report = trio.run(benchmark.run, options)
    print(json.dumps(report.as_json()) if arguments.json else report_table(report))
    return 0


def _note(text: str) -> None:
    print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
