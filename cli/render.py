"""Values to text. Pure: no input or output."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from swarmlm.config import DEFAULT_MODEL, format_size


def serve_banner(handle: Any, model: str, addresses: Sequence[str]) -> str:
    """What a ready host prints: what it serves, where, and how others join."""
    weights = handle.dtype if handle.quant == "none" else f"{handle.quant} weights"
    name = "" if model == DEFAULT_MODEL else f"{model} "
    lines = [
        f"serving blocks {handle.start}:{handle.end} of {handle.model} ({handle.blocks} blocks, {weights}, "
        f"{format_size(handle.kv_total)} for KV caches, {handle.block_ms:.2f} ms a block)",
        *(f"address: {address}" for address in addresses),
        f"to join: swarmlm serve {name}--peers {addresses[0]} --blocks A:B",
        f"to chat: swarmlm chat {name}--peers {addresses[0]}",
    ]
    return "\n".join(lines)


def answer_json(result: Any, route: Sequence[Any], failovers: int) -> str:
    """One line for `chat --json`."""
    return json.dumps(
        {
            "text": result.text,
            "tokens": result.tokens,
            "tokens_per_second": round(result.tokens_per_second, 3),
            "route": [{"peer": hop.peer, "start": hop.start, "end": hop.end, "ms": round(hop.ms, 3)} for hop in route],
            "failovers": failovers,
        },
        ensure_ascii=False,
    )


def route_table(route: Sequence[Any]) -> str:
    rows = [(f"{hop.start}:{hop.end}", hop.peer, f"{hop.ms:.1f} ms") for hop in route]
    return table(("blocks", "peer", "a step"), rows)


def stats_table(stats: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in stats.items())


def status_table(status: Any) -> str:
    """Hosts, then what they cover."""
    rows = [
        (
            f"{host.start}:{host.end}",
            host.peer,
            host.state,
            f"{format_size(host.kv_free)} of {format_size(host.kv_total)}",
            str(host.sessions),
            str(host.queue),
            f"{host.block_ms:.2f}",
            f"{host.rtt_ms:.1f}" if host.rtt_ms is not None else "-",
            host.dtype,
        )
        for host in sorted(status.hosts, key=lambda host: (host.start, host.end, host.peer))
    ]
    heads = ("blocks", "peer", "state", "free KV", "sessions", "queue", "ms/block", "rtt ms", "dtype")
    spans = ", ".join(f"{start}:{end} x{replicas}" for start, end, replicas in status.coverage if replicas)
    holes = ", ".join(f"{start}:{end}" for start, end in status.holes)
    summary = f"{status.model}: {status.blocks} blocks; covered {spans or 'nowhere'}"
    summary += f"; nobody serves {holes}" if holes else "; complete"
    return f"{table(heads, rows)}\n{summary}" if rows else summary


def status_json(status: Any) -> str:
    return json.dumps(
        {
            "model": status.model,
            "blocks": status.blocks,
            "hosts": [{name: getattr(host, name) for name in host.__dataclass_fields__} for host in status.hosts],
            "coverage": status.coverage,
            "holes": status.holes,
        }
    )


REPORT_HEADS = ("what", "median", "unit", "quartiles", "compared")


def report_table(report: Any) -> str:
    """A benchmark's rows, then its conditions."""
    lines = [report.title, "", table(REPORT_HEADS, _report_rows(report))]
    return "\n".join([*lines, *(("", *report.notes) if report.notes else ())])


def report_markdown(report: Any) -> str:
    rows = [REPORT_HEADS, ("---",) * len(REPORT_HEADS), *_report_rows(report)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"{report.title}.\n", *lines, "", *(f"{note}\n" for note in report.notes)])


def _report_rows(report: Any) -> list[tuple[str, ...]]:
    return [
        (
            row.what,
            figure(row.value.median),
            row.unit,
            f"{figure(row.value.low)} .. {figure(row.value.high)}" if row.value.count > 1 else "",
            f"{figure(row.ratio)} {row.against}" if row.ratio is not None else row.against,
        )
        for row in report.rows
    ]


def figure(value: float) -> str:
    """Three digits that matter: 0.0123, 1.23, 12.3, 1,234."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    return "\n".join(line.rstrip() for line in lines)
