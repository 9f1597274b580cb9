"""Every transformers-private name that swarmlm uses, in one place. Tested with transformers 5.20 to 5.x.

What is private may move in any release: when an upgrade breaks swarmlm, it breaks here.
"""

from __future__ import annotations

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.modeling_utils import LoadStateDictConfig

__all__ = [
    "TENSOR_PROCESSORS",
    "GgufHeader",
    "LoadStateDictConfig",
    "TensorProcessor",
    "WeightConverter",
    "WeightRenaming",
    "convert_and_load_state_dict_in_model",
    "get_gguf_hf_weights_map",
    "get_model_conversion_mapping",
    "load_gguf_state_dict",
    "rename_source_key",
]
