"""Benchmarks that need processes, as short as they go: what they find is not judged here, only that they find it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swarmlm.models.source import open_source
from tests.net.harness import run_cli
from tests.tiny import tiny_llama


def bench(*arguments: str) -> dict[str, Any]:
    done = run_cli("bench", *arguments, "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["name"] == arguments[0]
    assert all(row["value"]["low"] <= row["value"]["median"] <= row["value"]["high"] for row in report["rows"])
    return report


def test_decode_over_real_hosts_has_the_tokens_of_local_transformers(tmp_path: Path) -> None:
    """A tiny random model that speaks the default model's tokens."""
    tokenizer = open_source("smollm2").tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tiny_llama(tmp_path, vocab_size=len(tokenizer))
    report = bench("decode", "--model", str(tmp_path), "--tokens", "16")
    rows = {row["what"].partition(":")[0].partition(",")[0]: row for row in report["rows"]}
    swarm, floor, equal = rows["swarm"], rows["reading its float32 weights once"], rows["tokens as the reference's"]
    assert swarm["unit"] == "ms/token"
    assert swarm["ratio"] > 0
    assert swarm["value"]["median"] > floor["value"]["median"] > 0
    assert equal["unit"] == "of 16"
    assert equal["value"]["median"] == 16


def test_a_hop_is_compared_with_tcp_and_stock_libp2p() -> None:
    report = bench("hop")
    echo = {row["what"].partition(", ")[2]: row for row in report["rows"] if row["unit"] == "us"}
    bulk = {row["what"].partition(", ")[2]: row for row in report["rows"] if row["unit"] == "MB/s"}
    assert set(echo) == set(bulk) == {"bare TCP (trio)", "swarmlm", "stock py-libp2p"}
    assert echo["swarmlm"]["value"]["count"] >= 100
    assert echo["swarmlm"]["ratio"] == echo["swarmlm"]["value"]["median"] / echo["bare TCP (trio)"]["value"]["median"]
    assert all(row["value"]["low"] > 0 for row in bulk.values())
    assert bulk["stock py-libp2p"]["ratio"] is None
