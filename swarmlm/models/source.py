"""Where a model comes from: the embedded default, a local directory, a GGUF file, or a hub repository.

    source = open_source("smollm2")
    source.num_blocks, source.config, source.tokenizer()

Opening reads the configuration only. Weights are read by `models.loading`, through `source.checkpoint`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from swarmlm.errors import CheckpointCorrupt, ModelNotFound, ModelUnsupported
from swarmlm.models.checkpoint import Checkpoint, GGUFCheckpoint, SafetensorsCheckpoint
from swarmlm.models.embedded import DEFAULT_MODEL, HUB_NAME, embedded_gguf
from swarmlm.models.gguf_cache import unpacked

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
NO_CONTEXT = 2048  # tokens: for families without positions in their configuration (alibi)
VOLATILE = {  # fields that may differ between two copies of one model
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "_attn_implementation",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}


class Source:
    """A model's configuration, tokenizer and tensors, wherever they are. Made by `open_source`."""

    def __init__(
        self,
        name: str,
        config: Any,
        checkpoint: Checkpoint,
        *,
        tokenizer: Callable[[], Any],
        generation_config: Callable[[], Any],
        checkpoint_dtype: torch.dtype,
    ) -> None:
        self.name = name
        self.config = config
        self.checkpoint = checkpoint
        self.checkpoint_dtype = checkpoint_dtype
        self._tokenizer = tokenizer
        self._generation_config = generation_config

    @property
    def num_blocks(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def context_length(self) -> int:
        """Tokens."""
        for field in CONTEXT_FIELDS:
            value = getattr(self.config, field, None)
            if isinstance(value, int) and value > 0:
                return value
        return NO_CONTEXT

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for copies of one model, different where hosts and clients could not work together."""
        fields = {key: value for key, value in self.config.to_dict().items() if key not in VOLATILE}
        text = json.dumps(fields, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def tokenizer(self) -> Any:
        """transformers' tokenizer, with the chat template if the checkpoint has one."""
        return self._tokenizer()

    def generation_config(self) -> Any:
        return self._generation_config()

    def describe(self) -> str:
        return (
            f"{self.name}: {self.config.model_type}, {self.num_blocks} blocks, {self.context_length} tokens of context"
        )


def open_source(model: str, *, revision: str | None = None, cache_dir: str | None = None) -> Source:
    """Find `model` and read its configuration.

    `model` is "smollm2", a directory, a .gguf file, or a hub repository "owner/name". Raises `ModelNotFound`,
    `ModelUnsupported`, `CheckpointCorrupt`.
    """
    if model == DEFAULT_MODEL:
        file = embedded_gguf()
        return _from_gguf(file, DEFAULT_MODEL) if file else _from_hub(HUB_NAME, DEFAULT_MODEL, revision, cache_dir)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path, path.stem)
    if path.is_dir():
        return _from_directory(path)
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelNotFound(f"there is no model at {model}")
    if "/" not in model:
        raise ModelNotFound(
            f"there is no model {model!r}: neither a directory here, nor {DEFAULT_MODEL!r}, nor a hub name (owner/name)"
        )
    return _from_hub(model, model, revision, cache_dir)


def _from_directory(path: Path) -> Source:
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"{path} holds no config.json")

    def fetch(name: str) -> Path:
        if not (path / name).is_file():
            raise CheckpointCorrupt(f"{path.name} lacks the file {name}")
        return path / name

    return _from_files(path.resolve().name, path, fetch, [file.name for file in path.iterdir()])


def _from_hub(repository: str, name: str, revision: str | None, cache_dir: str | None) -> Source:
    from swarmlm.models.hub import HubRepository

    hub = HubRepository(repository, revision=revision, cache_dir=cache_dir)
    folder = hub.fetch("config.json").parent
    hub.fetch_small_files()
    return _from_files(name, folder, hub.fetch, hub.files())


def _from_files(name: str, folder: Path, fetch: Callable[[str], Path], files: list[str]) -> Source:
    from transformers import AutoTokenizer, GenerationConfig

    config = _config(lambda: _auto_config(folder), name)

    def tokenizer() -> Any:
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelUnsupported(f"{name} has no tokenizer that loads: {str(error).splitlines()[0]}") from None

    def generation_config() -> Any:
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder)
        return GenerationConfig.from_model_config(config)

    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return Source(
        name,
        config,
        SafetensorsCheckpoint.open(fetch, files),
        tokenizer=tokenizer,
        generation_config=generation_config,
        checkpoint_dtype=dtype,
    )


def _from_gguf(path: Path, name: str) -> Source:
    from transformers import AutoTokenizer, GenerationConfig

    folder = unpacked(path)
    config = _config(lambda: _auto_config(folder), name)
    return Source(
        name,
        config,
        GGUFCheckpoint(path, config.model_type),
        tokenizer=lambda: AutoTokenizer.from_pretrained(folder),
        generation_config=lambda: GenerationConfig.from_model_config(config),
        checkpoint_dtype=torch.float32,
    )


def _auto_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def _config(read: Callable[[], Any], name: str) -> Any:
    try:
        config = read()
    except json.JSONDecodeError as error:
        raise CheckpointCorrupt(f"config.json of {name} is not JSON: {error}") from None
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelUnsupported(f"{name} cannot be read: {str(error).strip().splitlines()[0]}") from None
    config = config.get_text_config(decoder=True)
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ModelUnsupported(f"{name} ({config.model_type}) is no decoder with a list of layers")
    return config
