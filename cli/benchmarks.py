"""The benchmarks page of the documentation, by running them all: `make bench`, some minutes on a machine left alone."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from swarmlm.bench.options import NAMES

from .render import report_markdown

EXTRA = {"decode": [("--quant", "int8")]}  # runs beside the plain one
LONGEST_SECONDS = 1800.0  # of one benchmark: each is over in some minutes


def runs() -> list[tuple[str, ...]]:
    """The arguments of every `swarmlm bench` of the page, in its order."""
    return [(name, *extra) for name in NAMES for extra in ((), *EXTRA.get(name, []))]


def measure(arguments: Sequence[str]) -> str:
    """The section of one benchmark: its tables, or the line that says why it has none."""
    command = [sys.executable, "-m", "swarmlm.cli", "bench", *arguments, "--json"]
    title = f"## swarmlm bench {' '.join(arguments)}\n\n"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{title}Not over within {LONGEST_SECONDS:g} s.\n"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        return f"{title}Did not run: {lines[-1].removeprefix('swarmlm: error: ')}\n"
    report: Any = json.loads(done.stdout, object_hook=lambda fields: SimpleNamespace(**fields))
    return title + report_markdown(report)


def page(sections: Sequence[str]) -> str:
    import torch
    import transformers

    machine = (
        f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    head = (
        "# Benchmarks\n\nMade by `make bench`, which runs `swarmlm bench` for everything below. Each measures its "
        "reference in the same run,\nside by side in turns: ratios travel to other machines, times do not. "
        f"A value is a median, with its quartiles.\n\nMachine: {machine}.\n"
    )
    return "\n".join([head, *sections])


def main(file: Path) -> None:
    sections = []
    for arguments in runs():
        print(f"swarmlm bench {' '.join(arguments)}", file=sys.stderr, flush=True)
        sections.append(measure(arguments))
    file.write_text(page(sections))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
