"""Every family through the same code: spans and client equal the whole model, on tiny random checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from swarmlm.models.client import load_client_model
from swarmlm.models.source import open_source
from swarmlm.models.span import Span, SpanJob
from tests.unit.local_session import LocalSession

TOLERANCE = 1e-4  # float32, of hidden states and logits
LAYERS = 4
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HEAD = {"head_dim": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "bloom": {"model_type": "bloom", "n_head": 4, "n_layer": LAYERS},
    "falcon-rotary": {"model_type": "falcon", "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-alibi": {"model_type": "falcon", "alibi": True, "new_decoder_architecture": False, "multi_query": True},
    "mixtral": {"model_type": "mixtral", **MOE},
    "mistral-window": {"model_type": "mistral", "sliding_window": 5},
    "gemma2-window": {"model_type": "gemma2", "sliding_window": 5, **HEAD},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 5, **HEAD},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", **HEAD},
    "qwen3_moe": {"model_type": "qwen3_moe", **MOE, **HEAD},
    "phi3": {"model_type": "phi3"},
    "olmo2": {"model_type": "olmo2"},
    "granite": {"model_type": "granite"},
    "gpt_oss": {"model_type": "gpt_oss", "sliding_window": 5, **MOE, **HEAD},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    "opt": {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {"model_type": "gpt_neox"},
    "cohere2": {"model_type": "cohere2", "sliding_window": 5, **HEAD},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_shared_experts": 1,
    },
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(directory, the whole model) of a family."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**(SMALL | FAMILIES[request.param]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.1)  # large enough for every block to matter
    folder = tmp_path_factory.mktemp("family") / request.param
    model.save_pretrained(folder)
    model.generation_config.eos_token_id = None
    return folder, model


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_spans_equal_the_whole_model(checkpoint: tuple[Path, Any], cut: int) -> None:
    folder, whole = checkpoint
    source = open_source(str(folder))
    spans = [Span.load(source, 0, cut), Span.load(source, cut, LAYERS)]
    client = load_client_model(source, open_session=lambda batch, length: LocalSession(spans, batch, length))
    client.generation_config.eos_token_id = None
    prompt = ids(2, 9)
    with torch.inference_mode():
        assert (client(prompt).logits - whole(prompt).logits).abs().max() < TOLERANCE
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(client.generate(prompt, **options), whole.generate(prompt, **options))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    padded = prompt.masked_fill(mask == 0, 0)
    assert torch.equal(
        client.generate(padded, attention_mask=mask, **options), whole.generate(padded, attention_mask=mask, **options)
    )


def test_sessions_of_different_lengths_step_together(checkpoint: tuple[Path, Any]) -> None:
    folder, _ = checkpoint
    source = open_source(str(folder))
    span = Span.load(source, 1, LAYERS)
    lengths = (3, 11, 7)
    together, alone = ([span.open(1, 32) for _ in lengths] for _ in range(2))
    for number, length in enumerate(lengths):
        prompt = hidden(span, length, number)
        for caches in (together, alone):
            span.run([SpanJob(caches[number], prompt, 0)])
    for turn in range(3):
        tokens = [hidden(span, 1, 10 * turn + number) for number in range(len(lengths))]
        jobs = [SpanJob(cache, token, cache.position) for cache, token in zip(together, tokens, strict=True)]
        outputs = span.run(jobs)
        for cache, token, output in zip(alone, tokens, outputs, strict=True):
            expected = span.run([SpanJob(cache, token, cache.position)])[0]
            assert (output - expected).abs().max() < TOLERANCE


def test_a_part_of_a_span_and_a_roll_back(checkpoint: tuple[Path, Any]) -> None:
    folder, _ = checkpoint
    span = Span.load(open_source(str(folder)), 0, LAYERS)
    whole, head, tail = span.open(1, 32), span.open(1, 32, end=2), span.open(1, 32, start=2)
    prompt, token, other = hidden(span, 8, 1), hidden(span, 1, 2), hidden(span, 2, 3)
    expected = span.run([SpanJob(whole, prompt, 0)])[0]
    between = span.run([SpanJob(head, prompt, 0)])[0]
    assert (span.run([SpanJob(tail, between, 0)])[0] - expected).abs().max() < TOLERANCE
    first = span.run([SpanJob(whole, token, 8)])[0]
    span.run([SpanJob(whole, other, 6)])
    span.run([SpanJob(whole, prompt[:, 6:], 6)])
    assert whole.position == 8
    assert (span.run([SpanJob(whole, token, 8)])[0] - first).abs().max() < TOLERANCE


def hidden(span: Span, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(1, tokens, span.hidden_size, generator=torch.Generator().manual_seed(seed))
