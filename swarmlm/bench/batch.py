"""Many conversations at once: tokens a second of N sessions of one client, and what a long prompt does to the others.

Sessions are `Node.session`s with prompts and lengths of their own, decoded greedily; hosts batch their steps.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped,unused-ignore]
import trio

from swarmlm.bench.options import BenchOptions
from swarmlm.bench.reference import gaps, prose
from swarmlm.bench.report import Report
from swarmlm.bench.swarm import BenchSwarm, open_swarm
from swarmlm.errors import ConfigError
from swarmlm.session import NodeSession

COUNTS = (1, 4, 16, 32)  # sessions at once
TOKENS = 120  # of an answer: the last of 32 sessions to start must find the first one still at it
LEAST_TOKENS = 8  # fewer leave no time in which all sessions decode
REPEATS = 2  # rounds over all counts
SHORTEST, LONGEST = 16, 64  # tokens of a prompt
STALLED = 4  # sessions that decode while a long prompt arrives
LONG_PROMPT = 2000  # tokens of it
SETTLE = 8  # gaps before the long prompt arrives
STALL_TOKENS = 400  # of each stalled session's answer at most: it is stopped when the prompt has been read


@dataclass(frozen=True)
class _Rate:
    """`tokens` a second of all sessions together; milliseconds of processor time a token, of all hosts and here."""

    tokens: float
    hosts_ms: float
    client_ms: float


@dataclass
class _Stream:
    """One session's answer: when its pieces arrived, and how many tokens they were."""

    times: list[float]
    tokens: int = 0

    def between(self, start: float, end: float) -> float:
        """Tokens that arrived in (start, end]; a piece is nearly always one."""
        arrived = sum(start < moment <= end for moment in self.times)
        return arrived * self.tokens / max(1, len(self.times))


async def run(options: BenchOptions) -> Report:
    """Raises `ConfigError` for too short answers, and what serving and opening sessions raise."""
    tokens, repeats = options.tokens or TOKENS, options.repeats or REPEATS
    if tokens < LEAST_TOKENS:
        raise ConfigError(f"--tokens {tokens} is too few for batch: {LEAST_TOKENS} at least")
    async with open_swarm(options) as swarm:
        client, tokenizer = await swarm.node.client_model(options.model)
        client.generation_config.eos_token_id = None  # answers are of full length
        ids = list(tokenizer(prose())["input_ids"])
        report = Report("batch", f"Sessions of one client at once over {len(swarm.hosts)} hosts of {swarm.source.name}")
        found: dict[int, list[_Rate]] = {count: [] for count in COUNTS}
        await _rate(swarm, _prompts(ids, 1), LEAST_TOKENS)
        for round_ in range(repeats):
            for count in COUNTS:
                options.progress(f"round {round_ + 1} of {repeats}: {count} sessions")
                found[count].append(await _rate(swarm, _prompts(ids, count), tokens))
        for unit, what, attribute in (
            ("tokens/s", "", "tokens"),
            ("ms/token", ": processor time, all hosts", "hosts_ms"),
            ("ms/token", ": processor time, client", "client_ms"),
        ):
            one = statistics.median(getattr(rate, attribute) for rate in found[1])
            for count in COUNTS:
                values = [float(getattr(rate, attribute)) for rate in found[count]]
                name = f"{count} session{'s' * (count > 1)}{what}"
                report.add(name, values, unit, ratio=statistics.median(values) / one, against="x one session")
        options.progress("a long prompt beside short answers")
        await _stall(report, swarm, ids)
    report.notes.append(
        f"{len(swarm.hosts)} host processes and the client, each of {options.threads} compute threads, share "
        f"{os.cpu_count()} processors. Prompts of {SHORTEST} to {LONGEST} tokens, answers of {tokens}."
    )
    report.notes.append(
        "The rate is that of all sessions together while all of them decode. Processor time is of the whole run, "
        "prompts included, over its new tokens: it falls as steps are batched, whatever else runs here."
    )
    return report


def _prompts(ids: Sequence[int], count: int) -> list[list[int]]:
    """`count` stretches of `ids`, each from a place of its own and of a length of its own."""
    lengths = [SHORTEST + (LONGEST - SHORTEST) * index // max(1, count - 1) for index in range(count)]
    places = [len(ids) * index // (2 * count) for index in range(count)]
    return [list(ids[place : place + length]) for place, length in zip(places, lengths, strict=True)]


async def _rate(swarm: BenchSwarm, prompts: Sequence[Sequence[int]], tokens: int) -> _Rate:
    """One run of a session for each prompt, all at once."""
    streams = [_Stream([]) for _ in prompts]
    async with AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(swarm.node.session(swarm.model, max_length=LONGEST + tokens + 1))
            for _ in prompts
        ]
        hosts, client = _processor_seconds(swarm), time.process_time()
        async with trio.open_nursery() as nursery:
            for session, prompt, stream in zip(sessions, prompts, streams, strict=True):
                nursery.start_soon(_answer, session, prompt, tokens, stream)
        hosts, client = _processor_seconds(swarm) - hosts, time.process_time() - client
    start = max(stream.times[0] for stream in streams)
    end = min(stream.times[-2] for stream in streams)  # the last piece is what the text decoder held back
    if end <= start:
        raise ConfigError(f"--tokens {tokens} is too few here: no moment when all {len(prompts)} sessions decode")
    new = sum(stream.tokens for stream in streams)
    rate = sum(stream.between(start, end) for stream in streams) / (end - start)
    return _Rate(rate, hosts * 1e3 / new, client * 1e3 / new)


def _processor_seconds(swarm: BenchSwarm) -> float:
    """Of all host processes since they started."""
    times = [psutil.Process(host.pid).cpu_times() for host in swarm.hosts]
    return float(sum(each.user + each.system for each in times))


async def _answer(session: NodeSession, prompt: Sequence[int], tokens: int, stream: _Stream) -> None:
    async for _ in session.generate(prompt, max_tokens=tokens):
        stream.times.append(time.perf_counter())
    stream.tokens = len(session.last.tokens)


async def _stall(report: Report, swarm: BenchSwarm, ids: Sequence[int]) -> None:
    """`STALLED` sessions decode; then a prompt of `LONG_PROMPT` tokens arrives in another one."""
    size = min(LONG_PROMPT, swarm.source.context_length - 2)
    streams = [_Stream([]) for _ in range(STALLED)]
    async with AsyncExitStack() as stack:

        async def open_one(length: int) -> NodeSession:
            return await stack.enter_async_context(swarm.node.session(swarm.model, max_length=length))

        limit = min(LONGEST + STALL_TOKENS + 1, swarm.source.context_length)
        sessions = [await open_one(limit) for _ in streams]
        long_one = await open_one(size + 2)
        async with trio.open_nursery() as nursery:
            for session, prompt, stream in zip(sessions, _prompts(ids, STALLED), streams, strict=True):
                nursery.start_soon(_answer, session, prompt, STALL_TOKENS, stream)
            while min(len(stream.times) for stream in streams) <= SETTLE:
                await trio.sleep(0.01)
            began = time.perf_counter()
            reading = _Stream([])
            await _answer(long_one, (list(ids) * (size // len(ids) + 1))[:size], 1, reading)
            ended = reading.times[0]
            for session in sessions:
                await session.reset()
    calm, beside = [], []
    for stream in streams:
        for gap, moment in zip(gaps(stream.times), stream.times[1:], strict=True):
            if moment <= began:
                calm.append(gap * 1e3)
            elif moment - gap <= ended:
                beside.append(gap * 1e3)
    usual = statistics.median(calm)
    report.add(f"{STALLED} sessions: a token's gap", calm, "ms")
    what = f"their gaps while {size} tokens are read"
    report.add(what, beside, "ms", ratio=statistics.median(beside) / usual, against="x the gap before")
    report.add("the worst of those", [max(beside)], "ms", ratio=max(beside) / usual, against="x the gap before")
    report.add(f"reading {size} tokens meanwhile", [ended - began], "s")
