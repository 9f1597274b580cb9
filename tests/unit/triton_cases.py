"""What test_triton_kernels.py runs in processes of its own: `python -m tests.unit.triton_cases interpreted|compiled`.

Triton decides when it is imported whether its kernels are interpreted (on the CPU, slowly) or compiled, for the whole
process. `interpreted_*` compare with float64 and with the reference in the interpreter; `compiled_*` compile for a GPU
that need not be there, which finds what the interpreter allows and a GPU does not. Prints {name: traceback or ""}.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # relative; the interpreter truncates bf16
FLOATS = tuple(TOLERANCE)
SHARED = 99 * 1024  # bytes of shared memory that a program may use on the GPUs of most homes
AMPERE = 80  # compute capability 8.0, the first with bfloat16


def assert_close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == exact.shape
    error = float((found.double() - exact).abs().max() / exact.abs().max())
    assert error < TOLERANCE[dtype], error


# ---- wire compression


def interpreted_int8_is_packed_as_the_reference_does() -> None:
    from swarmlm.kernels import compression, compression_triton

    for shape in ((3, 70), (1, 1, 1), (2, 2, 1056), (5, 32)):
        for dtype in FLOATS:
            values = (torch.randn(shape) * torch.exp(torch.randn(shape))).to(dtype)
            values.view(-1)[0] = 0
            packed = compression.pack_int8(values)
            assert compression_triton.pack_int8(values).equal(packed)
            assert compression_triton.unpack_int8(packed).equal(compression.unpack_int8(packed))


def interpreted_int8_of_ties_tiny_and_huge_values() -> None:
    from swarmlm.kernels import compression, compression_triton

    values = torch.arange(-127, 129, dtype=torch.float32).div(2).repeat(4, 1)  # ties between codes
    values[:, ::32] = 127
    values[1] *= 1e-38
    values[2] *= 1e-42
    values[3] *= 1e36
    assert compression_triton.pack_int8(values).equal(compression.pack_int8(values))
    middles = torch.zeros(64, 32)
    middles[:, 0] = (torch.arange(64) * 2 + 1) * 2.0**-8 + 127  # scales on and near the middle of two bfloat16
    assert compression_triton.pack_int8(middles).equal(compression.pack_int8(middles))


def interpreted_int8_shows_what_it_cannot_carry() -> None:
    from swarmlm.kernels import compression, compression_triton

    for odd in (float("nan"), float("inf"), -float("inf"), 3.4e38):
        values = torch.randn(3, 70)
        assert compression.is_exact_enough(compression_triton.pack_int8(values), 70)
        values[1, 69] = odd
        assert not compression.is_exact_enough(compression_triton.pack_int8(values), 70)


def interpreted_int8_of_a_view() -> None:
    from swarmlm.kernels import compression, compression_triton

    values = torch.randn(6, 200)
    for view in (values[::2, 3:99], values.T, values[:, ::2]):
        assert compression_triton.pack_int8(view).equal(compression.pack_int8(view))


# ---- attention


def attention_rows(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, value_size: int
) -> tuple[Any, Any, Any, Any]:
    """(query, keys, values, spans): slabs of three sessions of different room, one of them a row of a batch of two."""
    room, spans = (8, 200, 71), [(0, 5), (3, 130), (70, 71)]
    keys = [torch.randn(2, kv_heads, slots, size).to(dtype)[1] for slots in room]
    values = [torch.randn(kv_heads, slots, value_size).to(dtype) for slots in room]
    for slab in (*keys, *values):  # what is not seen must not matter
        slab[:, -1] = float("nan") if slab.shape[1] != 71 else slab[:, -1]
    return torch.randn(3, heads, size).to(dtype), keys, values, spans


def exact_attention(query: Any, keys: Any, values: Any, spans: Any, scale: float) -> torch.Tensor:
    rows = []
    for row, (first, end) in enumerate(spans):
        group = query.shape[1] // keys[row].shape[0]
        key, value = (slab[row][:, first:end].double().repeat_interleave(group, 0) for slab in (keys, values))
        share = torch.softmax(torch.einsum("hd,hld->hl", query[row].double(), key) * scale, -1)
        rows.append(torch.einsum("hl,hld->hd", share, value))
    return torch.stack(rows)


def interpreted_attention_equals_float64() -> None:
    from swarmlm.kernels import attention, attention_triton

    for dtype in FLOATS:
        for heads, kv_heads, size, value_size in ((6, 2, 16, 16), (3, 3, 80, 24)):
            given = attention_rows(dtype, heads, kv_heads, size, value_size)
            exact = exact_attention(*given, 0.2)
            assert_close(attention.attend(*given, 0.2), exact, dtype)
            for splits in (1, 3):
                assert_close(attention_triton.ragged_decode_attention(*given, 0.2, splits=splits), exact, dtype)


def interpreted_attention_of_large_scores() -> None:
    """The softmax is online: scores of +-300 overflow if the peak is not taken off first."""
    from swarmlm.kernels import attention_triton

    query, keys, values, spans = attention_rows(torch.float32, 4, 2, 16, 16)
    found = attention_triton.ragged_decode_attention(query * 100, keys, values, spans, 1.0, splits=2)
    assert_close(found, exact_attention(query * 100, keys, values, spans, 1.0), torch.float32)


def interpreted_attention_reads_slabs_of_any_stride() -> None:
    from swarmlm.kernels import attention_triton

    query, keys, values, spans = attention_rows(torch.float32, 4, 2, 32, 32)
    exact = exact_attention(query, keys, values, spans, 0.3)
    keys = [key.transpose(0, 1).contiguous().transpose(0, 1) for key in keys]  # token-major
    assert_close(attention_triton.ragged_decode_attention(query, keys, values, spans, 0.3), exact, torch.float32)


# ---- quantised products


def interpreted_quantised_products_equal_float64() -> None:
    from swarmlm.kernels import dequant_triton, quant_reference

    for dtype in FLOATS:
        for count, outputs, inputs in ((1, 40, 70), (3, 33, 256), (17, 32, 129), (65, 8, 64)):
            rows = torch.randn(count, inputs).to(dtype)
            for quantise in (quant_reference.quantise_int8, quant_reference.quantise_nf4):
                weight = quantise(torch.randn(outputs, inputs))
                exact = rows.double() @ weight.dequantise(torch.float64).T
                assert_close(dequant_triton.matmul(rows, weight), exact, dtype)
                assert_close(quant_reference.matmul(rows, weight), exact, dtype)


def interpreted_quantised_products_of_views() -> None:
    from swarmlm.kernels import dequant_triton, quant_reference

    around = torch.full((2, 3, 200), float("nan"))  # what is beside a row must not matter
    rows = around[:, :, 7:108]
    rows.normal_()
    for quantise in (quant_reference.quantise_int8, quant_reference.quantise_nf4):
        weight = quantise(torch.randn(20, 101))
        assert_close(dequant_triton.matmul(rows, weight), quant_reference.matmul(rows, weight).double(), torch.float32)


# ---- compiling


def compiles(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any) -> Any:
    """The kernel's program for a GPU of compute capability 8.0. `types` are its arguments', as Triton writes them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    built = triton.compile(
        ASTSource(kernel, signature, places), target=GPUTarget("cuda", AMPERE, 32), options=options or None
    )
    assert built.asm["cubin"]
    assert built.metadata.shared <= SHARED, built.metadata.shared
    return built


def compiled_int8_codec_has_no_fused_or_approximate_arithmetic() -> None:
    from swarmlm.kernels import compression_triton as module

    constants = {name: getattr(module, name) for name in ("PER_CODE", "MIN_SCALE", "ROUNDING", "BLOCKS", "BLOCK")}
    types = {"values": "*fp32", "packed": "*u8"}
    program = compiles(module._pack, types, constants, enable_fp_fusion=False).asm["ptx"]
    assert "div.rn.f32" in program
    assert not any(word in program for word in ("fma.", ".ftz", ".approx"))
    compiles(module._unpack, types, {name: constants[name] for name in ("BLOCKS", "BLOCK")})


def compiled_attention_fits() -> None:
    import triton.language as tl

    from swarmlm.kernels import attention_triton as module

    for stored, name, torch_type in ((tl.bfloat16, "bf16", torch.bfloat16), (tl.float32, "fp32", torch.float32)):
        sizes = {"SIZE": 64, "VALUE_SIZE": 64, "WIDTH": 64, "VALUE_WIDTH": 64, "KV_HEADS": 8, "GROUP": 4, "SPLITS": 4}
        types = {"query": f"*{name}", "table": "*i64", "scale": "fp32", "out": f"*{name}"}
        types |= {"sums": "*fp32", "peaks": "*fp32", "weights": "*fp32"}
        step = {"QUERIES": 16, "KEYS": module.step_keys(torch.empty(1, 1, 64, dtype=torch_type)), "TABLE": module.TABLE}
        compiles(module._attend, types, {**sizes, **step, "STORED": stored, "PRODUCT": stored})
        compiles(module._combine, types, {"SPLITS": 4, "PARTS": 4, "VALUE_SIZE": 64, "VALUE_WIDTH": 64})


def compiled_quantised_products_fit() -> None:
    import triton.language as tl

    from swarmlm.kernels import dequant_triton as module
    from swarmlm.kernels import quant_reference

    for product, name in ((tl.bfloat16, "bf16"), (tl.float32, "fp32")):
        types = {"rows": f"*{name}", "out": f"*{name}", "scales": "*fp32", "levels": "*fp32"}
        sizes = {"ROWS": module.ROWS, "OUTPUTS": module.OUTPUTS, "PRODUCT": product}
        compiles(module._int8, {**types, "codes": "*i8"}, {**sizes, "INPUTS": module.INPUTS})
        compiles(module._nf4, {**types, "codes": "*u8"}, {**sizes, "BLOCK": quant_reference.NF4_BLOCK})


def run(kind: str) -> dict[str, str]:
    """Every case of `kind`, with the traceback of those that fail."""
    found = {}
    for name in cases(kind):
        torch.manual_seed(0)
        try:
            globals()[name]()
            found[name] = ""
        except Exception:  # the report is the point
            found[name] = traceback.format_exc()
    return found


def cases(kind: str) -> list[str]:
    return [name for name in globals() if name.startswith(f"{kind}_")]


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
