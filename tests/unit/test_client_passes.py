"""Training a client model: its gradients through remote blocks are those of the whole model here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarmlm.errors import UsageError
from swarmlm.kernels.wire import from_wire, to_wire
from swarmlm.models.client import load_client_model
from swarmlm.models.passes import Passes
from swarmlm.models.source import open_source
from swarmlm.models.span import Span
from swarmlm.protocol import Backward, Forward
from tests.tiny import HIDDEN, tiny_llama
from tests.unit.local_session import LocalSession

IDS = torch.tensor([[5, 17, 9, 33, 60, 17, 9, 33], [8, 9, 70, 2, 40, 41, 42, 43]])


class LocalPasses:
    """`BlockingPasses` over spans in this process, by the messages that hosts get."""

    def __init__(self, spans: list[Span]) -> None:
        self.hosts = [(span, Passes(span, 0)) for span in spans]
        self.calls: list[str] = []

    def forward(
        self, hidden: torch.Tensor, padding: tuple[int, ...], *, differentiable: bool
    ) -> tuple[torch.Tensor, Any]:
        assert not hidden.requires_grad
        self.calls.append("forward" if differentiable else "evaluate")
        inputs = []
        for span, passes in self.hosts:
            inputs.append(hidden)
            terms = (span.name, span.fingerprint, span.start, span.end)
            hidden = from_wire(passes.run(Forward(*terms, to_wire(hidden), padding)).hidden)
        return hidden, (inputs, padding)

    def backward(self, tape: Any, grad: torch.Tensor) -> torch.Tensor:
        self.calls.append("backward")
        inputs, padding = tape
        for (span, passes), hidden in reversed(list(zip(self.hosts, inputs, strict=True))):
            terms = (span.name, span.fingerprint, span.start, span.end)
            grad = from_wire(passes.run(Backward(*terms, to_wire(grad), to_wire(hidden), padding)).grad)
        return grad


class Half:
    """A client model and the whole one."""

    def __init__(self, folder: str) -> None:
        source = open_source(folder)
        self.spans = [Span.load(source, 0, 1), Span.load(source, 1, 4)]
        self.passes = LocalPasses(self.spans)
        self.sessions = 0
        self.model = load_client_model(source, open_session=self.open, passes=self.passes)
        self.whole = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)

    def open(self, batch: int, max_length: int) -> LocalSession:
        self.sessions += 1
        return LocalSession(self.spans, batch, max_length)

    @property
    def both(self) -> tuple[Any, Any]:
        return self.model, self.whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(path)
    return str(path)


@pytest.fixture
def half(folder: str) -> Half:
    return Half(folder)


def close(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> None:
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def embeds() -> torch.Tensor:
    return torch.randn(2, 8, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_gradients_of_inputs_embeds(half: Half) -> None:
    given, losses = [], []
    for model in half.both:
        given.append(embeds())
        loss = model(inputs_embeds=given[-1], labels=IDS).loss
        loss.backward()
        losses.append(loss.detach())
    close(*losses)
    close(given[0].grad, given[1].grad)
    assert half.passes.calls == ["forward", "backward"]
    assert half.sessions == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(half: Half, side: str) -> None:
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    if side == "right":
        mask = mask.flip(1)
    labels = IDS.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    given, losses = [], []
    for model in half.both:
        given.append(embeds())
        loss = model(inputs_embeds=given[-1], attention_mask=mask, position_ids=positions, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
    close(*losses)
    close(given[0].grad[mask.bool()], given[1].grad[mask.bool()])  # type: ignore[index]


def test_a_mask_with_holes_is_refused(half: Half) -> None:
    mask = torch.ones_like(IDS)
    mask[0, 3] = 0
    with pytest.raises(UsageError, match="contiguous"):
        half.model(inputs_embeds=embeds(), attention_mask=mask)
    with pytest.raises(UsageError, match="only left padding"), torch.no_grad():
        half.model(IDS, attention_mask=mask)


def test_training_the_embeddings_and_the_head(half: Half) -> None:
    gradients = []
    for model in half.both:
        model.get_input_embeddings().weight.requires_grad_()
        model.get_output_embeddings().weight.requires_grad_()
        model.train()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([model.get_input_embeddings().weight.grad, model.get_output_embeddings().weight.grad])
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)


def test_a_soft_prompt_learns(half: Half) -> None:
    """The same steps of the same optimizer end at the same prompt."""
    prompts, losses = [], []
    for model in half.both:
        prompt = torch.nn.Parameter(embeds().detach()[:, :3])
        optimizer = torch.optim.SGD([prompt], lr=0.5)
        text = model.get_input_embeddings()(IDS)
        labels = torch.cat([torch.full((2, 3), -100), IDS], dim=1)
        history = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(inputs_embeds=torch.cat([prompt, text], dim=1), labels=labels).loss
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        prompts.append(prompt.detach())
        losses.append(history)
    close(*prompts)
    assert losses[0][-1] < losses[0][0] - 0.1
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_gradients_accumulate_over_batches(half: Half) -> None:
    given = []
    for model in half.both:
        given.append(embeds())
        losses = [model(inputs_embeds=given[-1], labels=labels).loss for labels in (IDS, IDS.flip(1))]
        sum(losses).backward()  # type: ignore[union-attr]
    close(given[0].grad, given[1].grad)


def test_without_gradients_nothing_is_differentiated(half: Half) -> None:
    with torch.no_grad():
        output = half.model(IDS, use_cache=False)
        close(output.logits, half.whole(IDS).logits)
    assert output.past_key_values is None
    assert half.passes.calls == ["evaluate"]
    half.model(IDS)  # nothing here is trainable: a session, as ever
    assert (half.passes.calls, half.sessions) == (["evaluate"], 1)


def test_generating_in_between_uses_sessions(half: Half) -> None:
    half.model.get_input_embeddings().weight.requires_grad_()
    expected = half.whole.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    assert torch.equal(half.model.generate(IDS[:1], max_new_tokens=6, do_sample=False), expected)
    assert (half.passes.calls, half.sessions) == ([], 1)
    half.model(IDS, labels=IDS).loss.backward()
    assert half.passes.calls == ["forward", "backward"]
    with half.model.inference_session(max_length=32):
        assert torch.equal(half.model.generate(IDS[:1], max_new_tokens=6, do_sample=False), expected)
    assert half.sessions == 2


def test_a_client_without_passes_is_as_before(folder: str) -> None:
    source = open_source(folder)
    spans = [Span.load(source, 0, 4)]
    model = load_client_model(source, open_session=lambda batch, length: LocalSession(spans, batch, length))
    given = embeds()
    output = model(inputs_embeds=given, use_cache=False)
    assert output.logits.shape == (2, 8, 96)
    assert not output.logits.requires_grad
