"""Building a family's own model without its weights, and filling exactly the tensors that are ours."""

from __future__ import annotations

import contextlib
import inspect
import threading
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from swarmlm.errors import CheckpointCorrupt, ModelUnsupported, SwarmError
from swarmlm.models.checkpoint import LazyTensor
from swarmlm.models.source import Source

Progress = Callable[[int, int], None]  # (tensors read, tensors to read)

_building = threading.Lock()  # transformers sets torch's default dtype while it builds a model: process-wide state


def build_meta_model(config: Any, *, causal_lm: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """The family's base model, or its causal LM, on the meta device: the whole structure, no memory.

    Attention is torch's scaled-dot-product where the family supports it. Raises `ModelUnsupported`.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModelForCausalLM if causal_lm else AutoModel
    with _building:
        for attention in ("sdpa", "eager"):
            try:
                model = _from_config(auto, config, dtype=dtype, attn_implementation=attention)
                return model.eval().requires_grad_(False)
            except ValueError as error:
                if attention == "sdpa" and "scaled_dot_product" in str(error):
                    continue
                text = str(error).splitlines()[0]
                raise ModelUnsupported(
                    f"{config.model_type} is no decoder that transformers can build: {text}"
                ) from None
    raise ModelUnsupported(f"{config.model_type} has no attention that runs here")


class _Structure(TorchFunctionMode):
    """What a model on the meta device asks of torch that would import sympy (0.3 s, 40 MB) to compute nothing.

    Random initialisation of tensors without data is skipped. `ranges`: rotary frequencies and the like are computed
    on the CPU, where that needs no symbols; families that mix them with parameters cannot have it.
    """

    def __init__(self, *, ranges: bool) -> None:
        super().__init__()
        self._ranges = ranges

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        elif self._ranges and func is torch.arange and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def _from_config(auto: Any, config: Any, **options: Any) -> Any:
    """The model with every parameter and buffer on the meta device."""
    try:
        with torch.device("meta"), _Structure(ranges=True):
            model = auto.from_config(config, **options)
    except (RuntimeError, NotImplementedError):
        with torch.device("meta"), _Structure(ranges=False):
            model = auto.from_config(config, **options)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                module._buffers[name] = buffer.to("meta")  # `load_into` lets the family write them all
    return model


def decoder_of(model: nn.Module) -> Any:
    """The module that owns the list of decoder layers."""
    return _owner(model)[0]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers, whatever the family calls it."""
    owner, name = _owner(model)
    layers: nn.ModuleList = getattr(owner, name)
    return layers


def layers_name(model: nn.Module) -> str:
    """The attribute of `decoder_of(model)` that holds the layers: "layers", "h", ..."""
    return _owner(model)[1]


def returns_tuple(model: Any, hidden_size: int) -> bool:
    """Whether the family's layers return a tuple, as its code says.

    Where that is not one tensor, the code is run without data up to the first layer's end (0.3 s, mostly imports).
    """
    layer = decoder_layers(model)[0]
    said = _said_to_return(layer)
    if said is torch.Tensor:
        return False

    class _Seen(Exception):
        pass

    def stop(layer: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(isinstance(output, tuple))
        raise _Seen

    from transformers import DynamicCache

    seen: list[bool] = []
    hidden = torch.zeros(1, 1, hidden_size, device="meta", dtype=model.dtype)
    hook = layer.register_forward_hook(stop)
    try:
        with torch.inference_mode():
            model(inputs_embeds=hidden, past_key_values=DynamicCache(config=model.config), use_cache=True)
    except Exception:  # our own signal, or an operation that needs data (routing to experts)
        pass
    finally:
        hook.remove()
    return seen[0] if seen else "tuple" in str(said).lower()


def _said_to_return(layer: nn.Module) -> Any:
    try:
        return typing.get_type_hints(layer.forward).get("return", "")
    except (NameError, TypeError):  # names that the family imports for type checkers only
        return inspect.get_annotations(layer.forward).get("return", "")


def narrow_config(model: Any, start: int, end: int, blocks: int) -> None:
    """Make the family's code see a model of layers [start, end): per-layer lists of that length, and their number."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        for field, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == blocks:
                setattr(config, field, value[start:end])
        config.num_hidden_layers = end - start


def _owner(model: Any) -> tuple[Any, str]:
    count = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    candidates = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if not candidates:
        raise ModelUnsupported(f"{type(model).__name__} has no list of {count} decoder layers")
    return candidates[0]


def load_into(
    model: Any,
    source: Source,
    *,
    wanted: Callable[[str], bool] = lambda key: True,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> None:
    """Fill those parameters and buffers of `model` (on the meta device) for which `wanted(key)` holds; nothing else.

    Only the tensors needed are read, through transformers' own conversion of checkpoints (renamed keys, fused experts).
    Raises `CheckpointCorrupt` naming what is missing or misshapen.
    """
    from swarmlm.models import hf_private as hf

    mapping = hf.get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, hf.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, hf.WeightConverter)]
    meta = model.state_dict()
    readers = {}
    for name, reader in source.checkpoint.tensors(model).items():
        renamed, _ = hf.rename_source_key(name, renamings, converters, model.base_model_prefix, meta)
        if (renamed in meta and wanted(renamed)) or (name in meta and wanted(name)):
            readers[name] = reader
    counted = _count(readers, progress) if progress is not None else readers
    config = hf.LoadStateDictConfig(
        dtype=dtype, device_map={"": torch.device(device)}, weight_mapping=mapping, weights_only=True
    )
    with _quiet():
        try:
            info, _ = hf.convert_and_load_state_dict_in_model(model, counted, config, None)
        except SwarmError:
            raise
        except Exception as error:
            raise CheckpointCorrupt(f"{source.name}: {str(error).splitlines()[0]}") from error
    for problem in (*info.conversion_errors.values(), *info.error_msgs):
        raise CheckpointCorrupt(f"{source.name}: {str(problem).splitlines()[0]}")
    for key, found, expected in info.mismatched_keys:
        raise CheckpointCorrupt(f"{source.name}: {key} has shape {tuple(found)} instead of {tuple(expected)}")
    if getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights()
    missing = [
        key for key, tensor in model.state_dict(keep_vars=True).items() if wanted(key) and tensor.device.type == "meta"
    ]
    if missing:
        raise CheckpointCorrupt(
            f"{source.name} lacks {missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1))
        )
    _fill_buffers(model, torch.device(device))
    model.eval().requires_grad_(False)
    source.checkpoint.close()


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Buffers that no checkpoint holds (rotary frequencies, masks): the family's own initialisation writes them."""
    for module in model.modules():
        empty = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in empty.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        if empty:
            with torch.no_grad():
                model._init_weights(module)


def _count(readers: dict[str, LazyTensor], progress: Progress) -> dict[str, LazyTensor]:
    done, total, lock = 0, len(readers), threading.Lock()

    def counted(reader: LazyTensor) -> LazyTensor:
        def read() -> torch.Tensor:
            nonlocal done
            tensor: torch.Tensor = reader[...]
            with lock:
                done += 1
                progress(done, total)
            return tensor

        return LazyTensor(read)

    progress(0, total)
    return {name: counted(reader) for name, reader in readers.items()}


@contextlib.contextmanager
def _quiet() -> Any:
    """transformers draws a progress bar of its own; ours is the caller's business."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
