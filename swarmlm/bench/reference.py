"""What the benchmarks compare with: the same checkpoint, whole, in this process, by transformers alone in float32."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from swarmlm.config import DEFAULT_MODEL
from swarmlm.models.embedded import HUB_NAME, embedded_gguf


class Reference:
    """Blocks while it works. Made and used in one thread at a time."""

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        embedded = embedded_gguf() if model == DEFAULT_MODEL else None
        path = embedded or Path(model).expanduser()
        if path.suffix == ".gguf":
            place: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        else:
            place = {"pretrained_model_name_or_path": HUB_NAME if model == DEFAULT_MODEL else str(model)}
        with _quiet():
            self.tokenizer: Any = AutoTokenizer.from_pretrained(**place)
            self.model: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()

    @property
    def weight_bytes(self) -> int:
        """Of all parameters, each counted once."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def prompt(self, count: int) -> list[int]:
        """`count` tokens of the shipped prose, over again if it is shorter."""
        ids = list(self.tokenizer(prose())["input_ids"])
        return (ids * (count // len(ids) + 1))[:count]

    def decode(self, ids: Sequence[int], count: int, *, threads: int) -> tuple[list[int], list[float]]:
        """Greedy: the new ids (fewer at an end of text) and the seconds between one and the next."""
        sink = _Arrivals()
        with compute_threads(threads):
            out = self.model.generate(
                torch.tensor([list(ids)]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=count,
                do_sample=False,
                streamer=sink,
            )
        return out[0, len(ids) :].tolist(), gaps(sink.times)

    def difference(self, ids: Sequence[int], expected: Sequence[int], found: Sequence[int]) -> tuple[int, float] | None:
        """Where two answers to `ids` first differ, and how far apart the reference's best two logits are there."""
        same = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
        if same is None:
            same = min(len(expected), len(found))
        if same == len(expected) == len(found):
            return None
        best = self.prefill(torch.tensor([[*ids, *expected[:same]]]), threads=1)[0].topk(2).values
        return same, float(best[0] - best[1])

    def prefill(self, ids: torch.Tensor, *, threads: int) -> torch.Tensor:
        """Logits of the last token of `ids` [1, n]: [1, vocabulary]."""
        with compute_threads(threads), torch.inference_mode():
            logits: torch.Tensor = self.model(ids, logits_to_keep=1, use_cache=True).logits[:, -1]
        return logits

    def read_weights(self, *, threads: int) -> float:
        """Seconds to read every weight once from memory: what no decode of one token can undercut."""
        with compute_threads(threads), torch.inference_mode():
            started = time.perf_counter()
            for parameter in self.model.parameters():
                parameter.sum()
            return time.perf_counter() - started


class _Arrivals:
    """A transformers streamer; the first put is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        return None


def gaps(times: Sequence[float]) -> list[float]:
    """Seconds between each moment and the one before."""
    return [later - earlier for earlier, later in pairwise(times)]


def prose() -> str:
    """The opening of Alice's Adventures in Wonderland (1865): some 1,600 tokens of plain English."""
    return files("swarmlm.bench").joinpath("text.txt").read_text()


@contextmanager
def compute_threads(count: int) -> Iterator[None]:
    """torch's thread count for a while. OpenMP keeps it by thread: enter it where the work is done."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers between ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
