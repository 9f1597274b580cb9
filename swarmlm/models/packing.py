"""After loading: a span's linear layers in the layout they are computed in, those with one input fused into one.

Any family profits: only plain `nn.Linear` modules are replaced, by modules that compute the same. Where a family calls
q, k and v (or gate and up) one after another on the same tensor, the first call computes all, and the others take their
part of it; the fast path of `models.fused` calls the fused product itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from swarmlm.config import Quant
from swarmlm.kernels.int8 import Int8Linear
from swarmlm.kernels.linear import PackedLinear, packing_pays

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # children that are given the same tensor

Maker = Callable[[torch.Tensor, torch.Tensor | None], nn.Module]


class FusedLinear(nn.Module):
    """Several linear layers over one input as one product; `sizes` are their output features, in order."""

    def __init__(self, product: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.product = product
        self.sizes = sizes
        self._last: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.product(given)
        return output

    def part(self, given: torch.Tensor, index: int) -> torch.Tensor:
        """Output `index`. The others are kept until the last one is taken or another input comes."""
        if self._last is None or self._last[0] is not given:
            parts = self.product(given).split(self.sizes, dim=-1)
            if torch.is_grad_enabled():
                parts = tuple(part.clone() for part in parts)  # families may write into them, autograd forbids views
            self._last = (given, parts)
        output = self._last[1][index]
        if index == len(self.sizes) - 1:
            self._last = None
        return output

    def forget(self) -> None:
        """After a pass that failed in the middle."""
        self._last = None


class FusedPart(nn.Module):
    """One of the layers of a `FusedLinear`, in its old place."""

    def __init__(self, fused: FusedLinear, index: int) -> None:
        super().__init__()
        self.fused = fused
        self._index = index
        self.out_features = fused.sizes[index]

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.fused.part(given, self._index)


def pack_linears(layers: nn.Module, quant: Quant = "none") -> int:
    """Replace the linear layers in `layers`: by int8 ones if asked, else by packed ones where this machine gains.

    Returns the bytes of all weights of `layers` afterwards.
    """
    make = _maker(layers, quant)
    for layer in layers.children():  # one after another: never more than one layer's weights twice
        for module in list(layer.modules()):
            _replace(module, make)
    packed = sum(module.nbytes for module in layers.modules() if isinstance(module, PackedLinear | Int8Linear))
    return packed + sum(weight.nbytes for weight in layers.parameters())


def _replace(module: nn.Module, make: Maker) -> None:
    for names in TOGETHER:
        _fuse(module, names, make)
    if make is not _dense:
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, make(child.weight, child.bias))


def _maker(layers: nn.Module, quant: Quant) -> Maker:
    if quant == "int8":
        return Int8Linear
    linears = [module for module in layers.modules() if type(module) is nn.Linear]
    largest = max(linears, key=lambda linear: linear.weight.numel(), default=None)
    if largest is not None and packing_pays(largest.weight):
        return PackedLinear
    return _dense


def _dense(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _fuse(module: nn.Module, names: tuple[str, ...], make: Maker) -> None:
    found: list[Any] = [getattr(module, name, None) for name in names]
    if any(type(linear) is not nn.Linear for linear in found):
        return
    if len({(linear.in_features, linear.bias is None) for linear in found}) != 1:
        return
    weight = torch.cat([linear.weight.detach() for linear in found])
    bias = torch.cat([linear.bias.detach() for linear in found]) if found[0].bias is not None else None
    fused = FusedLinear(make(weight, bias), [linear.out_features for linear in found])
    for index, name in enumerate(names):
        setattr(module, name, FusedPart(fused, index))
