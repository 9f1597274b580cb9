"""Concurrent calls of the output head are computed together, and nobody gets another's logits."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import nn

from swarmlm.models.client import load_client_model
from swarmlm.models.shared_head import MAX_SHARED_ROWS, SharedHead, share_head
from swarmlm.models.source import open_source
from tests.tiny import tiny_llama

HIDDEN, WORDS = 24, 50


class Holder(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def shared(*, bias: bool = False) -> SharedHead:
    torch.manual_seed(0)
    holder = Holder(nn.Linear(HIDDEN, WORDS, bias=bias).requires_grad_(False))
    share_head(holder)
    assert isinstance(holder.head, SharedHead)
    return holder.head


def together(head: SharedHead, works: list[Callable[[], object]]) -> list[int]:
    """Run all while the head is busy, so that they meet; the row counts of the matmuls that followed."""
    sizes: list[int] = []
    compute = head._compute

    def noting(calls: list[object]) -> None:
        sizes.append(sum(call.rows.shape[0] for call in calls))  # type: ignore[attr-defined]
        compute(calls)  # type: ignore[arg-type]

    head._compute = noting  # type: ignore[assignment, method-assign]
    threads = [threading.Thread(target=work) for work in works]
    with head.meeting.busy:
        for number, thread in enumerate(threads, start=1):
            thread.start()
            while len(head.meeting.waiting) < number:
                thread.join(0.001)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    del head._compute
    return sizes


@pytest.mark.parametrize("bias", [False, True])
def test_calls_that_meet_are_one_matmul_and_each_gets_its_own(bias: bool) -> None:
    head = shared(bias=bias)
    inputs = [torch.randn(1 + number % 3, 1, HIDDEN) for number in range(12)]
    outputs: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        outputs[number] = head(inputs[number])

    sizes = together(head, [functools.partial(work, number) for number in range(12)])
    assert sizes == [sum(one.shape[0] for one in inputs)]
    for number, given in enumerate(inputs):
        assert outputs[number].shape == (given.shape[0], 1, WORDS)
        assert torch.allclose(outputs[number], nn.functional.linear(given, head.weight, head.bias), atol=1e-6)


def test_one_alone_computes_what_a_linear_does() -> None:
    head = shared()
    for shape in ((HIDDEN,), (1, HIDDEN), (2, 3, HIDDEN), (1, MAX_SHARED_ROWS + 1, HIDDEN), (0, HIDDEN)):
        given = torch.randn(shape)
        assert torch.equal(head(given), nn.functional.linear(given, head.weight))


def test_a_full_matmul_leaves_the_rest_for_the_next() -> None:
    head = shared()
    half = torch.randn(MAX_SHARED_ROWS // 2 + 1, HIDDEN)
    outputs: list[torch.Tensor] = []
    sizes = together(head, [lambda: outputs.append(head(half)) for _ in range(3)])
    assert sizes == [half.shape[0]] * 3
    assert all(torch.allclose(each, half @ head.weight.T, atol=1e-6) for each in outputs)


def test_what_cannot_be_computed_is_its_own_callers_error() -> None:
    head = shared()
    outcomes: dict[str, object] = {}

    def call(name: str, rows: torch.Tensor) -> None:
        try:
            outcomes[name] = head(rows)
        except RuntimeError as error:
            outcomes[name] = error

    good = torch.randn(1, HIDDEN)
    together(head, [lambda: call("good", good), lambda: call("wide", torch.randn(1, HIDDEN + 1))])
    assert isinstance(outcomes["wide"], RuntimeError)
    assert isinstance(outcomes["good"], torch.Tensor)


def test_modes_do_not_leak_from_one_caller_to_another() -> None:
    head = shared()
    outputs: dict[str, torch.Tensor] = {}

    def infer() -> None:
        with torch.inference_mode():
            outputs["inferring"] = head(torch.randn(1, HIDDEN))

    def plain() -> None:
        outputs["plain"] = head(torch.randn(1, HIDDEN))

    assert together(head, [infer, plain]) == [2]
    assert not outputs["plain"].is_inference()
    outputs["plain"].add_(1)


def test_gradients_flow_as_through_a_linear() -> None:
    head = shared()
    given = torch.randn(2, HIDDEN, requires_grad=True)
    head(given).sum().backward()
    assert given.grad is not None
    assert torch.allclose(given.grad, head.weight.sum(0).expand(2, -1))
    with torch.no_grad():
        assert not head(given).requires_grad


def test_only_plain_linears_are_shared_and_copies_are_on_their_own() -> None:
    holder = Holder(nn.Sequential())
    share_head(holder)
    assert type(holder.head) is nn.Sequential
    head = shared()
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert twin.meeting is not head.meeting
        assert torch.equal(twin(torch.ones(1, HIDDEN)), head(torch.ones(1, HIDDEN)))
    assert list(head.state_dict()) == ["weight"]


def test_a_client_model_shares_its_head_and_keeps_it_tied(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "tiny", tie_word_embeddings=True)

    def none(batch: int, max_length: int) -> NoReturn:
        raise AssertionError

    model = load_client_model(open_source(str(tmp_path / "tiny")), open_session=none)
    assert isinstance(model.get_output_embeddings(), SharedHead)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
