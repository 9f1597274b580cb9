"""Forward and backward through spans: gradients are the whole model's, kept or recomputed; bad input is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swarmlm.actors.core.message import Call
from swarmlm.errors import BadStep, ContextTooLong, SwarmError, UnknownSession, WrongModel
from swarmlm.kernels.wire import from_wire, to_wire
from swarmlm.models.loading import decoder_layers, decoder_of
from swarmlm.models.passes import KEEP_SECONDS, Passes
from swarmlm.models.source import open_source
from swarmlm.models.span import Span, SpanJob
from swarmlm.protocol import Backward, Forward, decode, encode
from tests.tiny import HIDDEN, tiny_llama

KEY = b"k" * 16
MUCH = 2**30  # bytes


class Tiny:
    """A tiny llama, one span over all its blocks, and the same blocks inside the whole model."""

    def __init__(self, folder: Path) -> None:
        self.whole = tiny_llama(folder).requires_grad_(False)
        self.span = Span.load(open_source(str(folder)), 0, 4)
        layers = decoder_layers(self.whole)
        self._layers = list(layers)
        decoder_of(self.whole).norm = torch.nn.Identity()

    def local(
        self, hidden: torch.Tensor, grad: torch.Tensor, start: int, end: int, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, gradient at the input) by the family's own model and plain autograd."""
        leaf = hidden.clone().requires_grad_()
        decoder = decoder_of(self.whole)
        decoder.layers = torch.nn.ModuleList(self._layers[start:end])
        decoder.config.num_hidden_layers = end - start
        with torch.enable_grad():
            positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)
            given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
            output = decoder(inputs_embeds=leaf, **given).last_hidden_state
            output.backward(grad)
        assert leaf.grad is not None
        return output.detach(), leaf.grad

    def ask(self, kind: Any, start: int = 0, end: int = 4, **fields: Any) -> Any:
        tensors = {name: to_wire(value) if isinstance(value, torch.Tensor) else value for name, value in fields.items()}
        terms = {"model": self.span.name, "fingerprint": self.span.fingerprint, "start": start, "end": end}
        return kind(**(terms | tensors))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("models") / "tiny")


def sample(rows: int = 3, tokens: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden, grad)"""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, tokens, HIDDEN, generator=generator) for _ in range(2))  # type: ignore[return-value]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("start", "end"), [(0, 4), (1, 3), (2, 3), (3, 4)])
@pytest.mark.parametrize("keep", [None, KEY], ids=["recomputed", "kept"])
def test_gradients_equal_the_whole_model(tiny: Tiny, start: int, end: int, keep: bytes | None) -> None:
    passes, (hidden, grad) = Passes(tiny.span, MUCH), sample()
    output, expected = tiny.local(hidden, grad, start, end)
    done = passes.run(tiny.ask(Forward, start, end, hidden=hidden, keep=keep))
    assert done.kept == (keep is not None)
    close(from_wire(done.hidden), output)
    again = {} if keep else {"hidden": hidden}
    back = passes.run(tiny.ask(Backward, start, end, grad=grad, keep=keep, **again))
    close(from_wire(back.grad), expected)
    assert passes.kept_bytes == 0
    assert done.compute_ms > 0
    assert back.compute_ms > 0


@pytest.mark.parametrize("keep", [None, KEY], ids=["recomputed", "kept"])
def test_left_padded_rows(tiny: Tiny, keep: bytes | None) -> None:
    passes, (hidden, grad) = Passes(tiny.span, MUCH), sample()
    padding = (0, 2, 5)
    mask = (torch.arange(7) >= torch.tensor(padding)[:, None]).long()
    grad = grad * mask[:, :, None]  # a loss does not look at padding
    output, expected = tiny.local(hidden, grad, 0, 4, mask)
    done = passes.run(tiny.ask(Forward, hidden=hidden, padding=padding, keep=keep))
    back = passes.run(tiny.ask(Backward, hidden=hidden, grad=grad, padding=padding, keep=keep))
    real = mask.bool()
    close(from_wire(done.hidden)[real], output[real])
    close(from_wire(back.grad)[real], expected[real])
    for row, pads in enumerate(padding):  # and a padded row is the same as the row alone
        alone = tiny.ask(Backward, hidden=hidden[row : row + 1, pads:].clone(), grad=grad[row : row + 1, pads:].clone())
        close(from_wire(back.grad)[row, pads:], from_wire(passes.run(alone).grad)[0])


def test_tensors_of_a_frame_stay_as_they_were(tiny: Tiny) -> None:
    """Those are views of memory that nobody may write."""
    hidden, grad = sample()
    header, segments = encode(Call(1, 9.0, tiny.ask(Backward, hidden=hidden, grad=grad)))
    received = decode(header, [memoryview(bytes(segment)) for segment in segments])
    before = [bytes(segment) for segment in segments]
    direct = Passes(tiny.span, 0).run(tiny.ask(Backward, hidden=hidden, grad=grad))
    assert Passes(tiny.span, 0).run(received.body).grad == direct.grad  # type: ignore[union-attr]
    assert [bytes(segment) for segment in segments] == before


def test_passes_and_sessions_share_a_span(tiny: Tiny) -> None:
    passes, (hidden, grad) = Passes(tiny.span, MUCH), sample(rows=1)
    cache = tiny.span.open(1, 16)
    steps = [tiny.span.run([SpanJob(cache, hidden[:, :4], 0)])[0]]
    done = passes.run(tiny.ask(Forward, hidden=hidden, keep=KEY))
    steps += [tiny.span.run([SpanJob(cache, hidden[:, at : at + 1], at)])[0] for at in range(4, 7)]
    back = passes.run(tiny.ask(Backward, grad=grad, keep=KEY))
    close(torch.cat(steps, dim=1), from_wire(done.hidden))
    close(from_wire(back.grad), tiny.local(hidden, grad, 0, 4)[1])


def test_a_kept_forward_serves_one_backward(tiny: Tiny) -> None:
    passes, (hidden, grad) = Passes(tiny.span, MUCH), sample()
    assert passes.run(tiny.ask(Forward, hidden=hidden, keep=KEY)).kept
    first = passes.run(tiny.ask(Backward, grad=grad, keep=KEY))
    with pytest.raises(UnknownSession, match="send its hidden states again"):
        passes.run(tiny.ask(Backward, grad=grad, keep=KEY))
    assert passes.run(tiny.ask(Backward, hidden=hidden, grad=grad, keep=KEY)).grad == first.grad


def test_kept_graphs_share_a_budget_and_the_oldest_goes_first(tiny: Tiny) -> None:
    hidden, grad = sample()
    measure = Passes(tiny.span, MUCH)
    measure.run(tiny.ask(Forward, hidden=hidden, keep=KEY))
    size = measure.kept_bytes
    inputs = hidden.nbytes
    assert 4 * 4 * inputs < size < 4 * 60 * inputs  # four blocks of a few states each, without the weights
    passes = Passes(tiny.span, 2 * size)
    keys = [bytes([number]) * 16 for number in range(3)]
    for key in keys:
        assert passes.run(tiny.ask(Forward, hidden=hidden, keep=key)).kept
        assert passes.kept_bytes <= 2 * size
    with pytest.raises(UnknownSession):
        passes.run(tiny.ask(Backward, grad=grad, keep=keys[0]))
    for key in keys[1:]:
        passes.run(tiny.ask(Backward, grad=grad, keep=key))
    assert passes.kept_bytes == 0


def test_a_graph_over_the_budget_is_not_kept(tiny: Tiny) -> None:
    hidden, _ = sample()
    plain = Passes(tiny.span, 0).run(tiny.ask(Forward, hidden=hidden, keep=KEY))
    assert not plain.kept
    small = Passes(tiny.span, 1000)
    for _ in range(2):  # the second time it is known beforehand
        done = small.run(tiny.ask(Forward, hidden=hidden, keep=KEY))
        assert (done.kept, small.kept_bytes) == (False, 0)
        close(from_wire(done.hidden), from_wire(plain.hidden))


def test_kept_graphs_go_when_nobody_comes_back(tiny: Tiny) -> None:
    now = 0.0
    passes, (hidden, grad) = Passes(tiny.span, MUCH, clock=lambda: now), sample()
    passes.run(tiny.ask(Forward, hidden=hidden, keep=KEY))
    now = KEEP_SECONDS - 1
    passes.expire()
    assert passes.kept_bytes > 0
    now = KEEP_SECONDS
    with pytest.raises(UnknownSession):
        passes.run(tiny.ask(Backward, grad=grad, keep=KEY))
    assert passes.kept_bytes == 0


def test_a_pass_works_inside_inference_mode(tiny: Tiny) -> None:
    """The caller's thread may have run steps before."""
    passes, (hidden, grad) = Passes(tiny.span, MUCH), sample()
    with torch.inference_mode():
        passes.run(tiny.ask(Forward, hidden=hidden, keep=KEY))
        passes.run(tiny.ask(Backward, grad=grad, keep=KEY))


def test_half_precision_travels_as_it_is(tiny: Tiny) -> None:
    passes, (hidden, grad) = Passes(tiny.span, MUCH), sample()
    back = passes.run(tiny.ask(Backward, hidden=hidden.bfloat16(), grad=grad.bfloat16()))
    expected = tiny.local(hidden.bfloat16().float(), grad.bfloat16().float(), 0, 4)[1]
    close(from_wire(back.grad), expected)


def bad(kind: Any, error: type[SwarmError], match: str, **changes: Any) -> Any:
    return pytest.param(kind, error, match, changes, id=f"{kind.__name__}-{match[:20]}")


NAN = functools.partial(torch.full, (3, 7, HIDDEN), float("nan"))


@pytest.mark.parametrize(
    ("kind", "error", "match", "changes"),
    [
        bad(Forward, WrongModel, "serves tiny", model="other"),
        bad(Forward, WrongModel, "serves tiny", fingerprint="f00"),
        bad(Forward, WrongModel, "not 0:5", end=5),
        bad(Backward, WrongModel, "not 2:2", start=2, end=2),
        bad(Forward, BadStep, r"\(3, 7\) instead of \(rows, tokens, 32\)", hidden=torch.zeros(3, 7)),
        bad(Forward, BadStep, r"\(3, 7, 31\)", hidden=torch.zeros(3, 7, 31)),
        bad(Forward, BadStep, r"\(0, 7, 32\)", hidden=torch.zeros(0, 7, HIDDEN)),
        bad(Forward, BadStep, "dtype int64", hidden=torch.zeros(3, 7, HIDDEN, dtype=torch.int64)),
        bad(Forward, BadStep, "hidden states that are not finite", hidden=NAN()),
        bad(Backward, BadStep, "gradients that are not finite", grad=NAN()),
        bad(Forward, BadStep, "padding", padding=(1, 2)),
        bad(Forward, BadStep, "padding", padding=(1, 2, 7)),
        bad(Forward, ContextTooLong, "65 tokens", hidden=torch.zeros(1, 65, HIDDEN)),
        bad(Forward, BadStep, "4200 tokens|70 rows", hidden=torch.zeros(70, 60, HIDDEN)),
        bad(Backward, BadStep, "70 rows of 60", grad=torch.zeros(70, 60, HIDDEN)),
        bad(Backward, BadStep, r"gradients of shape \(3, 6, 32\)", grad=torch.zeros(3, 6, HIDDEN)),
        bad(Backward, UnknownSession, "again", hidden=None),
        bad(Backward, UnknownSession, "again", hidden=None, keep=KEY),
        bad(Forward, BadStep, "no prompts", prompts=torch.zeros(4, 2, HIDDEN)),
        bad(Forward, BadStep, "adapters", adapter="mine"),
        bad(Backward, BadStep, "codecs", codec="int8"),
    ],
)
def test_bad_input_is_refused(
    tiny: Tiny, kind: Any, error: type[SwarmError], match: str, changes: dict[str, Any]
) -> None:
    hidden, grad = sample()
    fields = {"hidden": hidden} | ({"grad": grad} if kind is Backward else {}) | changes
    with pytest.raises(error, match=match):
        Passes(tiny.span, MUCH).run(tiny.ask(kind, **fields))


@pytest.mark.parametrize(
    "change",
    [
        lambda grad: {"grad": grad, "start": 1},
        lambda grad: {"grad": grad[:, :3].clone()},
    ],
    ids=["blocks", "shape"],
)
def test_a_kept_graph_is_used_for_what_it_was_kept_for(
    tiny: Tiny, change: Callable[[torch.Tensor], dict[str, Any]]
) -> None:
    passes, (hidden, grad) = Passes(tiny.span, MUCH), sample()
    passes.run(tiny.ask(Forward, hidden=hidden, keep=KEY))
    with pytest.raises(BadStep, match="kept"):
        passes.run(tiny.ask(Backward, keep=KEY, **change(grad)))
    passes.run(tiny.ask(Backward, keep=KEY, grad=grad))
