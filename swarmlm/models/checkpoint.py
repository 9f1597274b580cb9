"""Where tensors come from: safetensors files, local or on a hub, and GGUF files. Nothing is read before it is wanted.

A `Checkpoint` names its tensors and hands out lazy readers: an object that reads, and converts if it must, when it is
indexed. Files that no wanted tensor lives in are neither downloaded nor opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from swarmlm.errors import CheckpointCorrupt, ModelUnsupported

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

Fetch = Callable[[str], Path]  # file name in the repository -> local path; downloads if it must


class LazyTensor:
    """Reads when indexed, as transformers' loader expects of a safetensors slice."""

    def __init__(self, read: Callable[[], torch.Tensor], shape: tuple[int, ...] | None = None) -> None:
        self._read = read
        self.shape = shape

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read()

    def get_shape(self) -> list[int]:
        return list(self.shape or ())


class Checkpoint(Protocol):
    def names(self, model: Any) -> Iterable[str]:
        """The tensors there are for `model` (some formats name them by it)."""

    def readers(self, names: Iterable[str], model: Any) -> Mapping[str, Any]:
        """A lazy reader for each name. Raises `CheckpointCorrupt`."""


class SafetensorsCheckpoint:
    """One or many safetensors files, listed by an index; `fetch` brings a file."""

    def __init__(self, fetch: Fetch, shards: Mapping[str, str]) -> None:
        self._fetch = fetch
        self._shards = dict(shards)

    @classmethod
    def open(cls, fetch: Fetch, files: Iterable[str]) -> SafetensorsCheckpoint:
        present = set(files)
        if INDEX in present:
            try:
                shards = json.loads(fetch(INDEX).read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointCorrupt(f"{INDEX} is no index of tensors ({error})") from None
            return cls(fetch, shards)
        if SINGLE in present:
            return cls(fetch, {name: SINGLE for name in _open_shard(fetch(SINGLE)).keys()})  # noqa: SIM118
        if any(name.endswith((".bin", ".pt", ".pth")) for name in present):
            raise ModelUnsupported("the checkpoint is pickled (.bin), which runs code when read: convert to safetensors")
        raise ModelUnsupported("there are no safetensors files in the checkpoint")

    def names(self, model: Any) -> Iterable[str]:
        return self._shards

    def readers(self, names: Iterable[str], model: Any) -> Mapping[str, Any]:
        opened: dict[str, Any] = {}
        readers = {}
        for name in names:
            shard = self._shards[name]
            if shard not in opened:
                opened[shard] = _open_shard(self._fetch(shard))
            readers[name] = LazyTensor(_slice_reader(opened[shard], name, shard))
        return readers


def _open_shard(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointCorrupt(f"{path.name} is not a whole safetensors file: {_first_line(error)}") from None


def _slice_reader(shard: Any, name: str, file: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        try:
            tensor: torch.Tensor = shard.get_tensor(name)
        except Exception as error:
            raise CheckpointCorrupt(f"{file} does not hold {name}: {_first_line(error)}") from None
        return tensor

    return read


class GGUFCheckpoint:
    """A GGUF file; tensors are dequantised one at a time, as they are read."""

    def __init__(self, path: Path, architecture: str) -> None:
        self._path = path
        self._architecture = architecture
        self._tensors: dict[str, Any] = {}
        self.tensors_read = 0

    def _open(self) -> dict[str, Any]:
        if not self._tensors:
            from gguf import GGUFReader

            try:
                self._tensors = {tensor.name: tensor for tensor in GGUFReader(str(self._path)).tensors}
            except Exception as error:
                raise CheckpointCorrupt(f"{self._path.name} is not a whole GGUF file: {_first_line(error)}") from None
        return self._tensors

    def names(self, model: Any) -> Iterable[str]:
        return self._names_of(model).values()

    def readers(self, names: Iterable[str], model: Any) -> Mapping[str, Any]:
        from swarmlm.models.hf_private import TENSOR_PROCESSORS, TensorProcessor

        config = model.config.to_dict()
        processor = TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)(config=config)
        by_name = {name: key for key, name in self._names_of(model).items()}
        return {name: LazyTensor(self._reader(by_name[name], processor)) for name in names}

    def _names_of(self, model: Any) -> dict[str, str]:
        """GGUF name -> the model's own name, for the tensors that the model has."""
        from swarmlm.models.hf_private import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        processor = TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)(config=model.config.to_dict())
        tensors = self._open()
        found = get_gguf_hf_weights_map(model, processor, num_layers=_layers_of(tensors))
        return {key: name for key, name in found.items() if key in tensors}

    def _reader(self, key: str, processor: Any) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            import numpy as np
            from gguf import dequantize

            tensor = self._tensors[key]
            try:
                weights = dequantize(tensor.data, tensor.tensor_type)
            except Exception as error:
                raise CheckpointCorrupt(f"{self._path.name} does not hold {key}: {_first_line(error)}") from None
            self.tensors_read += 1
            parsed: dict[str, dict[str, Any]] = {"tensors": {}}
            result = processor.process(weights=weights, name=key, tensor_key_mapping={}, parsed_parameters=parsed)
            return torch.from_numpy(np.ascontiguousarray(result.weights))

        return read


def _layers_of(tensors: Mapping[str, Any]) -> int:
    numbers = [int(match[1]) for name in tensors if (match := re.match(r"blk\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
