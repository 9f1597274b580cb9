"""Whether a tensor's device runs our Triton kernels, and where they are launched. Used by kernels with two versions.

Triton is an optional package (the `gpu` extra): it is imported by the *_triton modules only, and those by a kernel only
after `runs_triton` said yes.
"""

from __future__ import annotations

import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch

OLDEST = (7, 5)  # compute capability: our kernels compile for it (Turing, 2018), and Triton supports nothing older


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton(tensor: torch.Tensor) -> bool:
    """True for a tensor on a GPU that Triton compiles for, with Triton installed."""
    return tensor.is_cuda and triton_installed() and _new_enough(tensor.device)


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on torch's current GPU: inside this context that is `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _new_enough(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST
