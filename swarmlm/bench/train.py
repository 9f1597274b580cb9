"""`swarmlm bench train`: a forward and a backward through hosts against local autograd, all weights frozen.

What is trained sits before the blocks, as in prompt tuning: the gradient wanted is that of the loss with respect to the
input embeddings. Both sides compute the same loss of the same batch, in turn.
"""

from __future__ import annotations

import functools
import os
import statistics
from typing import Any

import torch
import trio

from swarmlm.bench.options import BenchOptions
from swarmlm.bench.reference import Reference, compute_threads
from swarmlm.bench.report import Report, timed
from swarmlm.bench.swarm import open_client_model, open_swarm
from swarmlm.errors import ConfigError

ROWS = 8  # of the batch
TOKENS = 128  # of a row
ROUNDS = 3

Gradients = dict[str, torch.Tensor]


async def run(options: BenchOptions) -> Report:
    tokens, rounds = options.tokens or TOKENS, options.repeats or ROUNDS
    async with open_swarm(options) as swarm, open_client_model(swarm) as model:
        limit = swarm.source.context_length
        if not 2 <= tokens <= limit:
            raise ConfigError(f"--tokens {tokens} is no row to train on: 2 to {limit} with this model")
        reference = await trio.to_thread.run_sync(Reference, options.model)
        ids = torch.tensor(reference.prompt(ROWS * tokens)).reshape(ROWS, tokens)
        reference.model.requires_grad_(False)
        with torch.no_grad():
            embeds = reference.model.get_input_embeddings()(ids)
        everyone = os.cpu_count() or 1
        sides: dict[str, Any] = {
            "swarm": functools.partial(_pass, model, embeds, ids, options.threads),
            "local": functools.partial(_pass, reference.model, embeds, ids, options.threads),
            "all": functools.partial(_pass, reference.model, embeds, ids, everyone),
        }
        both: dict[str, list[float]] = {side: [] for side in sides}
        forward: dict[str, list[float]] = {side: [] for side in sides}
        gradients: Gradients = {}
        await trio.to_thread.run_sync(functools.partial(_pass, model, embeds, ids, options.threads, backward=False))
        for number in range(rounds):
            options.progress(f"round {number + 1} of {rounds}")
            for side, one_pass in sides.items():
                forward[side].append(await trio.to_thread.run_sync(functools.partial(one_pass, backward=False)))
                keep = functools.partial(one_pass, keep=functools.partial(gradients.__setitem__, side))
                both[side].append(await trio.to_thread.run_sync(keep))
        hosts, name = len(swarm.hosts), swarm.source.name
    report = Report("train", f"Training through {name}: {ROWS} x {tokens} tokens, forward and backward, weights frozen")
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    names = {
        "swarm": f"swarm: {hosts} hosts",
        "local": f"local autograd, {threads}",
        "all": f"local autograd, {everyone} threads",
    }
    for what, found in (("forward and backward", both), ("forward alone", forward)):
        base = statistics.median(found["local"])
        for side, who in names.items():
            ratio = statistics.median(found[side]) / base
            report.add(f"{what}, {who}", found[side], "s", ratio=ratio, against="x the time of local autograd")
    expected = gradients["local"]
    difference = float((gradients["swarm"] - expected).norm() / expected.norm())
    report.add("difference of the gradients", [difference], "of their norm")
    report.notes.append(
        f"Hosts and client are processes on this machine, each of {threads}; hosts compute their forward again for the "
        "backward where they kept no graph. The gradient is that of the input embeddings."
    )
    return report


def _pass(
    model: Any, embeds: torch.Tensor, ids: torch.Tensor, threads: int, *, backward: bool = True, keep: Any = None
) -> float:
    """Seconds of one pass of `embeds` [rows, tokens, hidden]; `keep` is given their gradient."""
    given = embeds.clone().requires_grad_(backward)

    def work() -> None:
        with torch.set_grad_enabled(backward):
            loss = model(inputs_embeds=given, labels=ids, use_cache=False).loss
        if backward:
            loss.backward()

    with compute_threads(threads):
        seconds = timed(work)
    if keep is not None:
        keep(given.grad)
    return seconds
