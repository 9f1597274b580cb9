"""The grammar of the commands. Every help text teaches with an example."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from typing import Any

from swarmlm.bench.options import NAMES
from swarmlm.config import DEFAULT_MODEL

MODEL_HELP = (
    f'"{DEFAULT_MODEL}" (the default), a directory with config.json and safetensors files, a .gguf file, '
    "or a hub repository OWNER/NAME"
)
PEERS_HELP = "full addresses of members of a swarm, separated by commas"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="swarmlm",
        description="Pool small machines to run a language model that none of them could hold.",
        epilog="""examples:
  swarmlm chat                            talk to the default model on a local swarm
  swarmlm serve --blocks 0:15             host half of it; prints how others join
  swarmlm serve --blocks 15:30 --peers ADDR
  swarmlm chat --peers ADDR
  swarmlm status --peers ADDR

`swarmlm COMMAND --help` tells more.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"swarmlm {version('swarmlm')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_chat(commands)
    _add_status(commands)
    _add_bench(commands)
    return parser


def _add(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL, help=MODEL_HELP)
    return parser


def _add_serve(commands: Any) -> None:
    from .serve import run

    parser = _add(
        commands,
        "serve",
        "host a span of a model's blocks",
        """  swarmlm serve                                      all blocks, a new swarm
  swarmlm serve --blocks 0:12 --listen /ip4/0.0.0.0/tcp/4001 --identity host.key
  swarmlm serve --blocks 12:30 --peers /ip4/192.168.1.7/tcp/4001/p2p/12D3Koo...

The full address and the command that joins this host are printed when it is ready.
Ctrl-C or SIGTERM leaves the swarm.""",
    )
    parser.add_argument("--blocks", metavar="A:B", help="serve blocks A to B-1 (default: all of them)")
    parser.add_argument("--peers", metavar="ADDR,...", help=f"{PEERS_HELP}; without it, a new swarm is started")
    parser.add_argument(
        "--listen", metavar="MULTIADDR", help="where to accept connections (default: /ip4/127.0.0.1/tcp/0, a free port)"
    )
    parser.add_argument(
        "--announce",
        metavar="ADDR,...",
        help="tell others these addresses instead of where it listens, for example those of a forwarded port: "
        "/ip4/203.0.113.5/tcp/4001 (the peer id may be left out)",
    )
    parser.add_argument("--identity", metavar="FILE", help="key file, made if missing: keeps the peer id")
    parser.add_argument(
        "--kv-memory",
        metavar="SIZE",
        help="memory for the sessions' KV caches, like 512MiB or 2GB (default: a quarter of what is free, up to 1GiB)",
    )
    parser.add_argument(
        "--dtype",
        metavar="D",
        help="float32, bfloat16 or float16 (default: float32 on CPU, else the checkpoint's)",
    )
    parser.add_argument(
        "--device", metavar="DEV", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda, else cpu)"
    )
    parser.add_argument("--threads", metavar="N", type=int, help="compute threads (default: torch's choice)")
    parser.add_argument(
        "--quant",
        metavar="Q",
        help="int8 keeps weights in a byte each: a quarter of float32's memory, on CPUs faster decoding, slightly"
        " other tokens"
        " (default: none)",
    )
    parser.add_argument("--address-file", metavar="FILE", help="write the full address here when ready")
    parser.add_argument("--leave-at-eof", action="store_true", help=argparse.SUPPRESS)  # a parent holds the other end
    parser.set_defaults(run=run)


def _add_chat(commands: Any) -> None:
    from .chat import run

    parser = _add(
        commands,
        "chat",
        "chat with a model over a swarm",
        """  swarmlm chat                                       starts its own local swarm
  swarmlm chat --peers /ip4/192.168.1.7/tcp/4001/p2p/12D3Koo...
  swarmlm chat --prompt "What is the capital of France?" --json

In the chat: /help, /route (who serves what), /stats, /reset, /quit. Ctrl-C stops an answer.""",
    )
    parser.add_argument("--peers", metavar="ADDR,...", help=f"{PEERS_HELP}; without it, a local swarm is started")
    parser.add_argument("--prompt", metavar="TEXT", help="send one message, print the answer and exit")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=512, help="of one answer (default: 512)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 (the default) always takes the likeliest token"
    )
    parser.add_argument(
        "--codec",
        metavar="C",
        default="none",
        help="compress what travels between peers: float16, bfloat16 or int8; answers may change (default: none)",
    )
    parser.add_argument("--seed", metavar="S", type=int, help="make sampling repeatable")
    parser.add_argument(
        "--json",
        action="store_true",
        help="with --prompt: one line of JSON with text, tokens, tokens_per_second, route and failovers",
    )
    parser.set_defaults(run=run)


def _add_status(commands: Any) -> None:
    from .status import run

    parser = _add(
        commands,
        "status",
        "show who serves which blocks of a model",
        """  swarmlm status --peers /ip4/192.168.1.7/tcp/4001/p2p/12D3Koo...
  swarmlm status --peers ADDR --json""",
    )
    parser.add_argument("--peers", metavar="ADDR,...", required=True, help=PEERS_HELP)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.set_defaults(run=run)


def _add_bench(commands: Any) -> None:
    from .bench import run

    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure this machine against a reference",
        description="Measure one part of swarmlm against its reference, on this machine, in the same run.",
        epilog="""benchmarks:
  hop      our transport against bare TCP and stock py-libp2p
  decode   one token over host processes against local transformers
  prefill  a long prompt over host processes against local transformers
  batch    many conversations at once against one
  train    forward and backward over host processes against local autograd
  wan      steps over a slow network against what its physics allows
  plan     the route over thousands of hosts
  start    memory of a host, and time to the first token of a fresh chat
  wire     compressing hidden states between peers: bytes, and what it does to tokens

examples:
  swarmlm bench decode
  swarmlm bench decode --quant int8 --tokens 128
  swarmlm bench prefill --tokens 1024 --hosts 3 --model ./my-model
  swarmlm bench hop --json

A value is a median with its quartiles. Leave the machine alone while it runs.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=NAMES, help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--model", metavar="MODEL", default=DEFAULT_MODEL, help=MODEL_HELP)
    parser.add_argument(
        "--tokens", metavar="N", type=int, help="of an answer (decode, batch) or a prompt (prefill, train)"
    )
    parser.add_argument("--repeats", metavar="N", type=int, help="rounds; each measures every side once")
    parser.add_argument("--hosts", metavar="N", type=int, help="host processes (plan: hosts in the smaller swarm)")
    parser.add_argument(
        "--threads", metavar="N", type=int, default=1, help="compute threads of each process (default: 1)"
    )
    parser.add_argument("--quant", metavar="Q", help="how hosts hold their weights, as `swarmlm serve --quant`")
    parser.add_argument("--rtt", metavar="MS", type=float, help="wan: round trip between all peers")
    parser.add_argument("--mbit", metavar="N", type=float, help="wan: Mbit/s between all peers")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.set_defaults(run=run)
