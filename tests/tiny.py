"""A tiny random llama checkpoint, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HIDDEN = 32


def tiny_llama(folder: Path, *, layers: int = 4, shard: str = "1GB", **changes: Any) -> Any:
    """Save one to `folder` (in shards of at most `shard`) and return it whole: float32, hidden size `HIDDEN`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**(fields | changes))).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)  # large enough for every block to matter
    model.save_pretrained(folder, max_shard_size=shard)
    return model
