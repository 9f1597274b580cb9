"""The layer map, enforced: imports go downward only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 400  # a file is read in one sitting; about 300 is the aim

LAYERS = (  # longest prefix wins; siblings of equal height do not import each other unless they share a group
    ("swarmlm.actors.core", 0, "base"),
    ("swarmlm.protocol", 0, "base"),
    ("swarmlm.config", 0, "base"),
    ("swarmlm.errors", 0, "base"),
    ("swarmlm.kernels", 1, "kernels"),
    ("swarmlm.transport", 1, "transport"),
    ("swarmlm.models", 2, "models"),
    ("swarmlm.routing", 2, "routing"),
    ("swarmlm.actors", 3, "actors"),
    ("swarmlm.cli", 5, "cli"),
    ("swarmlm", 4, "node"),
)
SIDEWAYS = {("swarmlm.models.remote", "swarmlm.routing.session")}

FILES = sorted([*ROOT.glob("swarmlm/**/*.py"), *ROOT.glob("cli/**/*.py")])


def module_of(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "cli":
        parts.insert(0, "swarmlm")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> tuple[int, str]:
    for prefix, height, group in sorted(LAYERS, key=lambda entry: -len(entry[0])):
        if module == prefix or module.startswith(prefix + "."):
            return height, group
    raise AssertionError(f"{module} is on no layer")


def imports(file: Path) -> set[str]:
    """Every module a file imports, also inside functions; "from a import b" counts as a.b if that is a module."""
    found = set()
    package = module_of(file) if file.name == "__init__.py" else module_of(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            known = {module_of(other) for other in FILES}
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=[module_of(file) for file in FILES])
def test_imports_go_downward(file: Path) -> None:
    module = module_of(file)
    if module == "swarmlm":
        return  # the package's front door lists everything, lazily: test_importing_swarmlm_is_cheap holds it to that
    height, group = layer(module)
    for imported in imports(file):
        if not imported.startswith("swarmlm") or (module, imported) in SIDEWAYS:
            continue
        if imported == "swarmlm" and group == "cli":
            continue
        other_height, other_group = layer(imported)
        assert other_height < height or other_group == group, f"{module} must not import {imported}"


@pytest.mark.parametrize("file", FILES, ids=[module_of(file) for file in FILES])
def test_heavy_packages_stay_in_their_place(file: Path) -> None:
    module = module_of(file)
    roots = {name.partition(".")[0] for name in imports(file)}
    if not module.startswith("swarmlm.transport.libp2p"):
        assert not roots & {"libp2p", "multiaddr"}, f"only transport.libp2p may import libp2p, not {module}"
    if layer(module)[0] == 0 or layer(module)[1] == "transport":
        assert not roots & {"torch", "transformers"}, f"{module} must not import torch"


def test_private_names_of_transformers_are_in_one_module() -> None:
    private = (
        "transformers.conversion_mapping",
        "transformers.core_model_loading",
        "transformers.modeling_gguf",
        "transformers.modeling_utils",
        "transformers.integrations",
    )
    users = {module_of(file) for file in FILES if any(name.startswith(private) for name in imports(file))}
    assert users == {"swarmlm.models.hf_private"}


@pytest.mark.parametrize("file", FILES, ids=[module_of(file) for file in FILES])
def test_files_are_read_in_one_sitting(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MAX_LINES


def test_importing_swarmlm_is_cheap() -> None:
    heavy = "('torch', 'libp2p', 'transformers')"
    code = f"import swarmlm, swarmlm.cli.parser, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_exported_name_is_there() -> None:
    code = "import swarmlm; print([n for n in swarmlm.__all__ if not hasattr(swarmlm, n)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
