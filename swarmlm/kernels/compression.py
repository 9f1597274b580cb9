"""Hidden states on the wire in fewer bytes: the codecs of `protocol.Codec`. Used by whoever builds or reads a `Step`.

| codec    | bytes a value | largest error of a value x              | refuses (sends unchanged)        |
|----------|---------------|-----------------------------------------|----------------------------------|
| none     | its own       | 0                                       |                                  |
| float16  | 2             | 2^-11 |x|, and 2^-25 where |x| < 2^-14  | |x| > 65504, inf, NaN            |
| bfloat16 | 2             | 2^-8 |x|                                | |x| over about 2^128, inf, NaN   |
| int8     | 1 + 2/32      | max |x| in its block of 32, over 253    | |x| over about 2^127, inf, NaN   |

A tensor that a codec refuses travels unchanged, as "none" would send it: the dtype on the wire tells, so `decompress`
needs no flag. Nothing finite becomes infinite or the reverse.

int8 packs each row of `hidden` values into one row of uint8, so that one wire tensor carries it:

    [hidden codes, int8] [one bfloat16 scale, little-endian, for each block of 32 codes; the last block may be shorter]

Scales are bfloat16 because they need range and no precision: a gradient of 1e-7 and a hidden state of 22,453 (layer 20
of SmolLM2) must both survive, and codes are rounded against the scale as it is stored, so its rounding costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F

from swarmlm.errors import BadStep
from swarmlm.kernels.backend import runs_triton
from swarmlm.kernels.wire import from_wire, to_wire
from swarmlm.protocol import ITEM_BYTES, MAX_DIMS, Codec, DType, Tensor

BLOCK = 32  # values that share a scale: 6 % of overhead, and an outlier coarsens only 31 neighbours
SCALE_BYTES = 2  # bytes of a bfloat16
TOP_CODE = 127  # largest code; -128 is not used, so that codes are symmetric
PER_CODE = 1 / TOP_CODE  # multiplied, not divided by: CPUs and GPUs round a product alike
MIN_SCALE = 2.0**-126  # smallest normal float32: the reciprocal of a smaller one can be infinite
MAX_SCALE = 2.0**120  # so that 127 x scale stays finite in float32

CHUNK = 2**19  # values packed at once: bounds the temporaries to a few MB, which malloc keeps instead of mapping anew

_HALVES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def compress(tensor: torch.Tensor, codec: Codec) -> Tensor:
    """The wire form of `tensor`: float32, float16 or bfloat16, 0 to 4 dimensions, the last one is the hidden size.

    With "none" (and where a codec refuses) the tensor's memory may be lent, as `to_wire` does. Raises `BadStep` for a
    codec that does not exist and for a dtype that cannot be compressed.
    """
    if codec == "none":
        return to_wire(tensor)
    if tensor.dtype not in _FLOATS:
        raise BadStep(f"{str(tensor.dtype).removeprefix('torch.')} tensors cannot be compressed: send them as they are")
    tensor = tensor.detach()
    if codec in _HALVES:
        return to_wire(_halved(tensor, _HALVES[codec]))
    if codec != "int8":
        raise BadStep(f"there is no codec {codec!r}: use none, float16, bfloat16 or int8")
    if tensor.ndim == 0 or tensor.numel() == 0:
        return to_wire(tensor)
    if runs_triton(tensor):
        from swarmlm.kernels import compression_triton

        packed = compression_triton.pack_int8(tensor).cpu()
    else:
        packed = pack_int8(tensor).cpu()
    return to_wire(packed if is_exact_enough(packed, tensor.shape[-1]) else tensor)


def decompress(wire: Tensor, codec: Codec, device: torch.device | None = None) -> torch.Tensor:
    """A float32 tensor of the shape that was compressed with `codec`, on `device` (None: the CPU).

    It may be the message's own memory: do not write into it. Raises `BadStep` for what `codec` never sends.
    """
    tensor = from_wire(wire)
    if device is not None:
        tensor = tensor.to(device)
    if tensor.dtype in _FLOATS:
        return tensor.float()
    if codec != "int8" or tensor.dtype != torch.uint8 or not 1 <= tensor.ndim <= MAX_DIMS:
        raise BadStep(f"a tensor of dtype {wire.dtype} and shape {wire.shape} is nothing that codec {codec!r} sends")
    if runs_triton(tensor):
        from swarmlm.kernels import compression_triton

        return compression_triton.unpack_int8(tensor)
    return unpack_int8(tensor)


def compressed_bytes(shape: Sequence[int], codec: Codec, dtype: DType = "float32") -> int:
    """Bytes of a tensor of `shape` and `dtype` on the wire, without the frame, if the codec does not refuse it."""
    if codec == "int8" and shape and prod(shape):
        return prod(shape[:-1]) * packed_size(shape[-1])
    return prod(shape) * (ITEM_BYTES[codec] if codec in _HALVES else ITEM_BYTES[dtype])


def packed_size(hidden: int) -> int:
    """Bytes of a row of `hidden` values in int8."""
    return hidden + SCALE_BYTES * -(-hidden // BLOCK)


def hidden_size(packed: int) -> int:
    """The row length whose `packed_size` is `packed`. Raises `BadStep` if there is none."""
    hidden = packed - SCALE_BYTES * -(-packed // (BLOCK + SCALE_BYTES))
    if hidden < 1 or packed_size(hidden) != packed:
        raise BadStep(f"{packed} bytes are no row of int8 codes and scales")
    return hidden


def pack_int8(values: torch.Tensor) -> torch.Tensor:
    """[..., hidden] of any float dtype -> [..., packed_size(hidden)] uint8. Check it with `is_exact_enough`."""
    hidden = values.shape[-1]
    rows = values.reshape(-1, hidden)
    packed = values.new_empty((len(rows), packed_size(hidden)), dtype=torch.uint8)
    at_once = max(1, CHUNK // hidden)
    for first in range(0, len(rows), at_once):
        _pack_rows(rows[first : first + at_once], packed[first : first + at_once])
    return packed.view(*values.shape[:-1], -1)


def _pack_rows(rows: torch.Tensor, packed: torch.Tensor) -> None:
    hidden = rows.shape[-1]
    padded = F.pad(rows, (0, -hidden % BLOCK)) if hidden % BLOCK else rows
    blocks = padded.float().view(len(rows), -1, BLOCK)
    scales = (blocks.abs().amax(-1) * PER_CODE).clamp_min_(MIN_SCALE).bfloat16()
    codes = (blocks * scales.float().reciprocal_().unsqueeze(-1)).round_().flatten(1)
    packed[:, :hidden].view(torch.int8).copy_(codes[:, :hidden])
    packed[:, hidden:] = scales.view(torch.uint8)


def unpack_int8(packed: torch.Tensor) -> torch.Tensor:
    """[..., packed_size(hidden)] uint8 -> [..., hidden] float32. Raises `BadStep` for a width that no row packs to."""
    hidden = hidden_size(packed.shape[-1])
    codes = packed[..., :hidden].view(torch.int8)
    padded = F.pad(codes, (0, -hidden % BLOCK)) if hidden % BLOCK else codes
    blocks = padded.float().view(*packed.shape[:-1], -1, BLOCK)
    values = blocks.mul_(packed_scales(packed, hidden).unsqueeze(-1)).flatten(-2)
    return values[..., :hidden].contiguous()


def packed_scales(packed: torch.Tensor, hidden: int) -> torch.Tensor:
    """[..., blocks] float32: the scales at the end of each packed row."""
    return packed[..., hidden:].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()


def is_exact_enough(packed: torch.Tensor, hidden: int) -> bool:
    """False if a row held values that int8 cannot carry: infinite, not a number, or too large."""
    return packed_scales(packed, hidden).amax().item() <= MAX_SCALE  # a NaN is not


def _halved(tensor: torch.Tensor, half: torch.dtype) -> torch.Tensor:
    """`tensor` in `half`, or unchanged if a value is not finite or does not fit."""
    if tensor.dtype == half or tensor.numel() == 0:
        return tensor
    low, high = torch.aminmax(tensor)  # NaN if any value is
    top = torch.finfo(half).max
    return tensor.to(half) if low.item() >= -top and high.item() <= top else tensor
