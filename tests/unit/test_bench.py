"""Benchmarks: the maths of a report, how it is shown, and the ones that need no other process."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from swarmlm.cli import main
from swarmlm.cli.bench import options_of
from swarmlm.cli.benchmarks import measure, page, runs
from swarmlm.cli.parser import make_parser
from swarmlm.cli.render import figure, report_markdown, report_table

from swarmlm.bench import decode, plan
from swarmlm.bench.decode import perplexity
from swarmlm.bench.options import NAMES, BenchOptions
from swarmlm.bench.reference import Reference, compute_threads, gaps, prose
from swarmlm.bench.report import Report, Sample, alternate
from swarmlm.errors import ConfigError
from tests.tiny import tiny_llama


def a_report() -> Report:
    report = Report("decode", "Decoding", notes=["One thread."])
    report.add("swarm", [2.0, 4.0, 3.0], "ms", ratio=1.5, against="x local")
    report.add("local", [2.0], "ms")
    return report


def test_a_sample_is_a_median_with_quartiles() -> None:
    assert Sample.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Sample(3.0, 2.0, 4.0, 5)
    assert Sample.of([7.0]) == Sample(7.0, 7.0, 7.0, 1)
    assert Sample.of([1.0, 2.0]).median == 1.5


def test_sides_are_measured_in_turn() -> None:
    order: list[str] = []

    def side(name: str) -> Any:
        def measure() -> float:
            order.append(name)
            return float(len(order))

        return measure

    assert alternate(2, a=side("a"), b=side("b")) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert order == ["a", "b", "a", "b"]


def test_a_report_as_a_table_json_and_markdown() -> None:
    report = a_report()
    lines = report_table(report).splitlines()
    assert lines[0] == "Decoding"
    assert lines[3].split() == ["swarm", "3.00", "ms", "2.50", "..", "3.50", "1.50", "x", "local"]
    assert lines[4].split() == ["local", "2.00", "ms"]
    assert lines[-1] == "One thread."
    fields = json.loads(json.dumps(report.as_json()))
    assert fields["rows"][0]["value"] == {"median": 3.0, "low": 2.5, "high": 3.5, "count": 3}
    again = json.loads(json.dumps(fields), object_hook=lambda values: SimpleNamespace(**values))
    assert report_markdown(again) == report_markdown(report)
    assert "| swarm | 3.00 | ms | 2.50 .. 3.50 | 1.50 x local |" in report_markdown(report)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.012345, "0.0123"), (1.2345, "1.23"), (99.94, "99.9"), (1234.5, "1,234"), (-0.5, "-0.500")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_every_benchmark_has_a_module_and_a_place_on_the_page() -> None:
    for name in NAMES:
        assert importlib.util.find_spec(f"swarmlm.bench.{name}") is not None, name
    assert [arguments[0] for arguments in dict.fromkeys((run[:1]) for run in runs())] == list(NAMES)


def test_arguments_become_options() -> None:
    arguments = make_parser().parse_args(
        ["bench", "decode", "--model", "my/model", "--quant", "int8", "--tokens", "9", "--hosts", "3"]
    )
    options = options_of(arguments)
    assert (options.model, options.quant, options.tokens, options.hosts) == ("my/model", "int8", 9, 3)
    assert (options.threads, options.repeats) == (1, None)


@pytest.mark.parametrize("flag", ["--tokens", "--repeats", "--hosts", "--threads", "--rtt", "--mbit"])
def test_no_count_is_below_one(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} 0"):
        options_of(make_parser().parse_args(["bench", "plan", flag, "0"]))


def test_the_plan_benchmark_through_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "plan", "--hosts", "60", "--repeats", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "60 and 600 hosts" in err
    report = json.loads(out)
    assert report["name"] == "plan"
    few, many = report["rows"]
    assert 0 < few["value"]["low"] <= few["value"]["median"] <= few["value"]["high"]
    assert many["ratio"] == pytest.approx(many["value"]["median"] / few["value"]["median"])
    assert main(["bench", "plan", "--hosts", "1"]) == 1
    assert "fewer than 2 hosts" in capsys.readouterr().err


def test_ten_thousand_hosts_are_planned_in_time() -> None:
    hosts = plan.random_hosts(10_000, plan.BLOCKS)
    assert hosts == plan.random_hosts(10_000, plan.BLOCKS)
    quickest = min(plan.timed(lambda: plan.plan(hosts, 0, plan.BLOCKS)) for _ in range(4))
    assert quickest * 1e3 <= plan.LIMITS_MS[1]


def test_a_benchmark_that_fails_says_so_on_the_page() -> None:
    section = measure(("plan", "--repeats", "0"))
    reason = "--repeats 0 is out of range: it must be above 0 and at most 1,000,000"
    assert section == f"## swarmlm bench plan --repeats 0\n\nDid not run: {reason}\n"
    text = page([section])
    assert text.startswith("# Benchmarks\n")
    assert torch.__version__ in text
    assert text.endswith(section)


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary() -> None:
    def uniform(ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(1, ids.shape[1], 50))

    assert perplexity(uniform, torch.arange(11)[None], 4) == pytest.approx(50.0)
    assert not math.isnan(perplexity(uniform, torch.arange(9)[None], 4))  # a last window of one token scores nothing


def test_the_shipped_prose_is_there() -> None:
    assert prose().startswith("Alice was beginning to get very tired")
    assert 1200 <= len(prose().split()) <= 1500


def test_threads_are_given_back_and_gaps_are_between_moments() -> None:
    before = torch.get_num_threads()
    with compute_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    assert gaps([1.0, 1.5, 3.0]) == [0.5, 1.5]
    assert gaps([]) == []


def test_where_an_answer_leaves_the_reference(tmp_path: Path) -> None:
    """A tiny random checkpoint, whole; only its tokenizer is missing, which `difference` does without."""
    reference = Reference.__new__(Reference)
    reference.model = tiny_llama(tmp_path)
    ids = [5, 9, 2]
    expected, times = reference.decode(ids, 6, threads=1)
    assert len(expected) == 6
    assert len(times) == 5
    assert reference.difference(ids, expected, list(expected)) is None
    other = [*expected[:4], (expected[4] + 1) % 96, expected[5]]
    found = reference.difference(ids, expected, other)
    assert found is not None
    assert found[0] == 4
    assert found[1] > 0
    assert reference.difference(ids, expected, expected[:5]) is not None
    assert reference.weight_bytes == sum(each.numel() for each in reference.model.parameters()) * 4
    assert reference.read_weights(threads=1) > 0


async def test_a_benchmark_is_quiet_unless_asked() -> None:
    shown: list[str] = []
    report = await plan.run(BenchOptions(hosts=20, repeats=1, progress=shown.append))
    assert shown == ["planning over 20 and 200 hosts"]
    assert [row.value.count for row in report.rows] == [1, 1]


async def test_a_decode_of_too_few_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="--tokens 2 is too few"):
        await decode.run(BenchOptions(tokens=2))
