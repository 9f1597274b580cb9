"""The commands' grammar, their one-line errors, and what they print."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from swarmlm.cli import main
from swarmlm.cli.docs import commands_page
from swarmlm.cli.failures import one_line
from swarmlm.cli.parser import make_parser
from swarmlm.cli.render import answer_json, route_table, serve_banner, status_json, status_table
from swarmlm.cli.serve import config_of

from swarmlm.config import format_size, parse_addresses, parse_size, parse_span
from swarmlm.errors import BadSpan, ConfigError, NoRoute
from swarmlm.hosting import HostHandle
from swarmlm.node import HostRow, SwarmStatus
from swarmlm.protocol import PeerId
from swarmlm.routing.graph import RouteHop
from swarmlm.session import GenerationResult
from tests import ROOT

ADDRESS = "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWabc"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("1k", 1024),
        ("512MiB", 512 * 2**20),
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        (" 7 mb ", 7 * 10**6),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1 XB", "1e9", "GB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert [format_size(size) for size in (0, 1023, 1536, 3 * 2**29, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1.5 GiB",
        "5.0 TiB",
    ]


def test_spans() -> None:
    assert parse_span("0:12") == range(12)
    for bad in ("20:10", "5:5", "1", "a:b", "-1:3", "1:2:3"):
        with pytest.raises(BadSpan, match=bad.replace(":", ":")):
            parse_span(bad)


def test_addresses() -> None:
    assert parse_addresses(f"{ADDRESS}, {ADDRESS}") == (ADDRESS, ADDRESS)
    for bad in ("", "localhost:4001", "/ip4/127.0.0.1/tcp/4001"):
        with pytest.raises(ConfigError, match="address"):
            parse_addresses(bad)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--blocks", "20:10"], "20:10"),
        (["serve", "--kv-memory", "lots"], "lots"),
        (["serve", "--threads", "0"], "--threads 0"),
        (["serve", "--peers", "nowhere"], "nowhere"),
        (["serve", "--quant", "int3"], "int3"),
        (["chat", "--json"], "--prompt"),
        (["chat", "--codec", "zip"], "zip"),
        (["chat", "--max-tokens", "0"], "--max-tokens 0"),
        (["chat", "--temperature", "-1"], "--temperature -1"),
        (["status", "--peers", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line_and_exit_1(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("swarmlm: error: ")
    assert err.count("\n") == 1
    assert words in err


def test_a_bug_keeps_its_traceback_and_an_error_in_a_group_is_found() -> None:
    assert one_line(ValueError("bug")) is None
    assert one_line(ExceptionGroup("", [ValueError("bug")])) is None
    assert one_line(ExceptionGroup("", [ExceptionGroup("", [NoRoute("no\nhost")])])) == "no host"


def test_serve_arguments_become_a_config() -> None:
    arguments = make_parser().parse_args(["serve", "--blocks", "0:12", "--kv-memory", "1GiB", "--peers", ADDRESS])
    config = config_of(arguments)
    assert config.model == "smollm2"
    assert config.blocks == range(12)
    assert config.kv_memory == 2**30
    assert config.peers == (ADDRESS,)
    assert config.listen == "/ip4/127.0.0.1/tcp/0"


def test_the_banner_names_the_command_that_joins() -> None:
    handle = HostHandle("smollm2", 0, 15, 30, "float32", 2**30, 1.5)
    text = serve_banner(handle, "smollm2", [ADDRESS])
    assert f"swarmlm serve --peers {ADDRESS}" in text
    assert f"swarmlm serve my/model --peers {ADDRESS}" in serve_banner(handle, "my/model", [ADDRESS])


def test_an_answer_as_json() -> None:
    line = answer_json(GenerationResult("é\n", [1, 2], 0.5), [RouteHop(PeerId("a"), 0, 30, 1.23456)], 2)
    assert "\n" not in line
    assert json.loads(line) == {
        "text": "é\n",
        "tokens": [1, 2],
        "tokens_per_second": 4.0,
        "route": [{"peer": "a", "start": 0, "end": 30, "ms": 1.235}],
        "failovers": 2,
    }


HOST = HostRow("peer-a", 0, 18, "online", 2**20, 2**30, 1, 2, 1.5, 0.8, "float32", (ADDRESS,))


def test_status_names_hosts_and_holes() -> None:
    status = SwarmStatus("m", 30, [HOST], [(0, 18, 1), (18, 30, 0)], [(18, 30)])
    text = status_table(status)
    assert "0:18" in text
    assert "1.0 MiB of 1.0 GiB" in text
    assert "nobody serves 18:30" in text
    whole = status_table(replace(status, coverage=[(0, 30, 1)], holes=[]))
    assert whole.endswith("complete")
    assert json.loads(status_json(status))["hosts"][0]["start"] == 0
    assert "nowhere" in status_table(SwarmStatus("m", 30, [], [(0, 30, 0)], [(0, 30)]))


def test_a_route_is_a_table() -> None:
    lines = route_table([RouteHop(PeerId("peer-a"), 0, 15, 3.14), RouteHop(PeerId("b"), 15, 30, 10.0)]).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["0:15", "peer-a", "3.1", "ms"]


def test_help_teaches_by_example(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["serve", "--help"], ["chat", "--help"], ["status", "--help"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0
        assert "examples:" in capsys.readouterr().out


def test_the_commands_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == commands_page(), "run `make docs`"
