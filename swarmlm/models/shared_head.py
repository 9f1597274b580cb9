"""One output head for many sessions: calls that meet in it run as one matmul. Put in place by `models.client`.

The head is the client's largest weight, and a decode step of one session reads all of it for one row. Sessions of one
process decode in threads of their own; whoever finds the head busy leaves its rows, and the next one in computes for
all that wait:

    thread 1   |--- row 1 ---|
    thread 2       waits     |--- rows 2 3 4 ---|
    thread 3         waits                      | done
    thread 4           waits                    | done

Nobody waits for company: one session alone computes at once, whichever way is the faster one here. Rows of a batch may
differ from those of single calls in the last bits, as batches on hosts do.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from swarmlm.kernels.linear import SKINNY_ROWS, skinny_pays, skinny_product

MAX_SHARED_ROWS = 64  # of one matmul, and of a call that joins others: logits of 64 rows are 13 MB at 50,000 words


class _Call:
    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.done = False
        self.logits: torch.Tensor | None = None
        self.error: Exception | None = None


class _Meeting:
    """Calls that wait for the head. Copies and pickles of a model have a meeting of their own."""

    def __init__(self) -> None:
        self.busy = threading.Lock()  # held while the head computes
        self.door = threading.Lock()  # held for moments: guards `waiting`
        self.waiting: list[_Call] = []

    def __reduce__(self) -> tuple[type[_Meeting], tuple[()]]:
        return _Meeting, ()


class SharedHead(nn.Linear):
    """An `nn.Linear` whose concurrent calls of a few rows and without gradients are computed together."""

    meeting: _Meeting
    skinny: bool  # whether `skinny_product` is the faster one here

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [..., vocabulary]."""
        rows = input.reshape(-1, input.shape[-1])
        if not 0 < rows.shape[0] <= MAX_SHARED_ROWS or (torch.is_grad_enabled() and self._wants_gradients(input)):
            return super().forward(input)
        call = _Call(rows)
        with self.meeting.door:
            self.meeting.waiting.append(call)
        with self.meeting.busy:
            if not call.done:
                self._compute(self._take(call))
        if call.error is not None:
            raise call.error
        assert call.logits is not None
        return call.logits.reshape(*input.shape[:-1], self.out_features)

    def _wants_gradients(self, input: torch.Tensor) -> bool:
        return input.requires_grad or any(parameter.requires_grad for parameter in self.parameters())

    def _take(self, mine: _Call) -> list[_Call]:
        """Our call and those that wait and fit beside it, oldest first."""
        taken, left = [mine], list[_Call]()
        rows = mine.rows.shape[0]
        with self.meeting.door:
            for call in self.meeting.waiting:
                fits = rows + call.rows.shape[0] <= MAX_SHARED_ROWS and _alike(call.rows, mine.rows)
                if call is mine:
                    continue
                (taken if fits else left).append(call)
                rows += call.rows.shape[0] if fits else 0
            self.meeting.waiting = left
        return taken

    def _compute(self, calls: list[_Call]) -> None:
        try:
            with torch.inference_mode(False), torch.no_grad():  # a waiting caller may be in another mode than we are
                rows = calls[0].rows if len(calls) == 1 else torch.cat([call.rows for call in calls])
                if self.skinny and rows.shape[0] <= SKINNY_ROWS:
                    logits = skinny_product(rows, self.weight)
                else:
                    logits = functional.linear(rows, self.weight, self.bias)
            parts = torch.split(logits, [call.rows.shape[0] for call in calls])
            for call, part in zip(calls, parts, strict=True):
                call.logits = part
        except Exception as error:
            for call in calls:
                call.error = error
        for call in calls:
            call.done = True


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape[1] == other.shape[1] and one.dtype == other.dtype and one.device == other.device


def share_head(model: Any) -> None:
    """Let the sessions of `model` share its output head if that is a plain `nn.Linear`. Weights stay where they are."""
    head: Any = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = SharedHead
        shared: Any = head
        shared.meeting = _Meeting()
        shared.skinny = head.bias is None and not head.weight.is_meta and skinny_pays(head.weight)
