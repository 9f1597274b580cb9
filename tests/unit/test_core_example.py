"""The example that the core's documentation teaches with is a program that runs, on its own."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import swarmlm.actors.core


def example() -> str:
    lines = (swarmlm.actors.core.__doc__ or "").splitlines()
    first = lines.index("    import trio")
    last = max(i for i, line in enumerate(lines) if line.startswith("    "))
    return dedent("\n".join(lines[first : last + 1]))


def test_the_example_runs_without_torch_and_libp2p():
    program = example() + "\nimport sys; print(sorted({'torch', 'libp2p', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.split(), done.stderr) == (["5", "12", "[]"], "")
