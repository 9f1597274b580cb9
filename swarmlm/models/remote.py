"""The remote stack: one module in place of all of a model's layers, and the cache that stands for its session.

Whoever drives the model decides what a session is: anything with `BlockingSession`'s three members. Training goes
another way, without a session: whole sequences through `BlockingPasses`, with gradients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.cache_utils import Cache, CacheLayerMixin

from swarmlm.errors import UsageError


class BlockingSession(Protocol):
    """All blocks of the model, somewhere, with the keys and values of what they were given. Used from one thread."""

    @property
    def position(self) -> int:
        """Tokens held."""

    def step(
        self, hidden: torch.Tensor, *, position: int, padding: tuple[int, ...] = (), hypo_ids: tuple[int, ...] = ()
    ) -> torch.Tensor:
        """Run `hidden` [batch, n, hidden size] after the first `position` tokens; lower than held rolls back."""

    def close(self) -> None: ...


SessionOpener = Callable[[int, int], BlockingSession]  # (batch, max_length)


class BlockingPasses(Protocol):
    """All blocks of the model, somewhere, run over whole sequences without leaving anything there."""

    def forward(
        self, hidden: torch.Tensor, padding: tuple[int, ...], *, differentiable: bool
    ) -> tuple[torch.Tensor, Any]:
        """(the output for `hidden`, both [rows, tokens, hidden size]; what `backward` needs, if `differentiable`)."""

    def backward(self, tape: Any, grad: torch.Tensor) -> torch.Tensor:
        """The gradient at the input of the forward that gave `tape`, from that at its output, in the same shape."""


class _ThroughPasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, passes: BlockingPasses, padding: tuple[int, ...]) -> torch.Tensor:
        output, ctx.tape = passes.forward(hidden.detach(), padding, differentiable=True)
        ctx.passes = passes
        return output.to(hidden.device, hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.passes.backward(ctx.tape, grad).to(grad.device, grad.dtype), None, None


class _RemoteLayer(CacheLayerMixin):  # type: ignore[misc]
    def __init__(self, cache: RemoteCache) -> None:
        super().__init__()
        self._cache = cache
        self.is_sliding = False
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        return None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise UsageError("a remote cache holds no keys and values here")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.length + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        self._cache.length += min(0, tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._cache.reorder(beam_idx)


class RemoteCache(Cache):  # type: ignore[misc]
    """What transformers calls `past_key_values`: the length of a session, and what the next step must undo or reorder.

    Cropping and reordering send nothing: they travel with the next step. May be used for several `generate()` calls.
    """

    def __init__(self, open_session: SessionOpener, max_length: int) -> None:
        self._open = open_session
        self._max_length = max_length
        self._session: BlockingSession | None = None
        self._rows: torch.Tensor | None = None
        self.length = 0
        super().__init__(layers=[_RemoteLayer(self)])

    @classmethod
    def over(cls, session: BlockingSession, max_length: int) -> RemoteCache:
        """A cache for a session that somebody else opened and will close."""
        cache = cls(lambda batch, length: session, max_length)
        cache.length = session.position
        return cache

    def reorder(self, beam_idx: torch.Tensor) -> None:
        self._rows = beam_idx if self._rows is None else self._rows[beam_idx]

    def step(self, hidden: torch.Tensor, padding: tuple[int, ...]) -> torch.Tensor:
        if self._session is None:
            self._session = self._open(hidden.shape[0], self._max_length)
        hypo_ids = tuple(self._rows.tolist()) if self._rows is not None else ()
        if hypo_ids == tuple(range(len(hypo_ids))):
            hypo_ids = ()
        output = self._session.step(hidden, position=self.length, padding=padding, hypo_ids=hypo_ids)
        self._rows = None
        self.length += hidden.shape[1]
        return output

    def close(self) -> None:
        if self._session is not None:
            self._session.close()


class RemoteStack(nn.Module):
    """Stands where the layers stood. It runs inside `running(cache, padding)` only."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self._returns_tuple = returns_tuple  # as the family's layers do
        self._calls = threading.local()

    @contextmanager
    def running(self, cache: RemoteCache | BlockingPasses, padding: tuple[int, ...]) -> Any:
        before = getattr(self._calls, "current", None)
        self._calls.current = (cache, padding)
        try:
            yield
        finally:
            self._calls.current = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        through, padding = self._calls.current
        output: torch.Tensor
        if isinstance(through, RemoteCache):
            output = through.step(hidden, padding)
        elif torch.is_grad_enabled() and hidden.requires_grad:
            output = _ThroughPasses.apply(hidden, through, padding)  # type: ignore[no-untyped-call]
        else:
            output, _ = through.forward(hidden, padding, differentiable=False)
        output = output.to(hidden.device, hidden.dtype)
        return (output,) if self._returns_tuple else output


def left_padding(attention_mask: torch.Tensor | None, rows: int, *, right: bool = False) -> tuple[int, ...]:
    """Left-pad tokens of each row; () if there are none. Raises `UsageError` for any other mask.

    `right` allows padding at the end as well: where nothing is generated, no token that counts looks at it.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return ()
    if attention_mask.dim() != 2:
        raise UsageError("only a mask of shape (batch, tokens) works over a swarm")
    mask = attention_mask.bool()
    padding = mask.long().argmax(-1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    expected = columns >= padding[:, None]
    if right:
        expected &= columns < (padding + mask.sum(-1))[:, None]
    if not torch.equal(mask, expected):
        if right:
            raise UsageError("a mask with holes does not work over a swarm: the tokens of a row must be contiguous")
        raise UsageError("only left padding works over a swarm: set tokenizer.padding_side = 'left'")
    if len(padding) != rows:
        raise UsageError(f"a mask of {len(padding)} rows for a batch of {rows}")
    return tuple(padding.tolist())
