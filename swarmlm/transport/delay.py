"""A wire with latency and a bandwidth, between real sockets: a TCP proxy that passes bytes on later.

For measuring how a swarm does over a wide-area network on one machine. A host listens behind a proxy and announces the
proxy's address, so that whatever reaches it has travelled. Used by the benchmarks and by tests.

    async with open_delay(("127.0.0.1", 4001), latency=0.05, bandwidth=100e6) as wire:    # 50 ms one way, 100 Mbit/s
        stream = await trio.open_tcp_stream(*wire.address)

`python -m swarmlm.transport.delay --latency-ms 50 --mbit 100 LISTEN:TARGET ...` runs one for each pair of loopback
ports in a process of its own, where no computation disturbs its timing; it prints "ready" once all of them listen.

The rules, for each direction of each connection:

- Bytes first wait for the wire, which carries `bandwidth` bits per second, then travel `latency` seconds, in order.
- What waits for the wire stays with its sender, as behind a real network card; what travels is bounded by `FLIGHT`.
- A new connection carries its first byte after a round trip, as TCP's handshake takes one.
- The end of a direction travels behind its bytes; a connection lost at one side is dropped at the other.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import trio

from swarmlm.actors.core.groups import unwrapped
from swarmlm.errors import ConfigError

CHUNK = 16 * 1024  # bytes read at once: 1.3 ms of a 100 Mbit/s wire, so that latency is not lost in packing
AHEAD_SECONDS = 0.01  # of wire time that may be taken before it comes: a late wake-up of the scheduler leaves no gap
FLIGHT = 8 * 2**20  # bytes on their way in one direction: 1 Gbit/s for 64 ms; more waits at the sender
BACKLOG = 128  # connections that wait to be accepted


class Delay:
    """Made by `open_delay`. `address` is where to dial, `carried` the bytes passed on so far, both directions."""

    def __init__(self, target: tuple[str, int], latency: float, bandwidth: float, nursery: trio.Nursery) -> None:
        if not 0 <= latency < math.inf:
            raise ConfigError(f"a latency of {latency} is no number of seconds")
        if not bandwidth > 0:
            raise ConfigError(f"a bandwidth of {bandwidth} bits per second carries nothing")
        self.address = ("", 0)
        self.carried = 0
        self.connections = 0  # accepted so far
        self._target = target
        self._latency = latency
        self._byte_seconds = 8 / bandwidth
        self._nursery = nursery

    async def listen(self, host: str, port: int) -> None:
        """Raises `ConfigError` if the port is taken."""
        try:
            listeners = await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host} port {port}: {(error.strerror or str(error)).lower()}"
            ) from None
        self.address = (host, listeners[0].socket.getsockname()[1])
        self._nursery.start_soon(trio.serve_listeners, self._serve, listeners)

    async def _serve(self, near: trio.SocketStream) -> None:
        self.connections += 1
        began = trio.current_time()
        with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            await trio.sleep(2 * self._latency)
            async with await trio.open_tcp_stream(*self._target) as far, trio.open_nursery() as nursery:
                nursery.start_soon(self._carry, near, far, began + 2 * self._latency, nursery.cancel_scope)
                nursery.start_soon(self._carry, far, near, began + 2 * self._latency, nursery.cancel_scope)

    async def _carry(
        self, source: trio.SocketStream, sink: trio.SocketStream, wire_free_at: float, both: trio.CancelScope
    ) -> None:
        """One direction to its end. A connection that breaks ends `both`."""
        travelling: deque[tuple[float, bytes]] = deque()
        weight = 0
        put, taken = trio.Event(), trio.Event()

        async def read() -> None:
            nonlocal wire_free_at, weight, put, taken
            while True:
                await trio.sleep_until(wire_free_at - AHEAD_SECONDS)
                while weight >= FLIGHT:
                    taken = trio.Event()
                    await taken.wait()
                try:
                    data = bytes(await source.receive_some(CHUNK))
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    both.cancel()
                    return
                wire_free_at = max(wire_free_at, trio.current_time()) + len(data) * self._byte_seconds
                travelling.append((wire_free_at + self._latency, data))
                weight += len(data)
                put.set()
                if not data:
                    return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            while True:
                while not travelling:
                    put = trio.Event()
                    await put.wait()
                arrival, data = travelling.popleft()
                await trio.sleep_until(arrival)
                try:
                    if not data:
                        await sink.send_eof()
                        return
                    await sink.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    both.cancel()
                    return
                weight -= len(data)
                self.carried += len(data)
                taken.set()


@asynccontextmanager
async def open_delay(
    target: tuple[str, int],
    *,
    latency: float,
    bandwidth: float = math.inf,
    host: str = "127.0.0.1",
    port: int = 0,
) -> AsyncIterator[Delay]:
    """Listen on `host` and `port` (0: a free one) for connections to `target`. Leaving the block drops them all.

    `latency` is seconds one way, `bandwidth` bits per second in each direction of each connection. Nobody needs to
    listen at `target` yet: a connection that finds nobody there is closed. Raises `ConfigError`.
    """
    with unwrapped():
        async with trio.open_nursery() as nursery:
            delay = Delay(target, latency, bandwidth, nursery)
            await delay.listen(host, port)
            try:
                yield delay
            finally:
                nursery.cancel_scope.cancel()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m swarmlm.transport.delay", description="A slow wire on loopback.")
    parser.add_argument("--latency-ms", type=float, required=True, help="one way")
    parser.add_argument("--mbit", type=float, default=math.inf, help="per second, in each direction of a connection")
    parser.add_argument("pairs", nargs="+", metavar="LISTEN:TARGET", help="loopback ports")
    given = parser.parse_args(arguments)
    pairs = [tuple(int(port) for port in pair.split(":")) for pair in given.pairs]
    with suppress(KeyboardInterrupt):
        trio.run(_run, pairs, given.latency_ms / 1e3, given.mbit * 1e6)


async def _run(pairs: list[tuple[int, ...]], latency: float, bandwidth: float) -> None:
    async with trio.open_nursery() as nursery:
        for listen, target in pairs:
            delay = Delay(("127.0.0.1", target), latency, bandwidth, nursery)
            await delay.listen("127.0.0.1", listen)
        print("ready", flush=True)


if __name__ == "__main__":
    main()
