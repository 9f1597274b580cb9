"""Weight-only int8 and nf4 in plain torch: error bounds, sizes, and the nearest level."""

from __future__ import annotations

import pytest
import torch

from swarmlm.kernels.quant_reference import (
    NF4_BLOCK,
    NF4_LEVELS,
    matmul,
    nf4_levels,
    quantise_int8,
    quantise_nf4,
)

SHAPES = [(1, 1), (5, 64), (7, 130), (33, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_within_half_a_step_of_its_row(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape) * torch.logspace(-6, 6, shape[0])[:, None]
    packed = quantise_int8(weight)
    assert packed.shape == shape
    assert packed.nbytes == shape[0] * (shape[1] + 4)
    step = weight.double().abs().amax(1, keepdim=True) / 127
    assert bool(((packed.dequantise().double() - weight).abs() <= step * 0.50001).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_takes_the_nearest_level_of_its_block(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    packed = quantise_nf4(weight)
    blocks = -(-shape[1] // NF4_BLOCK)
    assert packed.shape == shape
    assert packed.nbytes == shape[0] * blocks * (NF4_BLOCK // 2 + 4)
    found = packed.dequantise()
    for first in range(0, shape[1], NF4_BLOCK):
        block = weight[:, first : first + NF4_BLOCK]
        levels = nf4_levels() * block.abs().amax(1)[:, None, None]
        nearest = (levels - block[:, :, None]).abs().amin(2)
        error = (found[:, first : first + NF4_BLOCK] - block).abs()
        torch.testing.assert_close(error, nearest, rtol=1e-5, atol=1e-7)


def test_nf4_levels_come_back_exactly_and_the_first_is_in_the_high_half() -> None:
    weight = torch.tensor([NF4_LEVELS * 4])
    packed = quantise_nf4(weight)
    assert packed.dequantise().equal(weight)
    assert packed.codes[0, :8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]


@pytest.mark.parametrize("quantise", [quantise_int8, quantise_nf4])
def test_zeros_stay_zeros(quantise: object) -> None:
    assert not quantise(torch.zeros(3, 70)).dequantise().any()  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantise", [quantise_int8, quantise_nf4])
def test_products(dtype: torch.dtype, quantise: object) -> None:
    weight = quantise(torch.randn(20, 70))  # type: ignore[operator]
    rows = torch.randn(2, 3, 70).to(dtype)
    found = matmul(rows, weight)
    assert found.dtype == dtype
    exact = rows.double() @ weight.dequantise(torch.float64).T
    assert float((found.double() - exact).abs().max() / exact.abs().max()) < {torch.float32: 1e-6}.get(dtype, 1e-2)


def test_products_of_large_rows_do_not_overflow_float16() -> None:
    weight = quantise_int8(torch.full((4, 64), 1e-3))
    rows = torch.full((1, 64), 22_453.0, dtype=torch.float16)
    torch.testing.assert_close(matmul(rows, weight).float(), torch.full((1, 4), 1437.0), rtol=1e-2, atol=0.0)
