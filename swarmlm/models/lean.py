"""A lean process: what inference never runs is neither imported nor kept. Called by the cli, before torch is used.

transformers' modelling code imports torch's compiler, its distributed tensors and sympy for uses that neither a host
nor a client has: 1 s, 150 MB and, where it is installed, the whole of triton. `defer_unused` leaves the compiler out
until something touches it (it then loads as ever) and tells transformers that there is no torch.distributed.

Only for processes that are ours alone: a program that embeds swarmlm may compile or train on many devices.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h
LOADING_THRESHOLD = 2**18  # bytes: weights and their temporaries are larger, what stays is smaller
COMPUTING_THRESHOLD = 2**25  # bytes: the largest that glibc takes
COMPILER = "torch._dynamo"
SCAN = "create_import_structure_from_path"  # of transformers; nothing is done where a release has no such function
MARKERS = ("allow_in_graph", "assume_constant_result", "disable")  # decorators; without a compiler they do nothing


class _NoCompiler(types.ModuleType):
    """Stands for torch's compiler during imports: its decorators do nothing, anything else brings the real one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import machinery asks for these
            raise AttributeError(name)
        _make_way(self)
        return getattr(importlib.import_module(COMPILER), name)


def _unchanged(fn: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """A marker for the compiler, used as `@marker`, `@marker(...)` or `marker(fn, ...)`."""
    return fn if fn is not None else _unchanged


def defer_unused() -> None:
    """Import torch and the parts of transformers that every host and client needs, and nothing else of them.

    Takes about 1.5 s; may run in a worker thread while the rest of the program starts. Safe to call twice.
    """
    import torch

    with _no_compiler(torch), _one_process():
        _scan_once()
        importlib.import_module("swarmlm.models.hf_private")
        importlib.import_module("swarmlm.models.generation")
        importlib.import_module("transformers.modeling_layers")  # what every decoder imports, while it is cheap
        importlib.import_module("transformers.masking_utils")


@contextmanager
def _no_compiler(torch: Any) -> Iterator[None]:
    spec = importlib.util.find_spec(COMPILER) if COMPILER not in sys.modules else None
    if spec is None:
        yield
        return
    stand_in = _NoCompiler(COMPILER)
    vars(stand_in).update(dict.fromkeys(MARKERS, _unchanged), __spec__=spec, __package__=COMPILER)
    stand_in.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[COMPILER] = torch._dynamo = stand_in
    try:
        yield
    finally:
        _make_way(stand_in)


def _make_way(stand_in: types.ModuleType) -> None:
    """From here on `import torch._dynamo` and `torch._dynamo` are the real package, loaded when first asked for."""
    import torch

    if sys.modules.get(COMPILER) is stand_in:
        del sys.modules[COMPILER]
    if vars(torch).get("_dynamo") is stand_in:
        del torch._dynamo


def _scan_once() -> None:
    """transformers reads all its model files when it is imported, and again for `transformers.models` (0.25 s each).

    It remembers what it read, by two names of one folder: the second is made to find what the first one did.
    """
    import transformers

    imports = importlib.import_module("transformers.utils.import_utils")
    scan = getattr(imports, SCAN, None)
    models = Path(transformers.__file__).parent / "models"
    if scan is None or "transformers.models" in sys.modules:
        return

    def once(path: Any) -> Any:
        return scan(models if str(path) == str(models / "__init__.py") else path)

    setattr(imports, SCAN, once)
    try:
        importlib.import_module("transformers.models")
    finally:
        setattr(imports, SCAN, scan)


@contextmanager
def _one_process() -> Iterator[None]:
    """transformers asks once whether there is torch.distributed, when it is imported, and remembers the answer."""
    import torch.distributed

    real = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = real


def keep_heap_small() -> None:
    """While loading: one heap, and what is large apart from it, so that all of it can go back to the system."""
    _mallopt(M_ARENA_MAX, 1)
    _mallopt(M_MMAP_THRESHOLD, LOADING_THRESHOLD)


def keep_heap_fast() -> None:
    """While computing: buffers of a step come from the heap, which does not ask the system for them each time."""
    _mallopt(M_MMAP_THRESHOLD, COMPUTING_THRESHOLD)


def _mallopt(option: int, value: int) -> None:
    """Nothing where libc is not glibc."""
    if _malloc_trim() is not None:
        ctypes.CDLL(None).mallopt(option, value)


def release_unused_memory() -> None:
    """Give the pages that `free` keeps (buffers of loading) back to the system. Nothing where libc is not glibc."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        trim: Callable[[int], Any] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return trim
