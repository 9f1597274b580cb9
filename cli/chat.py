"""`swarmlm chat`: one message, or a conversation in the terminal."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from swarmlm.config import parse_addresses, parse_codec
from swarmlm.errors import ConfigError, SwarmError

from . import starting
from .render import answer_json, route_table, stats_table

if TYPE_CHECKING:
    from swarmlm.session import NodeSession

HELP = """/route  who serves which blocks, and how long a step takes there
/stats  tokens held, speed, failovers
/reset  forget the conversation
/quit   leave (or Ctrl-D); Ctrl-C stops an answer"""


def run(arguments: argparse.Namespace) -> int:
    if arguments.json and arguments.prompt is None:
        raise ConfigError("--json goes with --prompt")
    if arguments.max_tokens < 1:
        raise ConfigError(f"--max-tokens {arguments.max_tokens} leaves no answer")
    if arguments.temperature < 0:
        raise ConfigError(f"--temperature {arguments.temperature:g} is below 0")
    parse_codec(arguments.codec)
    peers = parse_addresses(arguments.peers) if arguments.peers else ()
    imports = starting.begin()
    import trio

    return trio.run(_chat, arguments, peers, imports)


async def _chat(arguments: argparse.Namespace, peers: tuple[str, ...], imports: threading.Thread) -> int:
    import trio

    async with trio.open_nursery() as nursery:
        interrupts = Interrupts(nursery.cancel_scope)
        await nursery.start(interrupts.watch)
        async with _session(arguments, peers, imports) as session:
            starting.ready()
            options = {
                "max_tokens": arguments.max_tokens,
                "temperature": arguments.temperature,
                "seed": arguments.seed,
            }
            if arguments.prompt is not None:
                await _answer_once(session, arguments.prompt, arguments.json, options, interrupts)
            else:
                await _converse(session, options, interrupts)
        nursery.cancel_scope.cancel()
    return interrupts.status


class Interrupts:
    """Ctrl-C stops the answer being written, else the program; SIGTERM always leaves."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self._answer: Any = None
        self.status = 0

    async def watch(self, *, task_status: Any) -> None:
        import trio

        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGINT and self._answer is not None:
                    self._answer.cancel()
                else:
                    self.status = 130 if number == signal.SIGINT else 0
                    self._program.cancel()

    async def write(self, session: NodeSession, message: str, options: dict[str, Any], show: bool) -> None:
        """Print an answer as it comes, until it ends or is stopped."""
        import trio

        answer = session.chat(message, **options)
        try:
            with trio.CancelScope() as self._answer:
                async for piece in answer:
                    if show:
                        print(piece, end="", flush=True)
        finally:
            self._answer = None
            with trio.CancelScope(shield=True):
                await answer.aclose()
            if show:
                print(flush=True)


@asynccontextmanager
async def _session(
    arguments: argparse.Namespace, peers: tuple[str, ...], imports: threading.Thread
) -> AsyncIterator[NodeSession]:
    import swarmlm

    model, codec = arguments.model, arguments.codec
    if peers:
        async with swarmlm.open_node(peers) as node:
            await starting.done(imports)
            async with node.session(model, codec=codec, on_event=_show_event) as session:
                yield session
        return
    import trio

    await starting.done(imports)

    from swarmlm.local_swarm import local_swarm
    from swarmlm.models.source import open_source

    source = await trio.to_thread.run_sync(open_source, model)
    _note(f"starting a local swarm for {source.describe()} ...")
    async with (
        local_swarm(model, source.num_blocks) as hosts,
        swarmlm.open_node([host.address for host in hosts]) as node,
        node.session(model, codec=codec, on_event=_show_event) as session,
    ):
        yield session


async def _answer_once(
    session: NodeSession, prompt: str, as_json: bool, options: dict[str, Any], interrupts: Interrupts
) -> None:
    await interrupts.write(session, prompt, options, show=not as_json)
    if as_json:
        print(answer_json(session.last, session.route(), session.failovers), flush=True)


async def _converse(session: NodeSession, options: dict[str, Any], interrupts: Interrupts) -> None:
    _note("type a message, /help for commands")
    async for line in _lines():
        match line.split():
            case []:
                continue
            case ["/quit" | "/exit"]:
                return
            case ["/help"]:
                print(HELP)
            case ["/route"]:
                print(route_table(session.route()))
            case ["/stats"]:
                print(stats_table(session.stats()))
            case ["/reset"]:
                await session.reset()
                _note("forgotten")
            case [command, *_] if command.startswith("/"):
                _note(f"there is no {command}; /help lists the commands")
            case _:
                try:
                    await interrupts.write(session, line, options, show=True)
                except SwarmError as error:
                    _note(f"error: {error}")


async def _lines() -> AsyncIterator[str]:
    """What the user types, one message a line; ends at Ctrl-D."""
    import trio

    abandon: dict[str, Any] = {"abandon_on_cancel": True}  # a thread that reads a terminal cannot be cancelled
    if not sys.stdin.isatty():
        while line := await trio.to_thread.run_sync(sys.stdin.readline, **abandon):
            yield line.strip()
        return
    from .terminal import Prompt

    prompt = Prompt()
    while (typed := await trio.to_thread.run_sync(prompt.ask, **abandon)) is not None:
        yield typed.strip()


def _show_event(event: Any) -> None:
    _note(event.text)


def _note(text: str) -> None:
    """Beside the answer, not in it: dim on a terminal."""
    print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
