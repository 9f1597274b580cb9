"""Between torch tensors and the tensors of messages, without copying where memory allows.

Used by whoever builds or reads a `Step`: the batcher on a host, the session on a client.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from swarmlm.actors.core.message import Blob
from swarmlm.errors import BadStep
from swarmlm.protocol import DType, Tensor

_NAMES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}
_TYPES: dict[str, torch.dtype] = {name: kind for kind, name in _NAMES.items()}


def to_wire(tensor: torch.Tensor) -> Tensor:
    """The message form of `tensor`, of any shape up to 4 dimensions.

    A contiguous CPU tensor lends its memory: do not write to it until the message has been sent. Others are copied.
    Raises `BadStep` for a dtype that does not travel.
    """
    name = _NAMES.get(tensor.dtype)
    if name is None:
        raise BadStep(
            f"{str(tensor.dtype).removeprefix('torch.')} tensors do not travel: use float32, float16, bfloat16"
        )
    if tensor.numel() == 0:
        return Tensor(name, tuple(tensor.shape), Blob(b""))
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return Tensor(name, tuple(tensor.shape), Blob(flat.view(torch.uint8).numpy().data))


def from_wire(tensor: Tensor) -> torch.Tensor:
    """A CPU tensor over the message's own memory, which it keeps alive: clone it before writing into it.

    Memory that is not aligned to the dtype is copied.
    """
    kind = _TYPES[tensor.dtype]
    if len(tensor.data) == 0:
        return torch.empty(tensor.shape, dtype=kind)
    raw = np.frombuffer(tensor.data.view, dtype=np.uint8)
    if raw.ctypes.data % kind.itemsize:
        raw = raw.copy()
    if not raw.flags.writeable:
        raw = np.asarray(_Lent(raw))
    return torch.from_numpy(raw).view(kind).reshape(tensor.shape)


class _Lent:
    """Read-only memory shown to torch as writable: torch has no read-only tensors and warns about each one."""

    def __init__(self, owner: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self._owner = owner
        self.__array_interface__ = {**owner.__array_interface__, "data": (owner.ctypes.data, False)}
