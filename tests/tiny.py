"""Tiny random checkpoints, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HIDDEN = 32
LAYERS = 4
SMALL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


def save_tiny(folder: Path, family: str, **changes: Any) -> Path:
    """A tiny random checkpoint of any family, float32, in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SMALL | changes))).float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)  # norms and biases that must not be forgotten
    model.save_pretrained(folder)
    return folder


def tiny_llama(folder: Path, *, layers: int = LAYERS, shard: str = "1GB", **changes: Any) -> Any:
    """Save one to `folder` (in shards of at most `shard`) and return it whole: float32, hidden size `HIDDEN`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields: dict[str, Any] = {
        **SMALL,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(fields | changes))).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)  # large enough for every block to matter
    model.save_pretrained(folder, max_shard_size=shard)
    return model
