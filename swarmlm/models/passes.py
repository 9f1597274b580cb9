"""Forward and backward through a span, for training: whole sequences, no session, weights fixed.

    passes = Passes(span, keep_bytes=2**30)
    done = passes.run(Forward(...))              # blocking: called by the batcher, in its compute thread, one at a time

A `Backward` runs the forward again from the hidden states it brings, so a host owes a client nothing between the two.
As an economy, a `Forward` may ask that its graph be kept: graphs share `keep_bytes`, the least recently made ones go
first, and none outlives KEEP_SECONDS. Memory is measured, not guessed: autograd tells each tensor that it saves.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

import torch

from swarmlm.errors import BadStep, ContextTooLong, UnknownSession, WrongModel
from swarmlm.kernels.wire import from_wire, to_wire
from swarmlm.models.span import Span
from swarmlm.protocol import Backward, BackwardDone, Forward, ForwardDone, PassKey

KEEP_SECONDS = 120.0  # a client that has not come back by then has lost its loss, or us
MAX_PASS_TOKENS = 4096  # rows x tokens of one pass: its graph takes about 33 KB a token and block at 135M size


@dataclass
class _Graph:
    """A forward whose gradient may be asked for: `output` leads back to `leaf`."""

    start: int
    end: int
    leaf: torch.Tensor
    output: torch.Tensor
    nbytes: int
    until: float


class Passes:
    """The training side of one span. `keep_bytes` is for all kept graphs together; 0 keeps none."""

    def __init__(
        self,
        span: Span,
        keep_bytes: int,
        *,
        max_tokens: int = MAX_PASS_TOKENS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._span = span
        self._keep_bytes = keep_bytes
        self._max_tokens = max_tokens
        self._clock = clock
        self._graphs: dict[PassKey, _Graph] = {}  # oldest first
        self._turn = threading.Lock()  # `expire` may come from another thread
        self._token_bytes = 0.0  # of a graph, for a token in a block: the largest measured

    @property
    def kept_bytes(self) -> int:
        """Bytes of all graphs kept now."""
        with self._turn:
            return sum(graph.nbytes for graph in self._graphs.values())

    @overload
    def run(self, message: Forward) -> ForwardDone: ...
    @overload
    def run(self, message: Backward) -> BackwardDone: ...
    def run(self, message: Forward | Backward) -> ForwardDone | BackwardDone:
        """The answer to `message`. Raises `WrongModel`, `BadStep`, `ContextTooLong`, and `UnknownSession` for a
        `Backward` without hidden states whose graph is not here (any more).
        """
        started = time.perf_counter()
        self.expire()
        self._check_terms(message)
        with torch.inference_mode(False):
            done = self._forward(message) if isinstance(message, Forward) else self._backward(message)
        milliseconds = (time.perf_counter() - started) * 1e3
        if isinstance(done, torch.Tensor):
            return BackwardDone(to_wire(done), milliseconds)
        output, kept = done
        return ForwardDone(to_wire(output), kept, milliseconds)

    def expire(self) -> None:
        """Drop graphs that nobody has come back for. Safe from any thread; called by every `run` too."""
        now = self._clock()
        with self._turn:
            for key in [key for key, graph in self._graphs.items() if graph.until <= now]:
                del self._graphs[key]

    # ---- what is asked -------------------------------------------------------------------------------------------

    def _check_terms(self, message: Forward | Backward) -> None:
        span = self._span
        if (message.model, message.fingerprint) != (span.name, span.fingerprint):
            raise WrongModel(f"this host serves {span.name} ({span.fingerprint}), not {message.model}")
        if not span.start <= message.start < message.end <= span.end:
            raise WrongModel(f"blocks {span.start}:{span.end} are served here, not {message.start}:{message.end}")
        if message.prompts is not None or message.adapter or message.codec != "none":
            raise BadStep("this host takes no prompts, adapters or codecs in training")

    def _check(self, what: str, tensor: torch.Tensor) -> None:
        if tensor.dim() != 3 or 0 in tensor.shape or tensor.shape[2] != self._span.hidden_size:
            raise BadStep(f"{what} of shape {tuple(tensor.shape)} instead of (rows, tokens, {self._span.hidden_size})")
        if not tensor.is_floating_point():
            raise BadStep(f"{what} of dtype {str(tensor.dtype).removeprefix('torch.')}")
        rows, tokens = tensor.shape[:2]
        if tokens > self._span.context_length:
            raise ContextTooLong(f"{tokens} tokens are more than the {self._span.context_length} of the context")
        if rows * tokens > self._max_tokens:
            text = f"{rows} rows of {tokens} tokens are more than the {self._max_tokens} tokens of one pass"
            raise BadStep(f"{text}: send fewer rows", limit=self._max_tokens)
        if not bool(torch.isfinite(tensor).all()):
            raise BadStep(f"{what} that are not finite (NaN or infinity)")

    def _hidden(self, message: Forward | Backward) -> torch.Tensor:
        assert message.hidden is not None
        hidden = from_wire(message.hidden)
        self._check("hidden states", hidden)
        padding = message.padding
        if padding and (len(padding) != hidden.shape[0] or max(padding) >= hidden.shape[1]):
            raise BadStep(f"padding {padding} does not fit {hidden.shape[0]} rows of {hidden.shape[1]} tokens")
        return hidden

    # ---- computing -----------------------------------------------------------------------------------------------

    def _forward(self, message: Forward) -> tuple[torch.Tensor, bool]:
        hidden = self._hidden(message)
        size = hidden.shape[0] * hidden.shape[1] * (message.end - message.start)
        guess = int(self._token_bytes * size)
        if message.keep is None or guess > self._keep_bytes or self._keep_bytes == 0:
            with torch.inference_mode():
                return self._span.differentiable(hidden, message.start, message.end, message.padding), False
        self._make_room(guess)
        graph = self._graph(hidden, message)
        self._token_bytes = max(self._token_bytes, graph.nbytes / size)
        kept = graph.nbytes <= self._keep_bytes
        if kept:
            with self._turn:
                self._graphs.pop(message.keep, None)
            self._make_room(graph.nbytes)
            with self._turn:
                self._graphs[message.keep] = graph
        return graph.output.detach(), kept

    def _backward(self, message: Backward) -> torch.Tensor:
        grad = from_wire(message.grad)
        self._check("gradients", grad)
        graph = self._take(message)
        if graph is None:
            hidden = self._hidden(message)
            if hidden.shape != grad.shape:
                raise BadStep(f"gradients of shape {tuple(grad.shape)} for hidden states of {tuple(hidden.shape)}")
            graph = self._graph(hidden, message)
        (result,) = torch.autograd.grad(graph.output, graph.leaf, grad.to(graph.output.device, graph.output.dtype))
        return result

    def _take(self, message: Backward) -> _Graph | None:
        """The kept graph of `message`, which is used up by it; None if there is none but hidden states came along."""
        with self._turn:
            graph = self._graphs.get(message.keep) if message.keep is not None else None
            if graph is None:
                if message.hidden is None:
                    raise UnknownSession("that forward is not kept here (any more): send its hidden states again")
                return None
            if (graph.start, graph.end) != (message.start, message.end):
                raise BadStep(f"blocks {graph.start}:{graph.end} were kept, not {message.start}:{message.end}")
            if graph.leaf.shape != torch.Size(message.grad.shape):
                raise BadStep(f"gradients of shape {message.grad.shape}, kept were {tuple(graph.leaf.shape)}")
            assert message.keep is not None
            return self._graphs.pop(message.keep)

    def _graph(self, hidden: torch.Tensor, message: Forward | Backward) -> _Graph:
        leaf = hidden.to(self._span.device, self._span.dtype).detach().requires_grad_()
        saved: dict[int, int] = {}  # bytes of each storage

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # an output that held its own node would never be freed

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = self._span.differentiable(leaf, message.start, message.end, message.padding)
        for tensor in (leaf, output):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        nbytes = sum(size for storage, size in saved.items() if storage not in self._weights)
        return _Graph(message.start, message.end, leaf, output, nbytes, self._clock() + KEEP_SECONDS)

    @functools.cached_property
    def _weights(self) -> frozenset[int]:
        return frozenset(tensor.untyped_storage().data_ptr() for tensor in self._span.weights())

    def _make_room(self, nbytes: int) -> None:
        with self._turn:
            used = sum(graph.nbytes for graph in self._graphs.values())
            while self._graphs and used + nbytes > self._keep_bytes:
                used -= self._graphs.pop(next(iter(self._graphs))).nbytes
