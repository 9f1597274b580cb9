"""A process that starts fast and stays small: imports beside each other, no garbage collection among them.

    imports = starting.begin()            # first thing a command does
    await starting.done(imports)          # before it uses torch
    starting.ready()                      # when it serves or is about to answer

Importing makes a million objects that all stay: collecting in the middle of it finds nothing and costs a quarter of the
time. Afterwards they are set apart, so that no later collection walks them in the middle of a token.
"""

from __future__ import annotations

import contextlib
import gc
import threading

from swarmlm.models import lean


def begin() -> threading.Thread:
    """Import torch and transformers in a thread, and libp2p here meanwhile."""
    gc.disable()
    lean.keep_heap_small()
    thread = threading.Thread(target=_import, name="imports", daemon=True)
    thread.start()
    from swarmlm.transport.libp2p.stand_ins import import_libp2p

    import_libp2p()
    return thread


def _import() -> None:
    with contextlib.suppress(ImportError):  # whoever needs it imports it again, and fails there
        lean.defer_unused()


async def done(imports: threading.Thread) -> None:
    """An import that failed is tried again by whoever needs it, and fails there."""
    import trio

    await trio.to_thread.run_sync(imports.join)


def ready(*, thorough: bool = False) -> None:
    """Collect from here on, but only what comes from here on. `thorough` (0.3 s): give what loading left over back."""
    if thorough:
        gc.collect()
        lean.release_unused_memory()
    lean.keep_heap_fast()
    gc.freeze()
    gc.enable()
