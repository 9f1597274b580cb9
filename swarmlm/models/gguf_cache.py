"""The configuration and tokenizer of a GGUF file, kept beside each other in the user's cache directory.

Parsing them out of a GGUF takes seconds, reading them back a fraction of one. The cache is only a copy: it may be
deleted at any time, and a new or changed file gets a new entry.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from swarmlm.errors import CheckpointCorrupt, ModelUnsupported


def unpacked(file: Path) -> Path:
    """A directory with config.json and the tokenizer of a GGUF file. Raises `CheckpointCorrupt`, `ModelUnsupported`."""
    folder = _cache_root() / f"{file.stem}-{_key(file)}"
    if (folder / "config.json").is_file():
        return folder
    temporary = Path(tempfile.mkdtemp(prefix="swarmlm-"))
    try:
        _unpack(file, temporary)
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
        shutil.copytree(temporary, staged, dirs_exist_ok=True)
        try:
            staged.rename(folder)
        except OSError:  # another process was faster: its copy is as good
            shutil.rmtree(staged, ignore_errors=True)
    except PermissionError:
        return temporary  # no cache to write to: this process uses its own copy
    shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unpack(file: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    if file.open("rb").read(4) != b"GGUF":
        raise CheckpointCorrupt(f"{file.name} is not a whole GGUF file")
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, NotImplementedError, ImportError, IndexError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelUnsupported(f"{file.name} cannot be read: {text}") from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)  # last: its presence says that the entry is whole


def _cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "swarmlm" / "gguf"


def _key(file: Path) -> str:
    from importlib.metadata import version

    stat = file.stat()
    text = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {version('transformers')}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
