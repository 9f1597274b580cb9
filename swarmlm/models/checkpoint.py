"""Where tensors come from: safetensors files, local or on a hub, and GGUF files. Nothing is read before it is wanted.

A `Checkpoint` hands out a lazy tensor for every tensor there is; it is read, and dequantised if it must be, when
indexed. Files that no wanted tensor lives in are neither downloaded nor opened.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from swarmlm.errors import CheckpointCorrupt, ModelUnsupported

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
Q8_0_VALUES = 32  # signed bytes in a block of GGUF's Q8_0, after their float16 scale

Fetch = Callable[[str], Path]  # file name in the repository -> local path; downloads if it must


class LazyTensor:
    """Reads when indexed, as transformers' loader expects of a safetensors slice."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read()


class Checkpoint(Protocol):
    def tensors(self, model: Any) -> Mapping[str, LazyTensor]:
        """Every tensor by its name (some formats name them by the model's own). Raises `CheckpointCorrupt`."""

    def close(self) -> None:
        """Unmap the files that tensors were read from: their pages no longer count as ours. Reading maps them again."""


class SafetensorsCheckpoint:
    """One or many safetensors files, listed by an index; `fetch` brings a file."""

    def __init__(self, fetch: Fetch, shards: Mapping[str, str]) -> None:
        self._fetch = fetch
        self._shards = dict(shards)
        self._opened: dict[str, Any] = {}
        self._opening = threading.Lock()

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
            return cls(fetch, dict.fromkeys(_open_shard(fetch(SINGLE)).keys(), SINGLE))
        if any(name.endswith((".bin", ".pt", ".pth")) for name in present):
            raise ModelUnsupported(
                "the checkpoint is pickled (.bin), which runs code when read: convert to safetensors"
            )
        raise ModelUnsupported("there are no safetensors files in the checkpoint")

    def tensors(self, model: Any) -> Mapping[str, LazyTensor]:
        return {name: LazyTensor(self._reader(name, shard)) for name, shard in self._shards.items()}

    def close(self) -> None:
        with self._opening:
            self._opened.clear()

    def _reader(self, name: str, file: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            with self._opening:
                if file not in self._opened:
                    self._opened[file] = _open_shard(self._fetch(file))
                opened = self._opened[file]
            try:
                tensor: torch.Tensor = opened.get_tensor(name)
            except Exception as error:
                raise CheckpointCorrupt(f"{file} does not hold {name}: {_first_line(error)}") from None
            return tensor.clone()  # out of the mapped file, which can then be closed

        return read


def _open_shard(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointCorrupt(f"{path.name} is not a whole safetensors file: {_first_line(error)}") from None


class GGUFCheckpoint:
    """A GGUF file, mapped into memory; tensors are dequantised one at a time, to the values transformers would load."""

    def __init__(self, path: Path, architecture: str) -> None:
        self._path = path
        self._architecture = architecture
        self.tensors_read = 0

    def tensors(self, model: Any) -> Mapping[str, LazyTensor]:
        from swarmlm.models import hf_private as hf

        try:
            stored = hf.load_gguf_state_dict(hf.GgufHeader.from_file(str(self._path)))
        except Exception as error:
            raise CheckpointCorrupt(f"{self._path.name} is not a whole GGUF file: {_first_line(error)}") from None
        config = model.config.to_dict()
        processor = hf.TENSOR_PROCESSORS.get(self._architecture, hf.TensorProcessor)(config=config)
        blocks = [int(match[1]) for name in stored if (match := re.match(r"blk\.(\d+)\.", name))]
        names = hf.get_gguf_hf_weights_map(_Flat(model), processor, num_layers=max(blocks, default=-1) + 1)
        return {
            name: LazyTensor(self._reader(key, stored[key], processor)) for key, name in names.items() if key in stored
        }

    def close(self) -> None:
        """Nothing: the file is mapped by the lazy tensors alone."""

    def _reader(self, key: str, stored: Any, processor: Any) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            import numpy as np
            from gguf import GGMLQuantizationType, dequantize

            try:
                raw = stored[...]
                if raw.dtype is not torch.uint8:
                    values = raw.to(torch.float32, copy=True).numpy()
                elif stored.ggml_type == GGMLQuantizationType.Q8_0:
                    values = _dequantize_q8_0(raw).numpy()
                else:
                    values = dequantize(raw.numpy(), GGMLQuantizationType(stored.ggml_type))
            except Exception as error:
                raise CheckpointCorrupt(f"{self._path.name} does not hold {key}: {_first_line(error)}") from None
            self.tensors_read += 1
            result = processor.process(
                weights=values, name=key, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
            )
            return torch.from_numpy(np.ascontiguousarray(result.weights))

        return read


def _dequantize_q8_0(packed: torch.Tensor) -> torch.Tensor:
    """[rows, bytes] to float32 [rows, columns]: gguf's own values, bit for bit, in one pass instead of several."""
    blocks = packed.reshape(-1, 2 + Q8_0_VALUES)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    return torch.mul(blocks[:, 2:].view(torch.int8), scale).reshape(packed.shape[0], -1)


class _Flat:
    """A model's own tensor names and no children: transformers' name map walks every submodule otherwise (10 s)."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        prefix = f"{model.base_model_prefix}."
        self._names = {name.removeprefix(prefix) for name in model.state_dict()} | set(model.state_dict())

    def state_dict(self) -> Iterable[str]:
        return self._names

    def named_children(self) -> tuple[()]:
        return ()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
