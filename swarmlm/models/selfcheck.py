"""Whether two ways of computing a span agree: the same random tokens through both, in every kind of step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swarmlm.models.jobs import SpanJob

if TYPE_CHECKING:
    from swarmlm.models.span import Span

CLOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}  # of the largest value: rounding, not errors
ROUGH = 5e-2  # of the largest value: quantised weights, whose kernels round activations too


def sample(span: Span) -> torch.Tensor:
    """Outputs of a padded prefill, decode steps of one and of two sessions, and a prompt's second part: [values]."""
    generator = torch.Generator().manual_seed(0)

    def tokens(rows: int, count: int) -> torch.Tensor:
        return torch.randn(rows, count, span.hidden_size, generator=generator)

    pair, single, other = span.open(2, 16), span.open(1, 16), span.open(2, 16)
    padding = (0, 2)
    steps = [
        [SpanJob(pair, tokens(2, 5), 0, padding)],
        [SpanJob(single, tokens(1, 9), 0)],
        [SpanJob(pair, tokens(2, 1), 5, padding), SpanJob(single, tokens(1, 1), 9)],
        [SpanJob(single, tokens(1, 1), 10), SpanJob(pair, tokens(2, 3), 6, padding)],
        [SpanJob(single, tokens(1, 2), 4)],
        [SpanJob(other, tokens(2, 1), 0)],
        [SpanJob(other, tokens(2, 1), 1), SpanJob(single, tokens(1, 1), 6)],
        [SpanJob(single, tokens(1, 1), 5)],
    ]
    seen = []
    for jobs in steps:
        for job, output in zip(jobs, span.run(jobs), strict=True):
            first = max(job.padding, default=0) if job.position == 0 else 0
            seen.append(output[:, first:].float().cpu().reshape(-1))  # what padding computes is nobody's business
    return torch.cat(seen)


def cuts_matter(span: Span) -> bool:
    """Whether a family computes other numbers when a prompt comes in two parts: some forget their recurrent state.

    Such a family is given what follows a prefix one token at a time.
    """
    if span.plain:
        return False
    tokens = torch.randn(1, 7, span.hidden_size, generator=torch.Generator().manual_seed(0))
    [whole] = span.run([SpanJob(span.open(1, 8), tokens, 0)])
    cache = span.open(1, 8)
    parts = [span.run([SpanJob(cache, tokens[:, start:end], start)])[0] for start, end in ((0, 4), (4, 7))]
    return differs(torch.cat(parts, dim=1).float().cpu(), whole.float().cpu(), span.dtype)


def differs(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, *, rough: bool = False) -> bool:
    """Whether `found` is further from `expected` than rounding explains."""
    allowed = (ROUGH if rough else CLOSE.get(dtype, ROUGH)) * max(1e-6, float(expected.abs().max()))
    return not float((found - expected).abs().max()) <= allowed
