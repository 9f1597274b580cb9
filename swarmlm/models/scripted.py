"""The decode pass in TorchScript: one call for all blocks, so that no interpreter runs between two matrix products.

A decode step reads every weight once; whatever runs between has been pushed out of the caches by then and costs twice
what it does alone. The same function runs in Python where it cannot be compiled. Used by `models.fused` for one token
a row, without padding, on the CPU; compared with its own way of computing before use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

log = logging.getLogger("swarmlm.models")


def product(given: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
    """`weights` as `Int8Linear` (two), `PackedLinear` or `nn.Linear` (one) keep them."""
    if len(weights) == 2:
        output = torch._weight_int8pack_mm(given.to(torch.bfloat16), weights[0], weights[1]).to(given.dtype)
        return output if bias is None else output + bias
    if not weights[0].is_mkldnn:
        return linear(given, weights[0], bias)
    nothing = given.new_zeros([given.size(0), weights[0].size(0)])
    return torch.ops.mkldnn._linear_pointwise(given, nothing, weights[0], bias, "add")  # type: ignore[no-any-return]


def added(
    hidden: torch.Tensor, given: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    """`hidden` plus the product."""
    if weights[0].is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(given, hidden, weights[0], bias, "add")  # type: ignore[no-any-return]
    return hidden + product(given, weights, bias)


def decode(
    hidden: torch.Tensor,
    norms: list[list[torch.Tensor]],
    weights: list[list[list[torch.Tensor]]],
    biases: list[list[torch.Tensor | None]],
    keys: list[list[torch.Tensor]],
    values: list[list[torch.Tensor]],
    batches: list[int],
    held: list[int],
    cos: torch.Tensor,
    sin: torch.Tensor,
    sizes: list[int],
    eps: float,
    first: int,
    last: int,
) -> torch.Tensor:
    """Blocks [first, last) on `hidden` [rows, hidden size].

    `norms`, `weights` and `biases` are those of each block: norms before attention and MLP, then of queries and keys if
    there are any; linears qkv, out, gate and up, down. `keys` and `values` are the slabs of each session and block,
    [batch, kv heads, max length, head size], of which `held` tokens are filled; `batches` are the sessions' rows.
    `sizes` are heads, kv heads and head size.
    """
    heads, kv_heads, size = sizes[0], sizes[1], sizes[2]
    half, rows, width = size // 2, hidden.size(0), hidden.size(1)
    for index in range(first, last):
        norm, weight, bias = norms[index], weights[index], biases[index]
        qkv = product(rms_norm(hidden, [width], norm[0], eps), weight[0], bias[0])
        qkv = qkv.view(rows, heads + 2 * kv_heads, size)
        turning = qkv[:, : heads + kv_heads]
        if len(norm) > 2:
            queries = rms_norm(qkv[:, :heads], [size], norm[2], eps)
            turning = torch.cat([queries, rms_norm(qkv[:, heads : heads + kv_heads], [size], norm[3], eps)], 1)
        turned = turning * cos
        turned[:, :, :half].addcmul_(turning[:, :, half:], sin[:, :, :half], value=-1.0)
        turned[:, :, half:].addcmul_(turning[:, :, :half], sin[:, :, half:])
        attended = hidden.new_zeros([rows, heads * size])
        row = 0
        for session in range(len(batches)):
            batch, end = batches[session], held[session] + 1
            key_slab, value_slab = keys[session][index], values[session][index]
            key_slab.select(2, held[session]).copy_(turned[row : row + batch, heads:])
            value_slab.select(2, held[session]).copy_(qkv[row : row + batch, heads + kv_heads :])
            query = turned[row : row + batch, :heads].view(batch, kv_heads, heads // kv_heads, size)
            seen = scaled_dot_product_attention(query, key_slab.narrow(2, 0, end), value_slab.narrow(2, 0, end))
            attended[row : row + batch].copy_(seen.reshape(batch, heads * size))
            row += batch
        hidden = added(hidden, attended, weight[1], bias[1])
        gate_up = product(rms_norm(hidden, [width], norm[1], eps), weight[2], bias[2])
        gate, up = gate_up.chunk(2, -1)
        hidden = added(hidden, silu(gate).mul_(up), weight[3], bias[3])
    return hidden


def compiled() -> Callable[..., Any]:
    """`decode`, compiled if this Python and torch can."""
    try:
        script: Callable[..., Any] = torch.jit.script(decode)
        return script
    except Exception as error:
        log.info("decoding runs uncompiled: %s", str(error).strip().splitlines()[0])
        return decode
