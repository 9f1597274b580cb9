"""The planner is exact: compared with trying every path."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmlm.errors import BadSpan, NoRoute
from swarmlm.protocol import PeerId
from swarmlm.routing.graph import HostView, PathHop
from swarmlm.routing.planner import coverage, holes, plan


def host(peer: str, start: int, end: int, *, rtt: float = 1.0, block: float = 1.0, room: int = 99) -> HostView:
    return HostView(PeerId(peer), start, end, rtt, 0.0, block, room)


def cost(path: list[PathHop], hosts: list[HostView]) -> tuple[float, int]:
    by_peer = {one.peer: one for one in hosts}
    views = [by_peer[hop.peer] for hop in path]
    total = sum(
        view.rtt_ms + view.queue_ms + view.block_ms * (hop.end - hop.start)
        for view, hop in zip(views, path, strict=True)
    )
    return total, len(path)


def every_path(hosts: list[HostView], start: int, end: int) -> Iterator[list[PathHop]]:
    if start == end:
        yield []
    for one in hosts:
        if one.start <= start < one.end:
            for stop in range(start + 1, min(one.end, end, start + one.max_blocks) + 1):
                for rest in every_path(hosts, stop, end):
                    yield [PathHop(one.peer, start, stop), *rest]


def fits_memory(path: list[PathHop], hosts: list[HostView]) -> bool:
    used = Counter[PeerId]()
    for hop in path:
        used[hop.peer] += hop.end - hop.start
    return all(used[one.peer] <= one.max_blocks for one in hosts)


def is_compact(path: list[PathHop], hosts: list[HostView]) -> bool:
    """The hops of a host lie so close that its memory would do for all that is between them."""
    hops = {one: [hop for hop in path if hop.peer == one.peer] for one in hosts}
    return all(
        max(h.end for h in own) - min(h.start for h in own) <= one.max_blocks for one, own in hops.items() if own
    )


@st.composite
def swarms(draw: st.DrawFn) -> tuple[list[HostView], int, int]:
    blocks = draw(st.integers(1, 6))
    times = st.integers(0, 4).map(float) | st.floats(0, 100)
    hosts = []
    for number in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, blocks - 1))
        end = draw(st.integers(start + 1, blocks))
        room = draw(st.integers(0, 6))
        hosts.append(HostView(PeerId(f"h{number}"), start, end, draw(times), draw(times), draw(times), room))
    start = draw(st.integers(0, blocks - 1))
    return hosts, start, draw(st.integers(start + 1, blocks))


@settings(max_examples=400, deadline=None)
@given(swarms())
def test_the_plan_is_the_best_of_all_paths(swarm: tuple[list[HostView], int, int]) -> None:
    hosts, start, end = swarm
    paths = list(every_path(hosts, start, end))
    possible = [cost(path, hosts) for path in paths if fits_memory(path, hosts)]
    compact = [cost(path, hosts) for path in paths if is_compact(path, hosts)]
    try:
        path = plan(hosts, start, end)
    except NoRoute:
        assert compact == []
        return
    assert path[0].start == start
    assert path[-1].end == end
    assert path in paths
    assert fits_memory(path, hosts)
    found = cost(path, hosts)
    assert min(possible)[0] - 1e-4 <= found[0] <= min(compact, default=found)[0] + 1e-4
    if all(float(one.rtt_ms + one.queue_ms + one.block_ms).is_integer() for one in hosts):
        assert min(possible) <= found <= min(compact, default=found)


@given(swarms(), st.randoms())
def test_the_order_of_hosts_does_not_matter(swarm: tuple[list[HostView], int, int], rng: random.Random) -> None:
    hosts, start, end = swarm
    shuffled = list(hosts)
    rng.shuffle(shuffled)
    try:
        expected = plan(hosts, start, end)
    except NoRoute as error:
        with pytest.raises(NoRoute, match=str(error)[:20]):
            plan(shuffled, start, end)
    else:
        assert plan(shuffled, start, end) == expected


def test_of_equals_the_fewest_hops_win_then_the_smallest_peer_id() -> None:
    free = [host("b", 0, 4, rtt=0.0), host("c", 0, 2, rtt=0.0), host("a", 2, 4, rtt=0.0)]
    assert plan(free, 0, 4) == [PathHop(PeerId("b"), 0, 4)]
    twins = [host("b", 0, 4), host("a", 0, 4), host("c", 0, 4)]
    assert plan(twins, 0, 4) == [PathHop(PeerId("a"), 0, 4)]


def test_overlapping_spans_change_over_where_it_is_cheapest() -> None:
    path = plan([host("slow", 0, 18, block=2.0), host("fast", 12, 30, block=1.0)], 0, 30)
    assert path == [PathHop(PeerId("slow"), 0, 12), PathHop(PeerId("fast"), 12, 30)]


def test_a_host_with_little_memory_takes_what_it_can() -> None:
    path = plan([host("full", 0, 10, block=0.1, room=3), host("roomy", 0, 10, block=1.0)], 0, 10)
    assert {(hop.peer, hop.end - hop.start) for hop in path} == {("full", 3), ("roomy", 7)}


def test_memory_counts_for_all_hops_of_a_host_together() -> None:
    hosts = [host("twice", 0, 10, block=0.1, room=5), host("other", 0, 6, block=9.0)]
    assert plan([host("a", 1, 3, room=1), host("b", 0, 3, block=0.0, room=2)], 0, 3)[0] == PathHop(PeerId("b"), 0, 2)
    path = plan(hosts, 0, 10)
    assert fits_memory(path, hosts)
    with pytest.raises(NoRoute) as caught:
        plan(hosts[:1], 0, 10)
    assert "full" in caught.value.details


def test_a_hole_is_named() -> None:
    with pytest.raises(NoRoute, match=r"no host serves block 7 \(7:8\) of 0:30") as caught:
        plan([host("a", 0, 7), host("b", 8, 30)], 0, 30)
    assert caught.value.missing == "7:8"
    with pytest.raises(NoRoute, match="blocks 0:2, 7:8, 20:30 of 0:30") as caught:
        plan([host("a", 2, 7), host("b", 8, 20)], 0, 30)
    assert caught.value.details["missing"] == "0:2, 7:8, 20:30"
    with pytest.raises(NoRoute, match=r"no host serves blocks 15:30$"):
        plan([host("a", 0, 15)], 15, 30)


def test_full_hosts_are_told_from_missing_ones() -> None:
    full = HostView(PeerId("full"), 0, 15, 1.0, 0.0, 1.0, 0, kv_free=1000, kv_block_bytes=4096)
    with pytest.raises(
        NoRoute, match=r"0:15 have no KV memory left .*61,440 bytes are needed, at most 1,000"
    ) as caught:
        plan([full, host("b", 15, 30)], 0, 30)
    assert caught.value.details == {"full": "0:15", "needed": 61440, "free": 1000}
    with pytest.raises(NoRoute, match=r"15:30 have no KV memory left for this session$"):
        plan([host("a", 0, 15), host("b", 15, 30, room=0)], 0, 30)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -5.0])
def test_a_host_with_senseless_times_is_passed_over(bad: float) -> None:
    assert plan([host("liar", 0, 4, rtt=bad), host("slow", 0, 4, rtt=900.0)], 0, 4)[0].peer == "slow"


def test_a_span_that_is_none() -> None:
    with pytest.raises(BadSpan, match="5:5"):
        plan([host("a", 0, 9)], 5, 5)


def test_a_thousand_hosts_of_an_eighty_block_model() -> None:
    rng = random.Random(1)
    hosts = []
    for number in range(1000):
        start = rng.randrange(80)
        hosts.append(
            HostView(
                PeerId(f"h{number:04}"),
                start,
                rng.randrange(start, 80) + 1,
                rng.uniform(1, 80),
                rng.uniform(0, 20),
                rng.uniform(0.5, 5),
                rng.randrange(1, 81),
            )
        )
    laps = []
    for _ in range(7):
        began = time.perf_counter()
        path = plan(hosts, 0, 80)
        laps.append((time.perf_counter() - began) * 1e3)
    print(f"\n1,000 hosts x 80 blocks: {min(laps):.1f} ms, {len(path)} hops")
    assert min(laps) < 20


def test_coverage_and_holes() -> None:
    assert coverage([(0, 10), (5, 15), (20, 30)], 30) == [
        (0, 5, 1),
        (5, 10, 2),
        (10, 15, 1),
        (15, 20, 0),
        (20, 30, 1),
    ]
    assert holes([(0, 10), (5, 15), (20, 30)], 40) == [(15, 20), (30, 40)]
    assert coverage([(0, 10), (10, 20)], 20) == [(0, 20, 1)]
    assert coverage([], 3) == [(0, 3, 0)]
    assert holes([(0, 99)], 30) == []


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12))), st.integers(1, 10))
def test_coverage_counts_each_block(spans: list[tuple[int, int]], blocks: int) -> None:
    found = coverage(spans, blocks)
    counted = [replicas for start, end, replicas in found for _ in range(start, end)]
    assert counted == [sum(start <= block < end for start, end in spans) for block in range(blocks)]
    assert all(left[2] != right[2] for left, right in pairwise(found))
