"""The commands page of the documentation, from the parsers themselves: `make docs`."""

from __future__ import annotations

import argparse
import os

from .parser import make_parser


def commands_page() -> str:
    """docs/cli.md: the help of each command."""
    os.environ["COLUMNS"] = "100"  # argparse wraps by the terminal's width
    parser = make_parser()
    sections = ["# Commands\n\nMade from the commands' own help by `make docs`.\n", _section("swarmlm", parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            sections += [_section(f"swarmlm {name}", command) for name, command in action.choices.items()]
    return "\n".join(sections)


def _section(title: str, parser: argparse.ArgumentParser) -> str:
    return f"## {title}\n\n```text\n{parser.format_help().rstrip()}\n```\n"


if __name__ == "__main__":
    print(commands_page(), end="")
