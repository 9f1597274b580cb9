"""swarmlm inside other programs: trio, asyncio and plain scripts, hosting and asking in one process."""

from __future__ import annotations

import asyncio

import pytest
import trio

import swarmlm
from tests.net.conftest import PROMPTS, Reference
from tests.net.harness import LocalSwarm


async def test_a_trio_program_hosts_and_chats(reference: Reference) -> None:
    async with swarmlm.open_node() as first, swarmlm.open_node(first.addresses) as second:
        await first.host("smollm2", blocks=range(0, 15), threads=1)
        handle = await second.host("smollm2", blocks=range(15, 30))
        assert (handle.start, handle.end, handle.blocks, handle.dtype) == (15, 30, 30, "float32")
        status = await second.status("smollm2")
        assert (status.holes, len(status.hosts)) == ([], 2)
        async with second.session("smollm2", max_length=512) as session:
            pieces = [text async for text in session.chat(PROMPTS[0], max_tokens=24)]
            assert "Paris" in "".join(pieces)
            assert session.last.text == "".join(pieces)
            reference.assert_exact(reference.chat_ids(PROMPTS[0]), session.last.tokens, 24)
            answer = session.chat("Tell me a very long story.", max_tokens=200)
            async for _ in answer:
                break
            await answer.aclose()
            assert 0 < len(session.last.tokens) < 200
            never_read = session.chat("Tell me another one.", max_tokens=200)
            replaced = session.chat("And another.", max_tokens=200)
            await replaced.aclose()  # before it began
            await never_read.aclose()
            assert len(session.last.tokens) < 200
            await session.reset()
            async for _ in session.chat(PROMPTS[0], max_tokens=24):
                pass
            reference.assert_exact(reference.chat_ids(PROMPTS[0]), session.last.tokens, 24)


def test_an_asyncio_program_chats(pair: LocalSwarm) -> None:
    async def main() -> str:
        async with (
            swarmlm.aio.open_node(pair.addresses) as node,
            node.session("smollm2", max_length=256) as session,
        ):
            return "".join([text async for text in session.chat(PROMPTS[0], max_tokens=24)])

    assert "Paris" in asyncio.run(main())


async def test_a_plain_script_generates(pair: LocalSwarm, reference: Reference) -> None:
    def script() -> str:
        with swarmlm.connect(pair.addresses) as client:
            return "".join(client.generate("smollm2", "The capital of France is", max_tokens=8))

    text = await trio.to_thread.run_sync(script)
    ids = reference.tokenizer("The capital of France is")["input_ids"]
    assert text == reference.tokenizer.decode(reference.greedy(ids, 8), skip_special_tokens=True)


async def test_a_long_conversation_moves_to_a_longer_reservation(
    pair: LocalSwarm, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmlm.session.DEFAULT_LENGTH", 64)
    async with swarmlm.open_node(pair.addresses) as node, node.session("smollm2") as session:
        ids = reference.chat_ids(PROMPTS[2])
        assert len(ids) < 60
        async for _ in session.generate(ids, max_tokens=48):
            pass
        assert session.failovers == 0
        assert session.stats()["tokens held"] > 64
        reference.assert_exact(ids, session.last.tokens, 48)
