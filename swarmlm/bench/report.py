"""What a benchmark found: rows of measured values, each beside the reference measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing: their median and quartiles."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))


@dataclass(frozen=True)
class Row:
    """One line of a report. `ratio` compares with `against`, in the direction that its text says."""

    what: str
    value: Sample
    unit: str
    ratio: float | None = None
    against: str = ""


@dataclass
class Report:
    """One benchmark's table. `notes` are conditions a reader needs: threads, sizes, what was compared."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self, what: str, values: Sequence[float] | Sample, unit: str, *, ratio: float | None = None, against: str = ""
    ) -> Row:
        sample = values if isinstance(values, Sample) else Sample.of(values)
        row = Row(what, sample, unit, ratio, against)
        self.rows.append(row)
        return row

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def alternate(repeats: int, **sides: Callable[[], float]) -> dict[str, list[float]]:
    """Measure every side once a round, `repeats` rounds, so that a slow moment of the machine meets all of them.

    A side is a function that does one measurement and returns it (seconds, or whatever its unit is).
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            found[name].append(measure())
    return found


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work()` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
