"""The fastest chain of hosts over a span of blocks, exactly. Pure functions over `HostView`s.

    best[b] = min over hosts h serving block b-1, over entries a:  best[a] + fixed_ms[h] + block_ms[h] * (b - a)

where a hop has at most `max_blocks` of h and lies within its span. For each host the entries form a window that slides
along with b; its minimum of best[a] - a * block_ms comes from a table of minima over power-of-two stretches, grown as
best[a] becomes known: O(hosts x blocks x log window), vectorised over the hosts.

Times are rounded to TICK_MS and every hop costs HOP_MS more, so that sums in float64 are exact, ties are real ties, and
among equals the fewest hops win, then the smallest peer id at the last hop.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from swarmlm.errors import BadSpan, NoRoute
from swarmlm.protocol import PeerId
from swarmlm.routing.graph import HostView, PathHop

TICK_MS = 2.0**-20  # milliseconds, about 1 ns: finer than any clock that measured them
MAX_PLANS = 200  # paths tried for a swarm whose memory is nearly full: about a second with a thousand hosts
HOP_MS = 2.0**-32  # milliseconds: 4096 hops, the most there can be, stay under one TICK_MS

Interval = tuple[int, int]
_Floats = NDArray[np.float64]


def plan(hosts: Sequence[HostView], start: int, end: int) -> list[PathHop]:
    """The chain over blocks [start, end) with the least total of rtt_ms + queue_ms + block_ms * blocks.

    Raises `NoRoute` with the detail `missing` (blocks that no host serves, "7:8, 20:30") or `full` (blocks whose hosts
    have no KV memory left for the session; with `needed` and `free` in bytes if the views tell), and `BadSpan`.
    A host used in several hops has memory for all of them together. When the least path breaks this, the least of those
    is taken whose hops of one host lie within `max_blocks` of each other.
    """
    if not 0 <= start < end:
        raise BadSpan(f"blocks {start}:{end} are no span")
    serving = [host for host in hosts if max(host.start, start) < min(host.end, end) and _sane(host)]
    usable = sorted((host for host in serving if host.max_blocks > 0), key=lambda host: host.peer)
    if shortage := _shortage(serving, usable, start, end):
        raise shortage
    path = _least(usable, start, end)
    if _crowded(path, usable) is None:
        return path
    return _least_within_memory(path, usable, start, end)


def coverage(spans: Iterable[Interval], blocks: int) -> list[tuple[int, int, int]]:
    """(start, end, replicas) from block 0 to `blocks`, in order, stretches with equal replicas joined; 0 is a hole."""
    change = Counter[int]()
    for start, end in spans:
        low, high = max(0, start), min(blocks, end)
        if low < high:
            change[low] += 1
            change[high] -= 1
    found: list[tuple[int, int, int]] = []
    replicas = 0
    edges = sorted({0, blocks} | {edge for edge, step in change.items() if step})
    for low, high in pairwise(edges):
        replicas += change[low]
        found.append((low, high, replicas))
    return found


def holes(spans: Iterable[Interval], blocks: int) -> list[Interval]:
    """The stretches of [0, blocks) that no span covers, in order."""
    return [(start, end) for start, end, replicas in coverage(spans, blocks) if replicas == 0]


def interval_text(intervals: Iterable[Interval]) -> str:
    """ "7:8, 20:30" """
    return ", ".join(f"{start}:{end}" for start, end in intervals)


# ---- the least path --------------------------------------------------------------------------------------------


def _least(hosts: Sequence[HostView], start: int, end: int) -> list[PathHop]:
    """The path of least cost; every block has a host. Positions below count blocks from `start`."""
    blocks = end - start
    lows = np.array([max(host.start, start) - start for host in hosts])
    highs = np.array([min(host.end, end) - start for host in hosts])
    windows = np.minimum(np.array([host.max_blocks for host in hosts]), highs - lows)
    fixed = _ticks([host.fixed_ms for host in hosts]) + HOP_MS
    block = _ticks([host.block_ms for host in hosts])
    best = np.zeros(blocks + 1)
    came_by = np.zeros(blocks + 1, dtype=np.int64)
    levels = int(windows.max()).bit_length()
    level_of = np.array([0] + [size.bit_length() - 1 for size in range(1, blocks + 1)])
    minima = np.empty((levels, blocks, len(hosts)))  # minima[k, a]: the least of entries a .. a + 2**k - 1
    every = np.arange(len(hosts))
    for exit_ in range(1, blocks + 1):
        minima[0, exit_ - 1] = best[exit_ - 1] - (exit_ - 1) * block
        for level in range(1, levels):
            entry, half = exit_ - 2**level, 2 ** (level - 1)
            if entry >= 0:
                np.minimum(minima[level - 1, entry], minima[level - 1, entry + half], out=minima[level, entry])
        serving = every[(lows < exit_) & (exit_ <= highs)]
        length = np.minimum(exit_ - lows[serving], windows[serving])
        level_for = level_of[length]
        least = np.minimum(minima[level_for, exit_ - length, serving], minima[level_for, exit_ - 2**level_for, serving])
        cost = least + fixed[serving] + exit_ * block[serving]
        winner = int(np.argmin(cost))
        best[exit_], came_by[exit_] = cost[winner], serving[winner]
    path: list[PathHop] = []
    exit_ = blocks
    while exit_:
        host = int(came_by[exit_])
        first = exit_ - int(min(exit_ - lows[host], windows[host]))
        entry = first + int(np.argmin(minima[0, first:exit_, host]))
        path.append(PathHop(hosts[host].peer, start + entry, start + exit_))
        exit_ = entry
    return path[::-1]


def _least_within_memory(path: list[PathHop], hosts: list[HostView], start: int, end: int) -> list[PathHop]:
    """Best first: the cheapest path is taken; if it asks too much of a host, that host is held to each stretch it has
    memory for, one after another. Restricting hosts only makes paths dearer, so the first path that fits is the least.
    """
    queue = [(_cost(path, hosts), 0, path, hosts)]
    pushed = 0
    while queue and pushed < MAX_PLANS:
        _, _, path, hosts = heappop(queue)
        crowded = _crowded(path, hosts)
        if crowded is None:
            return path
        host = next(host for host in hosts if host.peer == crowded)
        others = [other for other in hosts if other.peer != crowded]
        low, high = max(host.start, start), min(host.end, end)
        for first in range(low, high - host.max_blocks + 1):
            held = replace(host, start=first, end=first + host.max_blocks)
            narrowed = sorted([*others, held], key=lambda host: host.peer)
            if not _gaps(narrowed, start, end):
                pushed += 1
                candidate = _least(narrowed, start, end)
                heappush(queue, (_cost(candidate, narrowed), pushed, candidate, narrowed))
    raise _no_memory(hosts, [(start, end)])


def _ticks(times: Sequence[float]) -> _Floats:
    rounded: _Floats = np.round(np.array(times, dtype=np.float64) / TICK_MS) * TICK_MS
    return rounded


def _cost(path: Sequence[PathHop], hosts: Sequence[HostView]) -> float:
    by_peer = {host.peer: host for host in hosts}
    return sum(by_peer[hop.peer].fixed_ms + by_peer[hop.peer].block_ms * hop.blocks + HOP_MS for hop in path)


def _crowded(path: Sequence[PathHop], hosts: Sequence[HostView]) -> PeerId | None:
    """A host whose hops together have more blocks than its memory takes."""
    used = Counter[PeerId]()
    for hop in path:
        used[hop.peer] += hop.blocks
    return next((host.peer for host in hosts if used[host.peer] > host.max_blocks), None)


def _sane(host: HostView) -> bool:
    """A host may claim any number of milliseconds; no number of it may spoil the others' sums."""
    times = (host.rtt_ms, host.queue_ms, host.block_ms)
    return all(math.isfinite(ms) and ms >= 0 for ms in times)


# ---- why there is none -----------------------------------------------------------------------------------------


def _gaps(hosts: Sequence[HostView], start: int, end: int) -> list[Interval]:
    """What of [start, end) no host serves."""
    inside = [(host.start - start, host.end - start) for host in hosts]
    return [(low + start, high + start) for low, high in holes(inside, end - start)]


def _shortage(serving: Sequence[HostView], usable: Sequence[HostView], start: int, end: int) -> NoRoute | None:
    if missing := _gaps(serving, start, end):
        where = interval_text(missing)
        single = len(missing) == 1 and missing[0][1] - missing[0][0] == 1
        asked = "" if missing == [(start, end)] else f" of {start}:{end}"
        what = f"block {missing[0][0]} ({where})" if single else f"blocks {where}"
        return NoRoute(f"no host serves {what}{asked}", missing=where)
    if full := _gaps(usable, start, end):
        return _no_memory(serving, full)
    return None


def _no_memory(serving: Sequence[HostView], full: Sequence[Interval]) -> NoRoute:
    where = interval_text(full)
    text = f"the hosts of blocks {where} have no KV memory left for this session"
    there = [host for host in serving if any(max(host.start, low) < min(host.end, high) for low, high in full)]
    roomiest = max(there, key=lambda host: (host.kv_free, host.peer), default=None)
    if roomiest is None or roomiest.kv_block_bytes == 0:
        return NoRoute(text, full=where)
    needed = roomiest.kv_block_bytes * max(min(roomiest.end, high) - max(roomiest.start, low) for low, high in full)
    text += f": {needed:,} bytes are needed, at most {roomiest.kv_free:,} are free on one of them"
    return NoRoute(text, full=where, needed=needed, free=roomiest.kv_free)
