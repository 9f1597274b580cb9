"""`swarmlm serve`: host a span until told to leave."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from swarmlm.config import ServeConfig, parse_addresses, parse_announced, parse_quant, parse_size, parse_span
from swarmlm.errors import ConfigError

from . import starting
from .render import serve_banner


def config_of(arguments: argparse.Namespace) -> ServeConfig:
    """Raises `ConfigError` and `BadSpan` before anything is loaded."""
    if arguments.threads is not None and arguments.threads < 1:
        raise ConfigError(f"--threads {arguments.threads} is no number of threads")
    return ServeConfig(
        model=arguments.model,
        blocks=parse_span(arguments.blocks) if arguments.blocks else None,
        peers=parse_addresses(arguments.peers) if arguments.peers else (),
        listen=arguments.listen or "/ip4/127.0.0.1/tcp/0",
        announce=parse_announced(arguments.announce) if arguments.announce is not None else (),
        identity=arguments.identity,
        kv_memory=parse_size(arguments.kv_memory) if arguments.kv_memory else None,
        dtype=arguments.dtype,
        device=arguments.device,
        threads=arguments.threads,
        quant=parse_quant(arguments.quant),
        address_file=arguments.address_file,
    )


def run(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    imports = starting.begin()
    import trio

    return trio.run(_serve, config, arguments.leave_at_eof, imports)


async def _serve(config: ServeConfig, leave_at_eof: bool, imports: threading.Thread) -> int:
    import trio

    import swarmlm

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def leave_on_signal() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            async def leave_with_parent() -> None:
                async for _ in trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())):
                    pass
                nursery.cancel_scope.cancel()

            nursery.start_soon(leave_on_signal)
            if leave_at_eof:
                nursery.start_soon(leave_with_parent)
            async with swarmlm.open_node(
                config.peers, listen=config.listen, announce=config.announce, identity=config.identity
            ) as node:
                await starting.done(imports)
                handle = await node.host(
                    config.model,
                    blocks=config.blocks,
                    kv_memory=config.kv_memory,
                    dtype=config.dtype,
                    device=config.device,
                    threads=config.threads,
                    quant=config.quant,
                    progress=_progress_bar(),
                )
                starting.ready(thorough=True)
                print(serve_banner(handle, config.model, node.addresses), flush=True)
                if config.address_file:
                    _write(Path(config.address_file), node.addresses[0])
                await trio.sleep_forever()
    print("left the swarm", flush=True)
    return 0


def _progress_bar() -> Callable[[int, int], None] | None:
    """A bar over the tensors read, on a terminal only."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar = tqdm(desc="loading", unit="tensor", leave=False)

    def update(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return update


def _write(path: Path, text: str) -> None:
    """At once: a reader sees the whole address or no file."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        os.replace(name, path)
    except OSError as error:
        raise ConfigError(f"cannot write the address file {path}: {error.strerror}") from None
