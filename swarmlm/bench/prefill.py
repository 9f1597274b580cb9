"""`swarmlm bench prefill`: a long prompt through host processes against the same prompt through local transformers."""

from __future__ import annotations

import os
import statistics
from typing import Any

import torch
import trio

from swarmlm.bench.options import BenchOptions
from swarmlm.bench.reference import Reference, compute_threads
from swarmlm.bench.report import Report, alternate, timed
from swarmlm.bench.swarm import open_client_model, open_swarm
from swarmlm.errors import ConfigError

TOKENS = 512  # of the prompt: a page of text
ROUNDS = 5


async def run(options: BenchOptions) -> Report:
    count, rounds = options.tokens or TOKENS, options.repeats or ROUNDS
    async with open_swarm(options) as swarm:
        if count > swarm.source.context_length:
            raise ConfigError(
                f"--tokens {count} are more than the {swarm.source.context_length} of the model's context"
            )
        reference = await trio.to_thread.run_sync(Reference, options.model)
        everyone = os.cpu_count() or 1
        async with open_client_model(swarm) as model:
            options.progress(f"{rounds} rounds of {count} tokens")
            laps, apart = await trio.to_thread.run_sync(_measure, model, reference, options, count, rounds, everyone)
    local = statistics.median(laps["local"])
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    report = Report("prefill", f"A prompt of {count} tokens through {swarm.source.name}, to the logits of its last one")

    def add(what: str, side: str) -> None:
        values = [lap * 1e3 for lap in laps[side]]
        ratio = None if side == "local" else statistics.median(laps[side]) / local
        report.add(
            what, values, "ms", ratio=ratio, against="" if side == "local" else "x the time of local transformers"
        )

    add(f"swarm: {len(swarm.hosts)} hosts, {'float32' if options.quant == 'none' else options.quant} weights", "swarm")
    add(f"local transformers, float32, {threads}", "local")
    add(f"local transformers, float32, {everyone} threads", "all")
    report.add("largest difference of a logit from the local one", [apart], "")
    report.notes.append(
        f"Hosts and client are processes on this machine, each of {threads}, joined by real connections; "
        "the session is open before the clock starts. Sides measured in turn, each round with another prompt. "
        "Hosts that pass a prompt on in parts work at the same time: then they use as many cores as there are hosts."
    )
    return report


def _measure(
    model: Any, reference: Reference, options: BenchOptions, count: int, rounds: int, everyone: int
) -> tuple[dict[str, list[float]], float]:
    """Blocks. Seconds of each side, and how far apart the swarm's logits are from the local ones."""
    text = torch.tensor([reference.prompt(count + rounds)])
    found: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []

    def ids(number: int) -> torch.Tensor:
        """Another prompt every round: nothing kept of an earlier one can help."""
        return text[:, number : number + count]

    def swarm() -> None:
        cache.length = 0  # the session forgets what it holds: every round is the first
        with compute_threads(options.threads), torch.inference_mode():
            found.append(model(ids(len(found)), past_key_values=cache, logits_to_keep=1).logits[:, -1])

    def local() -> None:
        expected.append(reference.prefill(ids(len(expected)), threads=options.threads))

    with model.inference_session(max_length=count) as cache:
        swarm()  # opens the session, warms the hosts
        local()
        laps = alternate(
            rounds,
            swarm=lambda: timed(swarm),
            local=lambda: timed(local),
            all=lambda: timed(lambda: reference.prefill(ids(len(expected) - 1), threads=everyone)),
        )
    return laps, max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
