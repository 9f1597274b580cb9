"""The client's half of a model: the family's own `*ForCausalLM` with embeddings, norm and head, and no blocks.

    model = load_client_model(source, open_session=open_session)
    model.generate(ids, max_new_tokens=8)                    # opens a session and closes it
    with model.inference_session(max_length=64):             # one session for several calls
        model.generate(ids, max_new_tokens=8)
    model(ids, labels=ids).loss.backward()                   # with passes=: what is trainable here gets its gradient

`generate()` stays transformers' own. Hidden states of single blocks are not here, so `output_hidden_states` gives the
embeddings and the output of the last block.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from swarmlm.errors import ContextTooLong
from swarmlm.models.loading import (
    Progress,
    build_meta_model,
    decoder_of,
    layers_name,
    load_into,
    narrow_config,
    returns_tuple,
)
from swarmlm.models.remote import BlockingPasses, RemoteCache, RemoteStack, SessionOpener, left_padding
from swarmlm.models.shared_head import share_head
from swarmlm.models.source import Source

LOOKAHEAD = 64  # tokens: what assisted and prompt-lookup decoding may try past the last one it keeps


def load_client_model(
    source: Source,
    *,
    open_session: SessionOpener,
    passes: BlockingPasses | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Any:
    """Read everything of `source` but its blocks. Raises `ModelUnsupported`, `CheckpointCorrupt`.

    `open_session(batch, max_length)` is called when the first tokens are run. `passes` is the way of gradients: with
    it, a forward outside `generate()` and sessions goes there if a backward may follow (gradients are enabled and
    something asks for them) or no cache is wanted (`use_cache=False`). Padding may then be on either side.
    """
    config = copy.deepcopy(source.config)
    model = build_meta_model(config, causal_lm=True, dtype=dtype)
    decoder, name = decoder_of(model), layers_name(model)
    stack = RemoteStack(returns_tuple(model, int(source.config.hidden_size)))
    setattr(decoder, name, nn.ModuleList([stack]))
    load_into(model, source, dtype=dtype, device=device, progress=progress)
    share_head(model)
    narrow_config(model, 0, 1, source.num_blocks)  # the family sees a model of one layer: the remote stack
    model.generation_config = source.generation_config()
    family = type(model)
    model.__class__ = _distributed(family)
    model._swarm = _Swarm(stack, open_session, passes, source)
    return model


def _distributed(family: type) -> type:
    """A subclass of the family's class. Its `forward` shows the family's signature: `generate` decides by it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _Distributed.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(family.forward)  # type: ignore[attr-defined]
    return type(f"Distributed{family.__name__}", (_Distributed, family), {"forward": forward})


class _Swarm:
    """What a distributed model knows beyond its family's attributes."""

    def __init__(
        self, stack: RemoteStack, open_session: SessionOpener, passes: BlockingPasses | None, source: Source
    ) -> None:
        self.stack = stack
        self.open_session = open_session
        self.passes = passes
        self.source = source
        self.active: RemoteCache | None = None
        self.opened: list[RemoteCache] = []


class _Distributed:
    """Mixed into the family's class: gives every forward a session, or none where gradients are wanted."""

    _swarm: _Swarm

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None, "a forward needs input_ids or inputs_embeds"
        cache = past_key_values if isinstance(past_key_values, RemoteCache) else self._swarm.active
        own = cache is None
        passes = self._swarm.passes
        if cache is None and passes is not None and self._wants_passes(inputs_embeds, kwargs.get("use_cache")):
            padding = left_padding(attention_mask, given.shape[0], right=True)
            with self._swarm.stack.running(passes, padding):
                return super().forward(  # type: ignore[misc]
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    inputs_embeds=inputs_embeds,
                    **(kwargs | {"use_cache": False}),
                )
        if cache is None:
            cache = RemoteCache(self._swarm.open_session, given.shape[1])
        padding = left_padding(attention_mask, given.shape[0])
        try:
            with self._swarm.stack.running(cache, padding):
                return super().forward(  # type: ignore[misc]
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    past_key_values=cache,
                    inputs_embeds=inputs_embeds,
                    **kwargs,
                )
        finally:
            if own:
                cache.close()

    def _wants_passes(self, inputs_embeds: torch.Tensor | None, use_cache: bool | None) -> bool:
        model: Any = self
        if not (model.config.use_cache if use_cache is None else use_cache):
            return True
        given = inputs_embeds is not None and inputs_embeds.requires_grad
        return torch.is_grad_enabled() and (given or any(weight.requires_grad for weight in model.parameters()))

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`. Without an active session it opens one for this call."""
        if self._swarm.active is not None:
            kwargs.setdefault("past_key_values", self._swarm.active)
        outer, self._swarm.opened = self._swarm.opened, []
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            for cache in self._swarm.opened:
                cache.close()
            self._swarm.opened = outer

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        if model_kwargs.get("past_key_values") is None:
            limit = self._swarm.source.context_length
            if max_cache_length + 1 > limit:
                raise ContextTooLong(f"{max_cache_length + 1} tokens are more than the {limit} of this model's context")
            ahead = LOOKAHEAD if "assisted" in str(mode).lower() else 0
            cache = RemoteCache(self._swarm.open_session, min(limit, max_cache_length + 1 + ahead))
            self._swarm.opened.append(cache)
            model_kwargs["past_key_values"] = cache

    @contextmanager
    def inference_session(self, *, max_length: int) -> Iterator[RemoteCache]:
        """One session of `max_length` tokens for all `generate()` calls inside. Its batch is the first call's."""
        cache = RemoteCache(self._swarm.open_session, max_length)
        before, self._swarm.active = self._swarm.active, cache
        try:
            yield cache
        finally:
            self._swarm.active = before
            cache.close()
