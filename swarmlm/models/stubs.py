"""Cutting a family's model down to a span: what is not ours becomes a stub, and our layers count from 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from swarmlm.models.loading import narrow_config


class _Stub(nn.Module):
    """Stands for a module before or after our blocks: its result is thrown away, only its shape must fit."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self._hidden_size = hidden_size

    def forward(self, given: Any = None, *_: Any, **__: Any) -> Any:
        if not isinstance(given, torch.Tensor) or (given.dim() == 3 and given.shape[-1] == self._hidden_size):
            return given
        return torch.zeros(1, 1, self._hidden_size, device=given.device)  # ids, or a mask that positions come from


def stub_all_but(model: Any, decoder: Any, layers: str, hidden_size: int) -> None:
    """Replace every module with weights outside the layers, from the top of the model down to the decoder."""
    chain = [module for module in model.modules() if any(part is decoder for part in module.modules())]
    for module in chain:
        for name, child in list(module.named_children()):
            keep = any(child is part for part in chain) or (module is decoder and name == layers)
            if not keep and next(child.parameters(), None) is not None:
                setattr(module, name, _Stub(hidden_size))
        for name, _ in list(module.named_parameters(recurse=False)):
            setattr(module, name, None)


def rebase(model: Any, layers: nn.ModuleList, start: int, end: int, blocks: int) -> None:
    """Make the family's code see a model of just our layers: indices from 0, per-layer lists of our length."""
    for module in layers.modules():
        for field in ("layer_idx", "layer_id", "layer_number"):
            if isinstance(index := getattr(module, field, None), int):
                setattr(module, field, index - start)
    narrow_config(model, start, end, blocks)
