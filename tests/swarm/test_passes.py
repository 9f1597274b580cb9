"""Training over the simulated network: hosts work at the same time, and losing them changes nothing that comes out.

The hosts run real spans of a tiny llama; only their computing time is made up, on a virtual clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from trio.testing import MockClock

from swarmlm.actors.core import Actor, handles, open_supervisor, serve
from swarmlm.errors import BadStep, Busy, Closed, ContextTooLong, NoRoute, SwarmError, WrongModel
from swarmlm.kernels.wire import to_wire
from swarmlm.models.passes import Passes
from swarmlm.models.source import open_source
from swarmlm.models.span import Span
from swarmlm.protocol import Address, Backward, BackwardDone, Forward, ForwardDone, PeerId
from swarmlm.routing.base import SessionEvent, SessionOptions
from swarmlm.routing.passes import TrainingRoute, open_training
from swarmlm.transport.link import FramedLink
from swarmlm.transport.memory import MemoryNetwork
from tests.swarm.toy import LATENCY, ToySwarm
from tests.tiny import HIDDEN, tiny_llama

BLOCKS = 4
MUCH = 2**30  # bytes


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> Span:
    folder: Path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(folder)
    return Span.load(open_source(str(folder)), 0, BLOCKS)


@dataclass(eq=False)
class PassHost(Actor[Any]):
    """Serves blocks [start, end) of `span`. `before` sees a message before it is run, `after` before it is answered."""

    span: Span
    start: int
    end: int
    delay: float = 0.0  # seconds of computing a forward; a backward takes twice that
    keep_bytes: int = MUCH
    before: Callable[[Any], None] = field(default=lambda message: None)
    after: Callable[[Any], None] = field(default=lambda message: None)
    seen: list[Any] = field(default_factory=list)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    peer: PeerId = field(init=False)
    addresses: tuple[Address, ...] = ()
    listed: bool = True
    draining: bool = False
    told_room: int | None = 0  # bytes of KV: training needs none

    def __post_init__(self) -> None:
        self.passes = Passes(self.span, self.keep_bytes, clock=trio.current_time)

    @handles(Forward)
    async def forward(self, message: Forward) -> ForwardDone:
        done: ForwardDone = await self._run(message, self.delay)
        return done

    @handles(Backward)
    async def backward(self, message: Backward) -> BackwardDone:
        done: BackwardDone = await self._run(message, 2 * self.delay)
        return done

    async def _run(self, message: Any, delay: float) -> Any:
        self.before(message)
        self.seen.append(message)
        if not self.start <= message.start < message.end <= self.end:
            raise WrongModel("other blocks are served here")
        await trio.sleep(delay)
        done = self.passes.run(message)
        self.after(message)
        await trio.lowlevel.checkpoint()
        return done

    def asked(self, kind: Any) -> list[tuple[int, int]]:
        return [(message.start, message.end) for message in self.seen if isinstance(message, kind)]


class PassSwarm(ToySwarm):
    async def _live(self, host: Any, task_status: Any) -> None:
        with host.scope:
            async with self.network.open_transport() as transport, open_supervisor(max_restarts=99) as supervisor:
                ref = await supervisor.start(lambda: host)
                transport.set_handler(lambda stream: serve(FramedLink(stream), {Forward: ref, Backward: ref}))
                host.peer, host.addresses = transport.peer_id, tuple(transport.addresses)
                task_status.started()
                await trio.sleep_forever()

    async def host(self, span: Span, start: int, end: int, **kind: Any) -> PassHost:
        host = PassHost(span, start, end, **kind)
        await self._nursery.start(self._live, host)
        self.hosts.append(host)  # type: ignore[arg-type]
        return host


class Training:
    """A swarm of hosts over `spans`, and a route through it. A host named twice has a replacement waiting."""

    def __init__(self, span: Span, *spans: tuple[int, int], **kind: Any) -> None:
        self.span = span
        self.spans = spans
        self.kind = kind
        self.options = kind.pop("options", None)
        self.events: list[SessionEvent] = []
        self.hosts: list[PassHost] = []

    async def run(self, work: Callable[[PassSwarm, TrainingRoute, list[PassHost]], Any]) -> Any:
        network = MemoryNetwork(latency=LATENCY, seed=0)
        async with trio.open_nursery() as nursery, network.open_transport() as transport:
            swarm = PassSwarm(network, transport, nursery)
            for start, end in self.spans:
                self.hosts.append(await swarm.host(self.span, start, end, **self.kind))
            async with open_training(
                swarm,
                model=self.span.name,
                fingerprint=self.span.fingerprint,
                blocks=BLOCKS,
                micro_tokens=8,
                options=self.options,
                on_event=self.events.append,
            ) as route:
                result = await work(swarm, route, self.hosts)
            nursery.cancel_scope.cancel()
        return result


def sample(rows: int = 4, tokens: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, tokens, HIDDEN, generator=generator)
    return hidden, torch.randn(rows, tokens, HIDDEN, generator=generator)


def local(
    span: Span, hidden: torch.Tensor, grad: torch.Tensor, padding: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = hidden.clone().requires_grad_()
    output = span.differentiable(leaf, 0, BLOCKS, padding)
    (result,) = torch.autograd.grad(output, leaf, grad)
    return output.detach(), result


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


async def both(route: TrainingRoute, padding: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, grad = sample()
    output, tape = await route.forward(hidden, padding)
    assert tape is not None
    return output, await route.backward(tape, grad)


@pytest.mark.parametrize("spans", [((0, 4),), ((0, 1), (1, 4)), ((0, 3), (2, 4)), ((0, 1), (1, 2), (2, 3), (3, 4))])
@pytest.mark.parametrize("keep_bytes", [0, MUCH], ids=["recomputed", "kept"])
async def test_gradients_are_the_whole_model_s(
    autojump_clock: MockClock, span: Span, spans: tuple[tuple[int, int], ...], keep_bytes: int
) -> None:
    padding = (0, 3, 1, 0)
    training = Training(span, *spans, keep_bytes=keep_bytes)
    hidden, grad = sample()
    grad[1, :3], grad[2, :1] = 0.0, 0.0  # a loss does not look at padding

    async def work(swarm: Any, route: TrainingRoute, hosts: list[PassHost]) -> None:
        output, tape = await route.forward(hidden, padding)
        before, hidden_again = hidden.clone(), hidden
        hidden_again.zero_()  # the tape has its own
        result = await route.backward(tape, grad)
        expected = local(span, before, grad, padding)
        real = torch.arange(8) >= torch.tensor(padding)[:, None]
        close(output[real], expected[0][real])
        close(result[real], expected[1][real])
        again = await route.backward(tape, grad)  # the graphs are used up, the tape is not
        assert again.equal(result)

    await training.run(work)
    repeated = [message for host in training.hosts for message in host.seen if isinstance(message, Backward)]
    assert any(message.hidden is None for message in repeated) == (keep_bytes > 0)
    assert all(host.passes.kept_bytes == 0 for host in training.hosts)
    assert training.events == []


@pytest.mark.parametrize(("rows", "sizes"), [(1, [1]), (2, [1, 1]), (7, [2, 2, 3]), (9, [2, 2, 2, 3])])
async def test_a_batch_is_cut_into_micro_batches(
    autojump_clock: MockClock, span: Span, rows: int, sizes: list[int]
) -> None:
    training = Training(span, (0, 4))
    hidden, grad = sample(rows, 4)  # at least two rows make the eight tokens of a micro-batch

    async def work(swarm: Any, route: TrainingRoute, hosts: list[PassHost]) -> None:
        output, tape = await route.forward(hidden)
        assert tape is not None
        expected = local(span, hidden, grad)
        close(output, expected[0])
        close(await route.backward(tape, grad), expected[1])
        assert sorted(message.grad.shape[0] for message in hosts[0].seen[len(sizes) :]) == sizes

    await training.run(work)


async def test_hosts_work_at_the_same_time(autojump_clock: MockClock, span: Span) -> None:
    training = Training(span, *((block, block + 1) for block in range(4)), delay=1.0)

    async def work(swarm: Any, route: TrainingRoute, hosts: list[PassHost]) -> None:
        hidden, grad = sample(8)  # eight micro-batches of a second at each of four hosts
        began = trio.current_time()
        _, tape = await route.forward(hidden)
        assert tape is not None
        assert 8 + 3 <= trio.current_time() - began < 8 + 3 + 0.5  # instead of 32
        began = trio.current_time()
        await route.backward(tape, grad)
        assert 2 * (8 + 3) <= trio.current_time() - began < 2 * (8 + 3) + 0.5

    await training.run(work)


async def test_two_batches_share_the_route(autojump_clock: MockClock, span: Span) -> None:
    training = Training(span, (0, 2), (2, 4), delay=0.1)

    async def work(swarm: ToySwarm, route: TrainingRoute, hosts: list[PassHost]) -> None:
        results: list[Any] = []

        async def one() -> None:
            results.append(await both(route))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
        assert all(first.equal(second) for first, second in zip(*results, strict=True))
        assert swarm.look_ups == 1

    await training.run(work)


async def test_evaluating_keeps_nothing(autojump_clock: MockClock, span: Span) -> None:
    training = Training(span, (0, 4))

    async def work(swarm: Any, route: TrainingRoute, hosts: list[PassHost]) -> None:
        hidden, grad = sample()
        output, tape = await route.forward(hidden, differentiable=False)
        assert tape is None
        close(output, local(span, hidden, grad)[0])
        assert hosts[0].passes.kept_bytes == 0

    await training.run(work)


# ---- losing hosts


Both = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def expected(span: Span) -> Both:
    """(output, gradient) of a route that loses no host."""

    async def work(swarm: Any, route: TrainingRoute, hosts: list[PassHost]) -> Any:
        return await both(route, (0, 3, 1, 0))

    result: Both = trio.run(Training(span, (0, 1), (1, 4)).run, work, clock=MockClock(autojump_threshold=0))
    return result


def kill_at(swarm: ToySwarm, host: Any, kind: Any, number: int, *, answered: bool) -> None:
    """Kill `host` at its message `number` of `kind`: before computing it, or before the answer is out."""
    count = 0

    def hook(message: Any) -> None:
        nonlocal count
        if isinstance(message, kind):
            if count == number:
                swarm.kill(host)
            count += 1

    if answered:
        host.after = hook
    else:
        host.before = hook


@pytest.mark.parametrize("kind", [Forward, Backward])
@pytest.mark.parametrize("answered", [False, True], ids=["before computing", "before answering"])
@pytest.mark.parametrize(("number", "keep_bytes"), [(0, MUCH), (1, 0), (3, MUCH)])
@pytest.mark.parametrize("lost", [0, 1])
async def test_a_host_that_dies_changes_nothing(
    autojump_clock: MockClock,
    span: Span,
    expected: Both,
    kind: Any,
    answered: bool,
    number: int,
    lost: int,
    keep_bytes: int,
) -> None:
    training = Training(span, (0, 1), (1, 4), keep_bytes=keep_bytes, delay=0.1)

    async def work(swarm: PassSwarm, route: TrainingRoute, hosts: list[PassHost]) -> Any:
        await both(route)
        for host in hosts:
            host.seen.clear()
        for start, end in ((0, 1), (1, 3), (2, 4)):  # the wide one is replaced by two
            await swarm.host(span, start, end, keep_bytes=keep_bytes)
        kill_at(swarm, hosts[lost], kind, number, answered=answered)
        began = trio.current_time()
        result = await both(route, (0, 3, 1, 0))
        assert trio.current_time() - began < 5
        assert hosts[lost].peer not in [hop.peer for hop in route.route]
        assert route.failovers == 1
        assert [peer for peer, _ in swarm.reported] == [hosts[lost].peer]
        return result

    output, gradient = await training.run(work)
    assert output.equal(expected[0])
    assert gradient.equal(expected[1])
    assert [event.kind for event in training.events] == ["failover", "recovered"]


async def test_hosts_lost_one_after_another(autojump_clock: MockClock, span: Span, expected: Both) -> None:
    training = Training(span, *((0, 2), (2, 4)) * 3, delay=0.1)

    async def work(swarm: PassSwarm, route: TrainingRoute, hosts: list[PassHost]) -> Any:
        for number, kind in enumerate((Forward, Forward, Backward, Backward)):
            kill_at(swarm, hosts[number], kind, 1, answered=bool(number % 2))
        return await both(route, (0, 3, 1, 0))

    output, gradient = await training.run(work)
    assert output.equal(expected[0])
    assert gradient.equal(expected[1])


async def test_a_host_that_falls_silent_is_replaced(autojump_clock: MockClock, span: Span, expected: Both) -> None:
    training = Training(span, (0, 4), delay=0.1)

    async def work(swarm: PassSwarm, route: TrainingRoute, hosts: list[PassHost]) -> Any:
        await both(route)
        await swarm.host(span, 0, 4)
        hosts[0].before = lambda message: swarm.partition(hosts[0])  # type: ignore[arg-type]
        began = trio.current_time()
        result = await both(route, (0, 3, 1, 0))
        assert trio.current_time() - began < 10
        return result

    assert all(ours.equal(theirs) for ours, theirs in zip(await training.run(work), expected, strict=True))


async def test_a_host_that_serves_other_blocks_now_is_replaced(autojump_clock: MockClock, span: Span) -> None:
    training = Training(span, (0, 4))

    async def work(swarm: PassSwarm, route: TrainingRoute, hosts: list[PassHost]) -> None:
        first = await both(route)
        hosts[0].end = 2
        await swarm.host(span, 2, 4)
        second = await both(route)
        close(second[1], first[1])
        assert [type(error) for _, error in swarm.reported] == [WrongModel]

    await training.run(
        work,
    )


async def test_a_busy_host_is_waited_for(autojump_clock: MockClock, span: Span) -> None:
    training = Training(span, (0, 4))

    async def work(swarm: PassSwarm, route: TrainingRoute, hosts: list[PassHost]) -> None:
        refusals = iter(range(3))

        def refuse(message: Any) -> None:
            if next(refusals, None) is not None:
                raise Busy("come again")

        hosts[0].before = refuse
        await both(route)
        assert swarm.reported == []

    await training.run(work)


async def test_waiting_for_a_host_that_comes_back(autojump_clock: MockClock, span: Span) -> None:
    training = Training(span, (0, 2), (2, 4))

    async def work(swarm: PassSwarm, route: TrainingRoute, hosts: list[PassHost]) -> None:
        await both(route)
        swarm.kill(hosts[1])  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:

            async def later() -> None:
                await trio.sleep(20)
                await swarm.host(span, 2, 4)

            nursery.start_soon(later)
            await both(route)

    await training.run(work)
    assert {"failover", "waiting", "recovered"} == {event.kind for event in training.events}


async def test_nobody_is_left(autojump_clock: MockClock, span: Span) -> None:
    training = Training(span, (0, 2), (2, 4), options=SessionOptions(patience=10.0))

    async def work(swarm: PassSwarm, route: TrainingRoute, hosts: list[PassHost]) -> None:
        hidden, grad = sample()
        _, tape = await route.forward(hidden)
        assert tape is not None
        swarm.kill(hosts[1])  # type: ignore[arg-type]
        hosts[1].listed = False
        for _ in range(2):
            began = trio.current_time()
            with pytest.raises(NoRoute, match="2:4") as caught:
                await route.backward(tape, grad)
            assert caught.value.missing == "2:4"
            assert 10 <= trio.current_time() - began < 30
        await swarm.host(span, 2, 4)
        close(await route.backward(tape, grad), local(span, hidden, grad)[1])

    await training.run(work)


async def test_no_hosts_at_all(autojump_clock: MockClock, span: Span) -> None:
    async def work(swarm: PassSwarm, route: TrainingRoute, hosts: list[PassHost]) -> None:
        with pytest.raises(NoRoute, match="2:4"):
            await route.forward(sample()[0])

    await Training(span, (0, 2)).run(work)


@pytest.mark.parametrize(
    ("hidden", "padding", "error"),
    [
        (torch.zeros(4, 8), (), BadStep),
        (torch.zeros(4, 8, HIDDEN), (1, 2), BadStep),
        (torch.zeros(2, 8, HIDDEN), (1, 8), BadStep),
        (torch.zeros(2, 8, HIDDEN, dtype=torch.float64), (), BadStep),
        (torch.zeros(2, 8, HIDDEN + 1), (), BadStep),
        (torch.full((2, 8, HIDDEN), float("inf")), (), BadStep),
        (torch.zeros(2, 65, HIDDEN), (), ContextTooLong),
    ],
    ids=["dims", "padding", "long padding", "float64", "width", "infinite", "context"],
)
async def test_a_bad_batch_is_no_fault_of_the_hosts(
    autojump_clock: MockClock, span: Span, hidden: torch.Tensor, padding: tuple[int, ...], error: type[SwarmError]
) -> None:
    training = Training(span, (0, 2), (2, 4))

    async def work(swarm: PassSwarm, route: TrainingRoute, hosts: list[PassHost]) -> None:
        with pytest.raises(error):
            await route.forward(hidden, padding)
        assert swarm.reported == []
        _, tape = await route.forward(sample()[0])
        assert tape is not None
        with pytest.raises(BadStep, match="gradients of shape"):
            await route.backward(tape, torch.zeros(4, 7, HIDDEN))
        await both(route)

    await training.run(work)


async def test_an_answer_of_another_shape_is_the_host_s_fault(autojump_clock: MockClock, span: Span) -> None:
    training = Training(span, (0, 4))

    async def work(swarm: PassSwarm, route: TrainingRoute, hosts: list[PassHost]) -> None:
        await both(route)
        await swarm.host(span, 0, 4)

        class Wrong:
            def run(self, message: Any) -> Any:
                return ForwardDone(to_wire(torch.zeros(1, 1, HIDDEN)))

        hosts[0].passes = Wrong()  # type: ignore[assignment]
        await both(route)
        assert [peer for peer, _ in swarm.reported] == [hosts[0].peer]

    await training.run(work)


async def test_a_closed_route_says_so(autojump_clock: MockClock, span: Span) -> None:
    async def work(swarm: PassSwarm, route: TrainingRoute, hosts: list[PassHost]) -> Any:
        hidden, grad = sample()
        return route, (await route.forward(hidden))[1], hidden, grad

    route, tape, hidden, grad = await Training(span, (0, 4)).run(work)
    with pytest.raises(Closed):
        await route.forward(hidden)
    with pytest.raises(Closed):
        await route.backward(tape, grad)
