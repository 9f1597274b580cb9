"""Tensors to and from their message form: bit for bit, and without copies where memory allows."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarmlm.actors.core.message import Blob
from swarmlm.errors import BadStep
from swarmlm.kernels.wire import from_wire, to_wire
from swarmlm.protocol import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape).mul(100).to(dtype)


def through_bytes(message: Tensor, *, offset: int = 0) -> Tensor:
    """As it comes from a link: read-only memory, `offset` bytes into a frame."""
    frame = bytes(offset) + bytes(message.data.view)
    return Tensor(message.dtype, message.shape, Blob(memoryview(frame)[offset:]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, offset: int) -> None:
    tensor = sample(dtype, (2, 3, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = from_wire(through_bytes(to_wire(tensor), offset=offset))
    assert back.dtype == dtype
    assert back.view(torch.uint8).equal(tensor.view(torch.uint8))


@given(st.lists(st.integers(0, 3), max_size=4))
def test_every_shape_comes_back(shape: list[int]) -> None:
    tensor = torch.randn(shape)
    back = from_wire(through_bytes(to_wire(tensor)))
    assert back.shape == tensor.shape
    assert back.equal(tensor)


def test_a_contiguous_tensor_lends_its_memory() -> None:
    tensor = torch.zeros(1, 2, 3)
    message = to_wire(tensor)
    tensor[0, 0, 0] = 7.0
    assert from_wire(message)[0, 0, 0] == 7.0


def test_another_layout_is_copied() -> None:
    tensor = torch.randn(4, 3).T
    assert from_wire(to_wire(tensor)).equal(tensor)
    assert from_wire(to_wire(tensor[:, 1:3])).equal(tensor[:, 1:3])


def test_the_memory_outlives_the_message() -> None:
    tensor = from_wire(through_bytes(to_wire(torch.arange(100_000.0))))
    gc.collect()
    churn = [bytes(400_000) for _ in range(8)]
    assert tensor.equal(torch.arange(100_000.0))
    assert len(churn) == 8


def test_gradients_stay_at_home() -> None:
    tensor = torch.randn(2, 2, requires_grad=True)
    assert not from_wire(to_wire(tensor)).requires_grad


def test_a_dtype_that_does_not_travel() -> None:
    with pytest.raises(BadStep, match="float64 tensors do not travel"):
        to_wire(torch.zeros(2, dtype=torch.float64))
