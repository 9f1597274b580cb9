"""A hundred steps in a swarm where everything happens at random: the outputs are always the whole model's."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import trio
from trio.testing import MockClock

from swarmlm.routing.session import SessionOptions
from tests.swarm.toy import PRIME, ToySwarm, Twin, toy_swarm, twin_session

BLOCKS = 10
STEPS = 100
BATCH = 3


class Weather:
    """What goes wrong. Each block keeps being served by somebody, now or within 20 seconds."""

    def __init__(self, swarm: ToySwarm, rng: random.Random) -> None:
        self.swarm = swarm
        self.rng = rng
        self.seen: Counter[str] = Counter()
        self.cut_off = 0

    async def blow(self) -> None:
        """Forever: something every now and then, also in the middle of steps and recoveries."""
        while True:
            await trio.sleep(self.rng.expovariate(1.0))
            kind = self.rng.choice(["kill", "kill", "join", "join", "silence", "forget", "crash", "refuse"])
            await getattr(self, kind)()
            self.seen[kind] += 1

    async def kill(self) -> None:
        alive = self.swarm.alive()
        if alive:
            host = self.rng.choice(alive)
            self.swarm.kill(host)
            await self.fill_holes(after=self.rng.choice([0.0, 0.5, 20.0]))

    async def join(self) -> None:
        if len(self.swarm.alive()) < 12:
            start = self.rng.randrange(BLOCKS)
            await self.swarm.add(start, self.rng.randrange(start, BLOCKS) + 1, delay=self.rng.choice([0, 0, 0.01]))

    async def silence(self) -> None:
        if self.cut_off < 3 and (alive := self.swarm.alive()):
            self.swarm.partition(self.rng.choice(alive))
            self.cut_off += 1
        else:
            self.swarm.network.heal()
            self.cut_off = 0

    async def forget(self) -> None:
        for host in self.swarm.alive():
            host.sessions.clear()

    async def crash(self) -> None:
        if alive := self.swarm.alive():
            host = self.rng.choice(alive)

            def bug(step: object) -> None:
                host.before = lambda step: None
                raise ZeroDivisionError

            host.before = bug

    async def refuse(self) -> None:
        for host in self.swarm.alive():
            host.draining = self.rng.random() < 0.2
            host.room = self.rng.choice([10**9, 10**9, 128 * BATCH * 3])

    async def fill_holes(self, *, after: float) -> None:
        held = {block for host in self.swarm.alive() for block in range(host.start, host.end)}
        missing = sorted(set(range(BLOCKS)) - held)
        if missing:
            await trio.sleep(after)
            await self.swarm.add(missing[0], missing[-1] + 1)


async def one_step(twin: Twin, rng: random.Random, seen: Counter[str]) -> None:
    """A prefill, decode, rollback or reorder; now and then cancelled first, and then done again."""
    session = twin.session
    held = session.position
    position = rng.randrange(held + 1) if rng.random() < 0.15 or held > 100 else None
    hypo_ids = tuple(rng.randrange(BATCH) for _ in range(BATCH)) if rng.random() < 0.3 else ()
    padding = tuple(rng.randrange(3) for _ in range(BATCH)) if held == 0 and rng.random() < 0.5 else ()
    hidden = twin.tokens(rng.choice([1, 1, 1, 2, 9]))
    if rng.random() < 0.2:
        with trio.move_on_after(rng.uniform(0, 0.2)) as scope:
            await twin.step(hidden, position=position, hypo_ids=hypo_ids, padding=padding)
        if not scope.cancelled_caught:
            return
        seen["cancelled"] += 1
        if rng.random() < 0.5:  # and something else instead, where the cancelled one would have begun
            hypo_ids, hidden = (), (hidden + 1) % PRIME
    await twin.step(hidden, position=position, hypo_ids=hypo_ids, padding=padding)


@pytest.mark.parametrize("seed", range(8))
async def test_a_hundred_steps_in_bad_weather(autojump_clock: MockClock, seed: int) -> None:
    rng = random.Random(seed)
    async with toy_swarm((0, 4), (4, 7), (7, 10), (0, 6), (5, 10), seed=seed) as swarm:
        weather = Weather(swarm, random.Random(seed + 1000))
        options = SessionOptions(chunk=4, patience=1e4)  # in such weather two minutes may not do
        async with twin_session(swarm, BLOCKS, max_length=128, batch=BATCH, options=options, seed=seed) as twin:
            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(weather.blow)
                for _ in range(STEPS):
                    await trio.sleep(rng.uniform(0, 0.3))
                    await one_step(twin, rng, weather.seen)
                nursery.cancel_scope.cancel()
            print(
                f"\nseed {seed}: {twin.session.failovers} failovers in {STEPS} steps and"
                f" {trio.current_time() - began:.0f} s; {dict(weather.seen)}"
            )
            assert twin.session.failovers > 0
