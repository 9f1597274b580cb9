"""Fast starts change what is imported, never what is computed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize, quantize

from swarmlm.models.checkpoint import _dequantize_q8_0
from swarmlm.models.lean import release_unused_memory
from swarmlm.models.loading import build_meta_model
from swarmlm.models.source import open_source

UNUSED = ("torch._dynamo.utils", "torch._inductor", "torch.distributed.tensor", "sympy", "triton")


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_lean_process_loads_a_span_and_a_client_without_compiler_and_symbols() -> None:
    loaded = run(
        "import sys\n"
        "from swarmlm.models import lean\n"
        "lean.defer_unused()\n"
        "lean.defer_unused()\n"
        "from swarmlm.models.client import load_client_model\n"
        "from swarmlm.models.source import open_source\n"
        "from swarmlm.models.span import Span\n"
        "source = open_source('smollm2')\n"
        "load_client_model(source, open_session=lambda batch, length: None)\n"
        "Span.load(source, 0, 1)\n"
        f"print([name for name in {UNUSED!r} if name in sys.modules])"
    )
    assert loaded == "[]"


def test_the_deferred_compiler_is_the_real_one_once_it_is_used() -> None:
    printed = run(
        "from swarmlm.models import lean\n"
        "lean.defer_unused()\n"
        "import torch\n"
        "print(torch.distributed.is_available())\n"
        "double = torch.compile(lambda x: x * 2, backend='eager')\n"
        "print(double(torch.ones(2)).tolist(), torch._dynamo.config is not None, torch._dynamo.is_compiling())\n"
        "print(torch.compiler.disable(len).__module__ is not None, torch._dynamo.disable.__module__)"
    )
    assert printed.splitlines() == ["True", "[2.0, 2.0] True False", "True torch._dynamo.decorators"]


def test_libp2p_without_its_unused_parts_still_has_them() -> None:
    printed = run(
        "import sys\n"
        "from swarmlm.transport.libp2p.stand_ins import import_libp2p\n"
        "import_libp2p()\n"
        "from swarmlm.transport.libp2p import open_libp2p\n"
        "print([name for name in ('requests', 'zeroconf') if name in sys.modules])\n"
        "from libp2p.host import basic_host\n"
        "from libp2p.discovery.mdns.mdns import MDNSDiscovery\n"
        "print(MDNSDiscovery.__name__, 'zeroconf' in sys.modules)"
    )
    assert printed.splitlines() == ["[]", "MDNSDiscovery True"]


def test_q8_0_tensors_are_bit_for_bit_what_gguf_makes_of_them() -> None:
    values = np.random.default_rng(0).standard_normal((48, 96), dtype=np.float32) * 3
    values[0, :32] = 0
    packed = quantize(values, GGMLQuantizationType.Q8_0)
    ours = _dequantize_q8_0(torch.from_numpy(packed))
    assert ours.is_contiguous()
    assert torch.equal(ours, torch.from_numpy(dequantize(packed, GGMLQuantizationType.Q8_0)))


def test_a_model_is_built_without_any_memory() -> None:
    model = build_meta_model(open_source("smollm2").config, causal_lm=True)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert dict(model.named_buffers())


def test_releasing_memory_is_always_possible() -> None:
    release_unused_memory()
    release_unused_memory()
