"""`swarmlm status`: who serves what."""

from __future__ import annotations

import argparse

from swarmlm.config import parse_addresses

from .render import status_json, status_table


def run(arguments: argparse.Namespace) -> int:
    peers = parse_addresses(arguments.peers)
    import trio

    return trio.run(_status, arguments.model, peers, arguments.json)


async def _status(model: str, peers: tuple[str, ...], as_json: bool) -> int:
    import swarmlm

    async with swarmlm.open_node(peers) as node:
        status = await node.status(model)
    print(status_json(status) if as_json else status_table(status))
    return 0
