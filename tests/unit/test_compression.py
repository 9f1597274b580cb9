"""The wire codecs: error bounds, sizes, and what no codec may do to a value."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarmlm.actors.core.message import Blob
from swarmlm.errors import BadStep
from swarmlm.kernels.compression import (
    BLOCK,
    compress,
    compressed_bytes,
    decompress,
    hidden_size,
    pack_int8,
    packed_scales,
    packed_size,
)
from swarmlm.protocol import Codec, Tensor

CODECS: list[Codec] = ["none", "float16", "bfloat16", "int8"]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]

hidden_sizes = st.integers(1, 3 * BLOCK + 5)


@st.composite
def rows(draw: st.DrawFn, *, everything: bool = False) -> torch.Tensor:
    """[1 to 3, hidden] float32: values of any size, and if `everything` also infinities and NaNs."""
    count, hidden = draw(st.integers(1, 3)), draw(hidden_sizes)
    value = st.floats(width=32, allow_nan=everything, allow_infinity=everything)
    few = draw(st.lists(value, min_size=1, max_size=12))
    places = draw(st.randoms(use_true_random=False))
    return torch.tensor([[places.choice(few) for _ in range(hidden)] for _ in range(count)], dtype=torch.float32)


def through_bytes(message: Tensor, *, offset: int = 0) -> Tensor:
    """As it comes from a link: read-only memory, `offset` bytes into a frame."""
    frame = bytes(offset) + bytes(message.data.view)
    return Tensor(message.dtype, message.shape, Blob(memoryview(frame)[offset:]))


def there_and_back(tensor: torch.Tensor, codec: Codec) -> torch.Tensor:
    return decompress(through_bytes(compress(tensor, codec)), codec)


def block_peaks(tensor: torch.Tensor) -> torch.Tensor:
    """The largest size in each value's block, in the shape of `tensor`."""
    hidden = tensor.shape[-1]
    filled = torch.nn.functional.pad(tensor.double().abs(), (0, -hidden % BLOCK)).view(len(tensor), -1, BLOCK)
    return filled.amax(-1).repeat_interleave(BLOCK, -1)[:, :hidden]


def test_none_is_bit_for_bit() -> None:
    tensor = torch.tensor([1.5, math.inf, -math.inf, math.nan, 3e38])
    assert there_and_back(tensor, "none").view(torch.int32).equal(tensor.view(torch.int32))


@given(rows())
def test_float16_within_half_a_unit(tensor: torch.Tensor) -> None:
    error = (there_and_back(tensor, "float16").double() - tensor.double()).abs()
    assert bool((error <= (tensor.double().abs() * 2**-11).clamp_min(2**-25)).all())


@given(rows())
def test_bfloat16_within_half_a_unit(tensor: torch.Tensor) -> None:
    error = (there_and_back(tensor, "bfloat16").double() - tensor.double()).abs()
    assert bool((error <= (tensor.double().abs() * 2**-8).clamp_min(2**-133)).all())


@given(rows())
def test_int8_within_half_a_step_of_its_block(tensor: torch.Tensor) -> None:
    error = (there_and_back(tensor, "int8").double() - tensor.double()).abs()
    assert bool((error <= (block_peaks(tensor) / 253).clamp_min(2**-126)).all())


@given(rows(everything=True), st.sampled_from(CODECS), st.sampled_from(FLOATS))
def test_finite_stays_finite_and_the_rest_stays_what_it_is(
    tensor: torch.Tensor, codec: Codec, dtype: torch.dtype
) -> None:
    tensor = tensor.to(dtype)
    back = there_and_back(tensor, codec)
    assert back.dtype == torch.float32
    assert back.shape == tensor.shape
    odd = ~tensor.isfinite()
    assert back.isfinite().equal(~odd)
    assert torch.equal(back[odd].nan_to_num(nan=7.0), tensor[odd].float().nan_to_num(nan=7.0))


@given(st.lists(st.integers(1, 70), min_size=1, max_size=4), st.sampled_from(CODECS), st.sampled_from(FLOATS))
def test_every_shape_comes_back_in_the_bytes_announced(shape: list[int], codec: Codec, dtype: torch.dtype) -> None:
    shape = [min(size, 3) for size in shape[:-1]] + shape[-1:]
    tensor = torch.randn(shape).to(dtype)
    wire = compress(tensor, codec)
    assert len(wire.data) == compressed_bytes(shape, codec, str(tensor.dtype).removeprefix("torch."))  # type: ignore[arg-type]
    for offset in (0, 1):
        back = decompress(through_bytes(wire, offset=offset), codec, torch.device("cpu"))
        assert back.shape == tensor.shape
        assert float((back - tensor.float()).abs().max()) < 0.05


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (0, 64)], ids=str)
def test_empty_and_scalar_tensors(codec: Codec, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape)
    wire = compress(tensor, codec)
    assert there_and_back(tensor, codec).equal(tensor)
    assert len(wire.data) == compressed_bytes(shape, codec)


@pytest.mark.parametrize(("peak", "kind"), [(22_453.0, "float16"), (65_504.0, "float16"), (65_505.0, "float32")])
def test_float16_refuses_what_does_not_fit(peak: float, kind: str) -> None:
    tensor = torch.randn(2, 64)
    tensor[1, 3] = -peak
    wire = compress(tensor, "float16")
    assert wire.dtype == kind
    back = decompress(wire, "float16")
    assert back[1, 3] == -peak or kind == "float16"
    assert kind == "float16" or back.equal(tensor)


def test_a_refused_bfloat16_tensor_stays_two_bytes() -> None:
    tensor = torch.full((1, 32), 1e6, dtype=torch.bfloat16)
    wire = compress(tensor, "float16")
    assert wire.dtype == "bfloat16"
    assert decompress(wire, "float16").equal(tensor.float())


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 3.4e38])
@pytest.mark.parametrize("codec", ["float16", "bfloat16", "int8"])
def test_values_that_a_codec_cannot_carry_send_the_tensor_unchanged(codec: Codec, odd: float) -> None:
    tensor = torch.randn(3, 70)
    tensor[2, 69] = odd
    assert there_and_back(tensor, codec).view(torch.int32).equal(tensor.view(torch.int32))


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 22_453.0, 1e30])
def test_int8_keeps_gradients_and_outliers_alike(size: float) -> None:
    tensor = torch.randn(4, 96) * size
    relative = (there_and_back(tensor, "int8").double() - tensor).norm() / tensor.double().norm()
    assert 0 < relative < 0.01


def test_int8_codes_never_reach_minus_128() -> None:
    """For peaks whose scale is rounded most: in the middle between two bfloat16 numbers."""
    peaks = torch.arange(2**14, dtype=torch.float32) * 2**-13 + 1
    tensor = torch.zeros(len(peaks), BLOCK)
    tensor[:, 0] = peaks
    tensor[:, 1] = -peaks
    codes = pack_int8(tensor)[:, :BLOCK].view(torch.int8)
    assert (int(codes.min()), int(codes.max())) == (-127, 127)


def test_int8_zeros_are_zeros_and_an_outlier_stays_in_its_block() -> None:
    tensor = torch.randn(1, 3 * BLOCK)
    tensor[0, :BLOCK] = 0
    tensor[0, BLOCK] = 1e4
    back = there_and_back(tensor, "int8")
    assert back[0, :BLOCK].equal(tensor[0, :BLOCK])
    assert float((back - tensor)[0, 2 * BLOCK :].abs().max()) < 0.02
    assert packed_scales(pack_int8(tensor), 3 * BLOCK).shape == (1, 3)


@pytest.mark.parametrize("codec", CODECS)
def test_views_and_tensors_with_gradients(codec: Codec) -> None:
    tensor = torch.randn(64, 5, requires_grad=True)
    back = there_and_back(tensor.T, codec)
    assert not back.requires_grad
    assert float((back - tensor.detach().T).abs().max()) < 0.05


def test_large_tensors_are_packed_as_small_ones_are() -> None:
    tensor = torch.randn(600, 1024)  # more than one chunk
    assert pack_int8(tensor)[::97].equal(pack_int8(tensor[::97]))


@given(st.integers(1, 20_000))
def test_a_packed_row_tells_its_size(hidden: int) -> None:
    assert hidden_size(packed_size(hidden)) == hidden


def test_nothing_else_is_a_packed_row() -> None:
    sizes = {packed_size(hidden) for hidden in range(1, 200)}
    for packed in set(range(150)) - sizes:
        with pytest.raises(BadStep):
            hidden_size(packed)


@pytest.mark.parametrize(
    ("wire", "codec"),
    [
        (Tensor("uint8", (35,), Blob(bytes(35))), "int8"),
        (Tensor("uint8", (1, 2), Blob(bytes(2))), "int8"),
        (Tensor("uint8", (), Blob(bytes(1))), "int8"),
        (Tensor("uint8", (0, 0), Blob(b"")), "int8"),
        (Tensor("uint8", (34,), Blob(bytes(34))), "float16"),
        (Tensor("int8", (34,), Blob(bytes(34))), "int8"),
        (Tensor("int64", (1,), Blob(bytes(8))), "none"),
    ],
)
def test_what_no_codec_sends_is_refused(wire: Tensor, codec: Codec) -> None:
    with pytest.raises(BadStep):
        decompress(wire, codec)


def test_what_cannot_be_compressed_is_refused() -> None:
    with pytest.raises(BadStep, match="int64 tensors cannot be compressed"):
        compress(torch.ones(4, dtype=torch.int64), "int8")
    with pytest.raises(BadStep, match="no codec 'zip'"):
        compress(torch.ones(4), "zip")  # type: ignore[arg-type]
