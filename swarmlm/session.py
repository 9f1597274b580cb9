"""Sessions of a node: text (`models.generation`, in a worker thread) joined to the wire (`routing.session`).

    async with node.session("smollm2") as session:
        async for text in session.chat("What is the capital of France?"):
            print(text, end="")

`Node.session` opens them. transformers' own `generate()` runs in a worker thread; each pass through the remote blocks
comes back to the trio loop as one awaited step.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from swarmlm.bridge import Bridge, GrowingSession
from swarmlm.errors import Closed, ContextTooLong
from swarmlm.models.generation import StreamDecoder, TextSession
from swarmlm.protocol import Codec
from swarmlm.routing.session import SessionEvent, SessionOptions, open_session
from swarmlm.view import SwarmView

if TYPE_CHECKING:
    from swarmlm.models.source import Source
    from swarmlm.node import Node

OnEvent = Callable[[SessionEvent], None]

DEFAULT_LENGTH = 2048  # tokens reserved when nobody said how many: a long chat, 3 MB of KV a block at 135M size
DEFAULT_NEW_TOKENS = 512  # tokens of one answer


@dataclass(frozen=True)
class GenerationResult:
    """`tokens` are the generated ids; `seconds` the time from asking to the last of them, prefill included."""

    text: str
    tokens: list[int]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds > 0 else 0.0


class Answer:
    """An answer being written: iterate it for pieces of text. Leaving the iteration early stops it (`aclose`)."""

    def __init__(self, pieces: trio.MemoryReceiveChannel[str], stop: Callable[[], Awaitable[None]]) -> None:
        self._pieces = pieces
        self._stop = stop
        self.error: BaseException | None = None
        self.stopped = False  # perhaps before its first token was asked for

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> str:
        try:
            return await self.receive()
        except EOFError:
            raise StopAsyncIteration from None

    async def receive(self) -> str:
        """The next piece; `EOFError` at the end. For callers that cannot see a StopAsyncIteration pass a thread."""
        try:
            return await self._pieces.receive()
        except trio.EndOfChannel:
            if self.error is not None:
                error, self.error = self.error, None
                raise error from None
            raise EOFError from None

    async def aclose(self) -> None:
        """Stop writing and wait until the session is at rest. The session stays usable."""
        await self._stop()


class NodeSession:
    """One conversation. Made by `Node.session`; one answer at a time: a new one stops the one before."""

    def __init__(self, node: Node, source: Source, growing: GrowingSession, text: TextSession) -> None:
        self._node = node
        self._source = source
        self._growing = growing
        self._text = text
        self._answer: Answer | None = None  # the latest one
        self._at_rest = trio.Event()  # set when the latest one has ended
        self._at_rest.set()
        self.last = GenerationResult("", [], 0.0)
        self.answers = 0

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Answer:
        """Continue `prompt` (text or token ids) as it is. Greedy at temperature 0."""
        return self._start(self._text.generate, prompt, max_tokens, temperature, seed)

    def chat(
        self, message: str, *, max_tokens: int = DEFAULT_NEW_TOKENS, temperature: float = 0.0, seed: int | None = None
    ) -> Answer:
        """The next turn of the conversation, through the model's own chat template."""
        return self._start(self._text.chat, message, max_tokens, temperature, seed)

    def _start(
        self, method: Callable[..., list[int]], prompt: Any, max_tokens: int, temperature: float, seed: int | None
    ) -> Answer:
        send, receive = trio.open_memory_channel[str](math.inf)
        answer = Answer(receive, self._stop)
        before, self._at_rest = self._at_rest, trio.Event()
        if self._answer is not None and not before.is_set():
            self._answer.stopped = True
            self._growing.stop()
        self._answer = answer
        work = functools.partial(method, prompt, max_new_tokens=max_tokens, temperature=temperature, seed=seed)
        self._node.nursery.start_soon(self._write, work, answer, send, before, self._at_rest)
        return answer

    async def _write(
        self,
        work: Callable[..., list[int]],
        answer: Answer,
        pieces: trio.MemorySendChannel[str],
        before: trio.Event,
        at_rest: trio.Event,
    ) -> None:
        """One answer, from when the one before is at rest until it is at rest itself."""
        await before.wait()
        if not answer.stopped:
            self._growing.restart()
        decoder = StreamDecoder(self._text.tokenizer)
        token = trio.lowlevel.current_trio_token()
        written: list[str] = []
        ids: list[int] = []

        def put(piece: str) -> None:
            if piece:
                written.append(piece)
                pieces.send_nowait(piece)

        def on_token(one: int) -> None:
            ids.append(one)
            piece = decoder.push(one)
            token.run_sync_soon(put, piece)

        write = functools.partial(work, on_token=on_token, should_stop=lambda: self._growing.stopped)
        started = time.perf_counter()
        try:
            await trio.to_thread.run_sync(write)
        except Closed as error:
            if not self._growing.stopped:
                answer.error = error
        except Exception as error:
            answer.error = error
        finally:
            seconds = time.perf_counter() - started
            put(decoder.flush())
            self.last = GenerationResult("".join(written), ids, seconds)
            self.answers += 1
            pieces.close()
            at_rest.set()

    async def _stop(self) -> None:
        if self._answer is not None and not self._at_rest.is_set():
            self._answer.stopped = True
            self._growing.stop()
            await self._at_rest.wait()

    async def reset(self) -> None:
        """Forget the conversation; the route and the reserved memory stay."""
        await self._stop()
        self._text.reset()

    def route(self) -> list[Any]:
        """The hosts in order: peer, start, end, ms (smoothed round trip of a step)."""
        return list(self._growing.session.route)

    @property
    def failovers(self) -> int:
        return self._growing.failovers

    def stats(self) -> dict[str, float | int | str]:
        return {
            "model": self._source.name,
            "tokens held": self._growing.position,
            "answers": self.answers,
            "tokens of the last answer": len(self.last.tokens),
            "tokens per second": round(self.last.tokens_per_second, 2),
            "failovers": self.failovers,
        }


@asynccontextmanager
async def open_node_session(
    node: Node,
    model: str,
    *,
    max_length: int | None,
    dtype: str | None,
    codec: Codec = "none",
    on_event: OnEvent | None,
) -> AsyncIterator[NodeSession]:
    source = await node.source(model)
    limit = min(max_length or source.context_length, source.context_length)
    if max_length is not None and max_length > source.context_length:
        raise ContextTooLong(f"{max_length} tokens are more than the {source.context_length} of {model}'s context")
    view = SwarmView(node, source.name)
    growing = GrowingSession(
        lambda length: open_session(
            view,
            model=source.name,
            fingerprint=source.fingerprint,
            blocks=source.num_blocks,
            max_length=length,
            options=SessionOptions(codec=codec),
            on_event=on_event,
        ),
        length=max_length or min(DEFAULT_LENGTH, limit),
        limit=limit,
    )
    loading = _Loading(functools.partial(node.client_model, model, dtype))
    node.nursery.start_soon(loading.run)  # while the hosts are asked and dialled
    token = trio.lowlevel.current_trio_token()
    session: NodeSession | None = None
    try:
        await growing.open()
        client, tokenizer = await loading.result()
        bridge = Bridge(growing, token, lambda: None)
        text = TextSession(client, tokenizer, bridge, context_length=source.context_length, max_length=limit)
        session = NodeSession(node, source, growing, text)
        yield session
    finally:
        with trio.CancelScope(shield=True):
            if session is not None:
                await session._stop()
            await growing.aclose()


class _Loading:
    """A load in a task of its own: its result, or its error, is told to whoever asks."""

    def __init__(self, load: Callable[[], Awaitable[Any]]) -> None:
        self._load = load
        self._done = trio.Event()
        self._value: Any = None
        self._error: Exception | None = None

    async def run(self) -> None:
        try:
            self._value = await self._load()
        except Exception as error:
            self._error = error
        finally:
            self._done.set()

    async def result(self) -> Any:
        await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value
