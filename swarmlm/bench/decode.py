"""`swarmlm bench decode`: greedy decoding over host processes against local transformers, token by token."""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from typing import Any

import torch
import trio

from swarmlm.bench.options import BenchOptions
from swarmlm.bench.reference import Reference, gaps, prose
from swarmlm.bench.report import Report
from swarmlm.bench.swarm import BenchSwarm, open_client_model, open_swarm
from swarmlm.errors import ConfigError
from swarmlm.session import NodeSession

PROMPT = 32  # tokens of prose before the answer
TOKENS = 48  # of an answer: 45 gaps a round
LEAST_TOKENS = 6  # fewer leave no gap to measure
ROUNDS = 5
FIRST_GAPS = 2  # after a prompt, caches and allocators are still settling
DECODED = 400  # tokens of perplexity token by token
WINDOW = 512  # tokens scored at once: logits of 100 MB at a vocabulary of 49,152

Laps = dict[str, list[float]]


async def run(options: BenchOptions) -> Report:
    count, rounds = options.tokens or TOKENS, options.repeats or ROUNDS
    if count < LEAST_TOKENS:
        raise ConfigError(f"--tokens {count} is too few for decode: {LEAST_TOKENS} at least")
    async with open_swarm(options) as swarm:
        reference = await trio.to_thread.run_sync(Reference, options.model)
        ids = reference.prompt(PROMPT)
        everyone = os.cpu_count() or 1
        laps: Laps = {"swarm": [], "local": [], "all": [], "floor": []}
        async with swarm.node.session(options.model, max_length=PROMPT + count + 1) as session:
            await _answer(session, ids, LEAST_TOKENS)
            for number in range(rounds):
                options.progress(f"round {number + 1} of {rounds}")
                found, times = await _answer(session, ids, count)
                laps["swarm"] += times
                for side, threads in (("local", options.threads), ("all", everyone)):
                    expected, times = await _in_thread(reference.decode, ids, count, threads=threads)
                    laps[side] += times[FIRST_GAPS:]
                laps["floor"].append(await _in_thread(reference.read_weights, threads=options.threads))
        if not laps["swarm"] or not laps["local"]:
            raise ConfigError(f"{options.model} ended its answer after {len(found)} tokens: nothing to measure")
        report = _report(options, swarm, laps, everyone)
        differs = await _in_thread(reference.difference, ids, expected, found)
        equal = len(expected) if differs is None else differs[0]
        report.add("tokens as the reference's", [float(equal)], f"of {len(expected)}")
        if differs is not None:
            report.notes.append(
                f"Where tokens first differ, the reference's best two logits are {differs[1]:.2g} apart."
            )
        if options.quant != "none":
            await _perplexities(report, swarm, reference, options)
    return report


def _report(options: BenchOptions, swarm: BenchSwarm, laps: Laps, everyone: int) -> Report:
    local, floor = statistics.median(laps["local"]), statistics.median(laps["floor"])
    weights = "float32 weights" if options.quant == "none" else f"{options.quant} weights"
    report = Report("decode", f"Greedy decoding of {swarm.source.name}, one token at a time")
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"

    def add(what: str, side: str, against: str, base: float) -> None:
        values = [lap * 1e3 for lap in laps[side]]
        report.add(
            what, values, "ms/token", ratio=statistics.median(laps[side]) / base if against else None, against=against
        )

    add(f"swarm: {len(swarm.hosts)} hosts, {weights}", "swarm", "x the time of local transformers", local)
    add(f"local transformers, float32, {threads}", "local", "x the time of reading its weights", floor)
    add(f"local transformers, float32, {everyone} threads", "all", "x the time of local transformers", local)
    add(f"reading its float32 weights once, {threads}", "floor", "", floor)
    report.notes.append(
        f"Hosts and client are processes on this machine, each of {threads}, joined by real connections. "
        f"Prompts of {PROMPT} tokens; the time between one token and the next; sides measured in turn."
    )
    return report


async def _answer(session: NodeSession, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """The new tokens, and the seconds between their arrivals."""
    await session.reset()
    times = []
    async for _ in session.generate(ids, max_tokens=count):
        times.append(time.perf_counter())
    return session.last.tokens, gaps(times)[FIRST_GAPS:-1]  # the last piece is what the decoder held back


async def _perplexities(report: Report, swarm: BenchSwarm, reference: Reference, options: BenchOptions) -> None:
    options.progress("reading prose for perplexity")
    ids = torch.tensor([reference.tokenizer(prose())["input_ids"]])
    limit = min(WINDOW, swarm.source.context_length)
    local = await trio.to_thread.run_sync(perplexity, reference.model, ids, limit)
    some = ids[:, :DECODED]
    local_decoded = await trio.to_thread.run_sync(decode_perplexity, reference.model, some)
    async with open_client_model(swarm) as model:
        found = await trio.to_thread.run_sync(perplexity, model, ids, limit)

        def decode() -> float:
            with model.inference_session(max_length=DECODED):
                return decode_perplexity(model, some)

        decoded = await trio.to_thread.run_sync(decode)
    for how, here, there in (("", local, found), (", token by token", local_decoded, decoded)):
        report.add(f"perplexity of prose{how}, local float32", [here], "")
        against = f"x local float32: {there / here - 1:+.2%}"
        report.add(f"perplexity of prose{how}, hosts {options.quant}", [there], "", ratio=there / here, against=against)


@torch.inference_mode()
def perplexity(model: Any, ids: torch.Tensor, window: int) -> float:
    """Of `ids` [1, n], read in stretches of `window` tokens that know nothing of each other."""
    total, scored = 0.0, 0
    for stretch in torch.split(ids, window, dim=1):
        if stretch.shape[1] < 2:
            continue
        logits = model(stretch, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, stretch[0, 1:], reduction="sum"))
        scored += stretch.shape[1] - 1
    return math.exp(total / scored)


@torch.inference_mode()
def decode_perplexity(model: Any, ids: torch.Tensor) -> float:
    """Of `ids` [1, n], given one at a time: the weights are used as in decoding, which may be in another way."""
    total, past = 0.0, None
    for position in range(ids.shape[1] - 1):
        output = model(ids[:, position : position + 1], past_key_values=past, use_cache=True)
        past = output.past_key_values
        total += float(torch.nn.functional.cross_entropy(output.logits[0].float(), ids[0, position + 1 : position + 2]))
    return math.exp(total / (ids.shape[1] - 1))


async def _in_thread(work: Any, *arguments: Any, **options: Any) -> Any:
    return await trio.to_thread.run_sync(functools.partial(work, *arguments, **options))
