"""Training through nodes of 127.0.0.1: gradients are the whole model's, also when a host leaves before the backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import trio
from transformers import AutoModelForCausalLM

import swarmlm
from tests.tiny import HIDDEN, tiny_llama

IDS = torch.tensor([[5, 17, 9, 33, 60, 17, 9, 33]] * 4)
SECONDS = 60.0  # for the whole test; it takes three or so


async def test_a_soft_prompt_gets_its_gradient_over_a_swarm(tmp_path: Path) -> None:
    folder = str(tmp_path / "tiny")
    tiny_llama(Path(folder))
    whole = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    given = torch.randn(4, 8, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = given.clone().requires_grad_()
    whole(inputs_embeds=expected, labels=IDS).loss.backward()
    assert expected.grad is not None

    def train(peers: list[str], leave: Any) -> list[torch.Tensor]:
        client = swarmlm.AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=peers)
        gradients = []
        for before_backward in (lambda: None, leave):
            embeds = given.clone().requires_grad_()
            loss = client(inputs_embeds=embeds, labels=IDS).loss
            before_backward()
            loss.backward()
            assert embeds.grad is not None
            gradients.append(embeds.grad)
        client.close_swarm()
        return gradients

    async def host(peers: list[str], scope: trio.CancelScope, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        with scope:
            async with swarmlm.open_node(peers) as node:
                await node.host(folder, blocks=range(1, 4))
                task_status.started()
                await trio.sleep_forever()

    with trio.fail_after(SECONDS):
        async with swarmlm.open_node() as node, trio.open_nursery() as nursery:
            await node.host(folder, blocks=range(0, 1))
            wide, scope = trio.CancelScope(), trio.CancelScope()
            await nursery.start(host, node.addresses, wide)

            async def swap() -> None:
                await nursery.start(host, node.addresses, scope)
                wide.cancel()

            def leave() -> None:
                trio.from_thread.run(swap)

            gradients = await trio.to_thread.run_sync(train, node.addresses, leave)
            scope.cancel()
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected.grad, rtol=1e-3, atol=1e-6)
