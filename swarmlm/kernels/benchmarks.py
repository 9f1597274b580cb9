"""How fast the kernels are, each beside its plain alternative in the same run: `python -m swarmlm.kernels.benchmarks`.

On a machine with a GPU the Triton kernels are measured on it; else the references, on the CPU. May be called by
whoever shows benchmarks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from swarmlm.kernels import quant_reference
from swarmlm.kernels.attention import ragged_decode_attention
from swarmlm.kernels.backend import triton_installed
from swarmlm.kernels.compression import compress, compressed_bytes, decompress
from swarmlm.protocol import Codec

ROUNDS = 7  # measurements a figure, each beside its alternative's; their median is taken
ROUND_SECONDS = 0.02  # a measurement repeats the work for about so long


@dataclass(frozen=True)
class Measured:
    """`seconds` of one call, and of the alternative that does the same (None: there is none)."""

    what: str
    seconds: float
    against: str = ""
    against_seconds: float | None = None

    def __str__(self) -> str:
        text = f"{self.what:<58} {self.seconds * 1e6:>10.1f} us"
        if self.against_seconds is None:
            return text
        return f"{text}   {self.against_seconds / self.seconds:>6.2f}x {self.against}"


def compression(tokens: int = 1, hidden: int = 4096, device: str = "cpu") -> list[Measured]:
    """Each codec on [1, tokens, hidden] float32, from the tensor to the message and back."""
    values = torch.randn(1, tokens, hidden, device=device)
    found = []
    codecs: tuple[Codec, ...] = ("none", "float16", "bfloat16", "int8")
    for codec in codecs:
        wire = compress(values, codec)
        there, back = _medians(_Packs(values, codec), _Unpacks(wire, codec, values.device))
        size = compressed_bytes(values.shape, codec)
        found.append(Measured(f"compress {codec} {tokens} x {hidden}, {size:,} bytes", there))
        found.append(Measured(f"decompress {codec} {tokens} x {hidden}", back))
    return found


def attention(
    rows: int = 8, longest: int = 1024, heads: int = 32, kv_heads: int = 8, size: int = 128, device: str = "cpu"
) -> Measured:
    """Rows of lengths spread up to `longest`, against copying them into a padded batch and one masked attention."""
    lengths = [max(1, longest * (row + 1) // rows) for row in range(rows)]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    keys, values = (
        [torch.randn(kv_heads, longest, size, device=device, dtype=dtype) for _ in range(rows)] for _ in range(2)
    )
    query = torch.randn(rows, heads, size, device=device, dtype=dtype)
    seen = torch.arange(longest, device=device)[None] < torch.tensor(lengths, device=device)[:, None]

    def padded() -> torch.Tensor:
        grouped = query.view(rows, kv_heads, heads // kv_heads, size)
        return F.scaled_dot_product_attention(
            grouped, torch.stack(keys), torch.stack(values), attn_mask=seen[:, None, None]
        )

    ours, theirs = _medians(lambda: ragged_decode_attention(query, keys, values, lengths), padded)
    what = f"attention of {rows} rows up to {longest} tokens, {heads}/{kv_heads} heads of {size}"
    return Measured(what, ours, "as fast as padded", theirs)


def quantised(
    rows: int = 1, inputs: int = 4096, outputs: int = 4096, kind: str = "int8", device: str = "cpu"
) -> Measured:
    """[rows, inputs] times a quantised weight, against the plain product with the weight it came from."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    dense = torch.randn(outputs, inputs, device=device, dtype=dtype)
    weight = quant_reference.quantise_int8(dense) if kind == "int8" else quant_reference.quantise_nf4(dense)
    given = torch.randn(rows, inputs, device=device, dtype=dtype)
    product: Callable[..., torch.Tensor] = quant_reference.matmul
    if device != "cpu" and triton_installed():
        from swarmlm.kernels import dequant_triton

        product = dequant_triton.matmul
    ours, theirs = _medians(lambda: product(given, weight), lambda: F.linear(given, dense))
    return Measured(f"{kind} product of {rows} x {inputs} x {outputs}", ours, "as fast as a dense product", theirs)


def all_of_them(device: str = "cpu") -> Iterable[Measured]:
    """Decode and prefill sizes of an 8 B model's layers."""
    for tokens in (1, 128):
        yield from compression(tokens, device=device)
    for rows in (1, 4, 16):
        yield attention(rows, device=device)
    for kind in ("int8", "nf4"):
        for rows in (1, 16):
            yield quantised(rows, kind=kind, device=device)


@dataclass(frozen=True)
class _Packs:
    values: torch.Tensor
    codec: Codec

    def __call__(self) -> Any:
        return compress(self.values, self.codec)


@dataclass(frozen=True)
class _Unpacks:
    wire: Any
    codec: Codec
    device: torch.device

    def __call__(self) -> Any:
        return decompress(self.wire, self.codec, self.device)


def _medians(*sides: Callable[[], Any]) -> list[float]:
    """Seconds of a call of each side; the sides take turns, so that a slow moment of the machine meets all."""
    counts = [max(1, round(ROUND_SECONDS / max(_seconds(side, 2), 1e-7))) for side in sides]
    rounds = [[_seconds(side, count) for side, count in zip(sides, counts, strict=True)] for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def _seconds(work: Callable[[], Any], count: int) -> float:
    _wait()
    started = time.perf_counter()
    for _ in range(count):
        work()
    _wait()
    return (time.perf_counter() - started) / count


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    for measured in all_of_them("cuda" if torch.cuda.is_available() else "cpu"):
        print(measured, flush=True)
