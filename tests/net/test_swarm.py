"""The main promise, on the real model in real processes: the swarm's answer is the whole model's answer."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack

import pytest
import torch
import trio

import swarmlm
from tests.net.conftest import PROMPTS, Reference
from tests.net.harness import LocalSwarm

NEW_TOKENS = 64


async def greedy(session, ids: list[int], count: int = NEW_TOKENS) -> list[int]:
    async for _ in session.generate(ids, max_tokens=count):
        pass
    return list(session.last.tokens)


@pytest.mark.parametrize("spans", [("0:10", "10:20", "20:30"), ("0:18", "12:30")], ids=["three", "overlapping"])
async def test_greedy_tokens_equal_local_transformers(
    swarm: LocalSwarm, reference: Reference, spans: tuple[str, ...]
) -> None:
    swarm.serve_spans(*spans)
    async with swarmlm.open_node(swarm.addresses) as node:
        for prompt in PROMPTS:
            ids = reference.chat_ids(prompt)
            async with node.session("smollm2", max_length=len(ids) + NEW_TOKENS) as session:
                tokens = await greedy(session, ids)
                assert [(hop.start, hop.end) for hop in session.route()][-1][1] == 30
                assert len(session.route()) == len(spans)
            reference.assert_exact(ids, tokens, NEW_TOKENS)


async def test_eight_chats_at_once_are_exact_and_faster_together(pair: LocalSwarm, reference: Reference) -> None:
    prompts = [f"{prompt} ({number})" for number, prompt in enumerate([*PROMPTS, *PROMPTS[:3]])]
    async with swarmlm.open_node(pair.addresses) as node:
        async with node.session("smollm2", max_length=256) as session:
            await greedy(session, reference.chat_ids(prompts[0]), 8)
            await session.reset()
            started = time.perf_counter()
            alone = await greedy(session, reference.chat_ids(prompts[0]))
            one_rate = len(alone) / (time.perf_counter() - started)

        answers: dict[str, list[int]] = {}

        async def chat(prompt: str) -> None:
            async with node.session("smollm2", max_length=256) as session:
                answers[prompt] = await greedy(session, reference.chat_ids(prompt))

        started = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for prompt in prompts:
                nursery.start_soon(chat, prompt)
        rate = sum(map(len, answers.values())) / (time.perf_counter() - started)
    for prompt in prompts:
        reference.assert_exact(reference.chat_ids(prompt), answers[prompt], NEW_TOKENS)
    print(f"\none chat {one_rate:.1f} tokens/s, eight together {rate:.1f} tokens/s: {rate / one_rate:.2f}x")
    assert rate > one_rate


async def test_the_session_over_budget_is_refused_at_once_and_taken_after_one_ends(swarm: LocalSwarm) -> None:
    length = 256
    needed = 15 * length * 2 * 3 * 64 * 4  # blocks x tokens x (K and V) x heads x head size x bytes
    swarm.serve("--blocks", "0:15", "--kv-memory", str(3 * needed + 1000)).wait_ready()
    swarm.serve("--blocks", "15:30").wait_ready()
    async with swarmlm.open_node(swarm.addresses) as node:
        async with AsyncExitStack() as held:
            for _ in range(3):
                await held.enter_async_context(node.session("smollm2", max_length=length))
            started = time.perf_counter()
            with pytest.raises(swarmlm.PoolFull) as refused:
                await held.enter_async_context(node.session("smollm2", max_length=length))
            seconds = time.perf_counter() - started
            print(f"\nrefused after {seconds * 1e3:.0f} ms: {refused.value}")
            assert f"{needed:,}" in str(refused.value)
            assert refused.value.details["needed"] == needed
            assert refused.value.details["free"] == 1000
            assert seconds < 5
        async with node.session("smollm2", max_length=length) as session:
            assert session.failovers == 0


async def test_transformers_generate_over_the_swarm_equals_local(pair: LocalSwarm, reference: Reference) -> None:
    def both() -> None:
        model = swarmlm.AutoDistributedModelForCausalLM.from_pretrained("smollm2", initial_peers=pair.addresses)
        try:
            ids = reference.chat_ids(PROMPTS[1])
            out = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)
            reference.assert_exact(ids, out[0, len(ids) :].tolist(), 32)
            for seed in (0, 1):
                sampling = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.8, "top_k": 20}
                torch.manual_seed(seed)
                remote = model.generate(torch.tensor([ids]), **sampling)
                torch.manual_seed(seed)
                local = reference.model.generate(torch.tensor([ids]), **sampling)
                assert remote.tolist() == local.tolist()
        finally:
            model.close_swarm()

    await trio.to_thread.run_sync(both)
