"""The parts of `swarmlm bench wan`: nodes over a slow simulated network, and a process of slow real wires."""

from __future__ import annotations

import pytest
import trio

from swarmlm.bench.batch import LONGEST, SHORTEST, _prompts
from swarmlm.bench.timed import endless_client, open_timed_session
from swarmlm.bench.wan import _simulated, _wires
from swarmlm.local_swarm import free_port

RTT = 0.02  # seconds


async def test_tokens_over_the_simulated_network_take_its_time() -> None:
    async with _simulated(2, RTT, 100.0) as (node, model):
        client = await endless_client(node, model)
        async with open_timed_session(node, model, client, max_length=64) as session:
            await session.generate([1, 2, 3], tokens=2)
            answer = await session.generate([1, 2, 3], tokens=6)
            again = await session.generate([1, 2, 3], tokens=6)
        assert [(row.start, row.end) for row in (await node.status(model)).hosts] in (
            [(0, 3), (3, 6)],
            [(3, 6), (0, 3)],
        )
    assert len(answer.ids) == 6
    assert again.ids == answer.ids, "what was generated before is forgotten"
    assert len(answer.gaps) == len(answer.steps) == len(answer.client) == 5
    assert min(answer.steps) >= 3 * RTT / 2, "no step is faster than light: client, host, host, client"
    assert answer.first >= 3 * RTT / 2
    assert min(answer.client) > 0


async def test_the_process_of_the_wires_passes_bytes_on_late() -> None:
    listen, target = free_port(), free_port()

    async def serve(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_tcp, serve, target)
        async with _wires([(listen, target)], RTT, 100.0), await trio.open_tcp_stream("127.0.0.1", listen) as stream:
            for _ in range(2):
                started = trio.current_time()
                await stream.send_all(b"!")
                assert await stream.receive_some() == b"!"
            assert trio.current_time() - started >= RTT
        with pytest.raises(OSError, match="connect"):
            await trio.open_tcp_stream("127.0.0.1", listen)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("count", [1, 4, 32])
def test_prompts_of_a_batch_differ(count: int) -> None:
    prompts = _prompts(range(1500), count)
    assert len({tuple(prompt) for prompt in prompts}) == count
    assert {len(prompt) for prompt in prompts} <= set(range(SHORTEST, LONGEST + 1))
    assert len({len(prompt) for prompt in prompts}) == count
