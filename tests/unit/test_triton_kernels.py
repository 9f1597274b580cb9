"""The Triton kernels, without a GPU: run in Triton's interpreter against float64, and compiled for a GPU.

The cases are in triton_cases.py, run by one process for each way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.triton_cases import cases

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds for a process that takes about five
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux only")


def outcomes(kind: str, **environment: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.triton_cases", kind],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return outcomes("interpreted", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outcomes("compiled", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("case", cases("interpreted"))
def test_interpreted(case: str, interpreted: dict[str, str]) -> None:
    assert interpreted[case] == ""


@pytest.mark.parametrize("case", cases("compiled"))
def test_compiled(case: str, compiled: dict[str, str]) -> None:
    assert compiled[case] == ""


def test_only_the_triton_modules_import_triton() -> None:
    modules = sorted(path.stem for path in (ROOT / "swarmlm" / "kernels").glob("*.py") if "triton" not in path.stem)
    imports = "".join(f"import swarmlm.kernels.{name}\n" for name in modules if name != "__init__")
    code = f"import swarmlm.kernels\n{imports}import sys; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
