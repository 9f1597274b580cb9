"""The `swarmlm` command: parse, call the node, render. `main` is the entry point; each command has a module."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .parser import make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for an error (one line on stderr), 130 for Ctrl-C."""
    from .failures import one_line

    arguments = make_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        line = one_line(error)
        if line is None:
            raise
        print(f"swarmlm: error: {line}", file=sys.stderr)
        return 1
    return status
