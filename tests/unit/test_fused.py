"""Packed weights, int8 and the fast path, each against the family's own code on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from swarmlm.kernels.attention import ragged_decode_attention
from swarmlm.kernels.int8 import KERNEL_ROWS, Int8Linear, quantize
from swarmlm.kernels.linear import ROW_COUNTS, SKINNY_ROWS, PackedLinear, filled, skinny_product
from swarmlm.models import fused, packing
from swarmlm.models.fused import FusedBlocks
from swarmlm.models.loading import decoder_layers
from swarmlm.models.packing import FusedPart, pack_linears
from swarmlm.models.selfcheck import differs, sample
from swarmlm.models.source import open_source
from swarmlm.models.span import Span, SpanJob
from tests.tiny import HIDDEN, LAYERS, save_tiny

ROWS = (1, 3, 4, 9, ROW_COUNTS[-1] + 5, KERNEL_ROWS, KERNEL_ROWS + 1, 70)


def weight(rows: int = 48, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
def test_packed_products_are_the_usual_ones(rows: int, bias: bool) -> None:
    shift = torch.randn(48) if bias else None
    packed = PackedLinear(weight(), shift)
    given = torch.randn(1, rows, 64)
    exact = nn.functional.linear(given.double(), weight().double(), shift.double() if shift is not None else None)
    assert torch.allclose(packed(given).double(), exact, atol=1e-5)
    assert packed(given).shape == (1, rows, 48)
    assert torch.equal(packed.dense(), weight())


def test_products_are_computed_for_few_row_counts() -> None:
    """Each count costs memory for good."""
    assert {filled(torch.ones(rows, 2)).shape[0] for rows in range(1, ROW_COUNTS[-1] + 1)} == set(ROW_COUNTS)
    assert float(filled(torch.ones(5, 2)).sum()) == 5 * 2


@pytest.mark.parametrize("make", [PackedLinear, Int8Linear])
def test_gradients_reach_the_input_of_a_frozen_product(make: Any) -> None:
    linear = make(weight())
    given = torch.randn(2, 3, 64, requires_grad=True)
    linear(given).square().sum().backward()
    dense = linear.dense()
    expected = 2 * (linear(given).detach() @ dense)
    assert given.grad is not None
    assert torch.allclose(given.grad, expected, atol=1e-3)


@pytest.mark.parametrize("rows", ROWS)
def test_int8_products_are_within_the_rounding_of_weights_and_activations(rows: int) -> None:
    linear = Int8Linear(weight(), torch.ones(48))
    given = torch.randn(rows, 64)
    exact = nn.functional.linear(given.double(), linear.dense().double(), torch.ones(48).double())
    allowed = 2**-7 * float((given.abs() @ linear.dense().abs().t()).max())  # bfloat16 in, bfloat16 out
    assert float((linear(given).double() - exact).abs().max()) <= allowed
    assert linear.nbytes == 48 * 64 + 48 * 2


def test_int8_codes_are_half_a_step_off_at_most() -> None:
    codes, scales = quantize(torch.cat((weight(), torch.zeros(1, 64))))
    steps = scales.float()[:, None]
    assert float(((codes[:-1] * steps[:-1]) - weight()).abs().div(steps[:-1]).max()) <= 0.75  # a scale rounds, too
    assert not codes[-1].any()


@pytest.mark.parametrize("rows", range(1, SKINNY_ROWS + 1))
def test_skinny_products_are_the_usual_ones(rows: int) -> None:
    given = torch.randn(rows, 64)
    assert torch.allclose(skinny_product(given, weight()), nn.functional.linear(given, weight()), atol=1e-5)


# ---- whole spans -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["packed", "dense"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a machine may prefer: here the choice is made for it."""
    monkeypatch.setattr(packing, "packing_pays", lambda weight: request.param == "packed")
    return str(request.param)


LLAMA = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "llama": LLAMA,
    "llama, biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama, one head a key": LLAMA | {"num_key_value_heads": 4},
    "llama, scaled angles": LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "mistral": LLAMA | {"sliding_window": None},
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_path_computes_what_the_family_does(family: str, layout: str, tmp_path: Path) -> None:
    source = open_source(str(save_tiny(tmp_path, family.split(",")[0], **FAMILIES[family])))
    generic = Span.load(source, 1, LAYERS, fast=False)
    fast = Span.load(source, 1, LAYERS)
    assert fast.fast
    assert not generic.fast
    attention: Any = decoder_layers(fast._model)[0].self_attn
    assert isinstance(attention.q_proj, FusedPart)
    assert isinstance(attention.o_proj, PackedLinear) == (layout == "packed")
    assert not differs(sample(fast), sample(generic), torch.float32)
    fast._fused = None  # packed weights, but the family's own code
    assert not differs(sample(fast), sample(generic), torch.float32)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", LLAMA | {"sliding_window": 8}),
        ("llama", LLAMA | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        ("llama", LLAMA | {"hidden_act": "gelu"}),
        ("granite", LLAMA),
        ("gpt2", {"n_head": 4}),
    ],
)
def test_other_shapes_keep_the_generic_path(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = open_source(str(save_tiny(tmp_path, family, **changes)))
    span = Span.load(source, 0, LAYERS)
    assert not span.fast
    assert not differs(sample(span), sample(Span.load(source, 0, LAYERS, fast=False)), torch.float32)


def test_a_fast_path_that_is_wrong_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(save_tiny(tmp_path, "llama", **LLAMA)))
    right = FusedBlocks.run
    monkeypatch.setattr(FusedBlocks, "run", lambda self, *rest: right(self, *rest) * 1.001)
    assert not Span.load(source, 0, LAYERS).fast


def test_packing_that_is_wrong_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(save_tiny(tmp_path, "llama", **LLAMA)))
    monkeypatch.setattr(packing, "packing_pays", lambda weight: True)
    right = PackedLinear.product
    monkeypatch.setattr(PackedLinear, "product", lambda self, given: right(self, given) * 1.001)
    span = Span.load(source, 0, LAYERS)
    assert not span.fast
    assert not differs(sample(span), sample(Span.load(source, 0, LAYERS, fast=False)), torch.float32)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_int8_spans_are_small_and_close(family: str, tmp_path: Path) -> None:
    source = open_source(str(save_tiny(tmp_path, family, **LLAMA)))
    usual, small = Span.load(source, 0, LAYERS), Span.load(source, 0, LAYERS, quant="int8")
    assert small.weight_bytes < 0.4 * usual.weight_bytes
    assert not differs(sample(small), sample(usual), torch.float32, rough=True)
    assert differs(sample(small), sample(usual), torch.float32)


@pytest.mark.parametrize("family", ["llama", "llama, one head a key"])
def test_one_kernel_for_a_decode_batch_sees_what_a_session_at_a_time_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of GPUs, with the kernel's reference."""
    source = open_source(str(save_tiny(tmp_path, "llama", **FAMILIES[family])))
    span = Span.load(source, 0, LAYERS)
    expected = sample(span)
    calls: list[int] = []

    def together(*arguments: Any) -> torch.Tensor:
        calls.append(len(arguments[1]))
        return ragged_decode_attention(*arguments)

    monkeypatch.setattr(fused, "runs_triton", lambda hidden: True)
    monkeypatch.setattr(fused, "ragged_decode_attention", together)
    assert not differs(sample(span), expected, torch.float32)
    assert calls == [3] * LAYERS


def test_many_sessions_in_one_pass_are_what_each_is_alone(tmp_path: Path) -> None:
    """Decode steps, a prompt's slice, a padded pair and a rolled-back session in one pass."""
    source = open_source(str(save_tiny(tmp_path, "llama", **LLAMA)))
    span = Span.load(source, 0, LAYERS)
    generator = torch.Generator().manual_seed(1)

    def tokens(rows: int, count: int) -> torch.Tensor:
        return torch.randn(rows, count, HIDDEN, generator=generator)

    batches, lengths, paddings = (1, 2, 1, 1), (3, 5, 9, 1), ((), (0, 3), (), ())
    starts = [tokens(rows, length) for rows, length in zip(batches, lengths, strict=True)]
    nexts = [tokens(1, 1), tokens(2, 1), tokens(1, 6), tokens(1, 1)]
    places = (3, 5, 4, 1)

    def begun() -> list[Any]:
        caches = [span.open(rows, 16) for rows in batches]
        for cache, start, padding in zip(caches, starts, paddings, strict=True):
            span.run([SpanJob(cache, start, 0, padding)])
        return caches

    def jobs() -> list[SpanJob]:
        return [SpanJob(*job) for job in zip(begun(), nexts, places, paddings, strict=True)]

    together = span.run(jobs())
    for one, job in zip(together, jobs(), strict=True):
        assert torch.allclose(one, span.run([job])[0], atol=1e-5)


def test_pack_linears_counts_bytes() -> None:
    layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 4, bias=False), nn.LayerNorm(4))])
    assert pack_linears(layers, "int8") == 8 * 4 + 4 * 2 + 2 * 4 * 4


@pytest.mark.parametrize(("family", "wrong"), [("jamba", True), ("qwen3_next", False)])
def test_families_that_forget_their_state_are_given_a_token_at_a_time(family: str, wrong: bool, tmp_path: Path) -> None:
    """transformers' jamba ignores its recurrent state when several tokens follow a prefix."""
    more: dict[str, Any] = {
        "jamba": {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        "qwen3_next": {
            "head_dim": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    }
    span = Span.load(open_source(str(save_tiny(tmp_path, family, **LLAMA, **more[family]))), 0, LAYERS)
    assert span._one_by_one == wrong
    tokens = torch.randn(1, 24, HIDDEN, generator=torch.Generator().manual_seed(1))
    [whole] = span.run([SpanJob(span.open(1, 32), tokens, 0)])
    cache = span.open(1, 32)
    parts = [span.run([SpanJob(cache, tokens[:, start:end], start)])[0] for start, end in ((0, 16), (16, 23), (23, 24))]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4 * float(whole.abs().max()))
