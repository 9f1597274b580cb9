"""The client's half: every way of `generate()`, and conversations that re-send nothing. SmolLM2 and a tiny llama."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TextStreamer

from swarmlm.errors import ContextTooLong, UsageError
from swarmlm.models.client import load_client_model
from swarmlm.models.generation import StreamDecoder, TextSession
from swarmlm.models.loading import build_meta_model, load_into
from swarmlm.models.source import open_source
from swarmlm.models.span import Span
from tests.tiny import tiny_llama
from tests.unit.local_session import LocalSession


class Half:
    """A client over spans in this process, and the sessions it opened."""

    def __init__(self, folder: str) -> None:
        self.source = open_source(folder)
        blocks = self.source.num_blocks
        self.spans = [Span.load(self.source, 0, blocks // 2), Span.load(self.source, blocks // 2, blocks)]
        self.opened: list[LocalSession] = []
        self.model = load_client_model(self.source, open_session=self.open)

    def open(self, batch: int, max_length: int) -> LocalSession:
        self.opened.append(LocalSession(self.spans, batch, max_length))
        return self.opened[-1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Half, Any]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    whole = tiny_llama(folder, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    return Half(str(folder)), whole


IDS = torch.tensor([[5, 17, 9, 33, 60, 17, 9, 33]])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_k": 12},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=["greedy", "sampling", "sequences", "beams", "beam-group", "lookup", "processors"],
)
def test_generate_equals_the_local_model(tiny: tuple[Half, Any], options: dict[str, Any]) -> None:
    half, whole = tiny
    results = []
    for model in (half.model, whole):
        torch.manual_seed(3)
        results.append(model.generate(IDS, max_new_tokens=12, **options))
    assert torch.equal(*results)
    assert half.opened[-1].closed


def test_a_streamer_and_a_stopping_criterion(tiny: tuple[Half, Any]) -> None:
    half, whole = tiny

    class Collect(TextStreamer):
        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value.reshape(-1).tolist())

        def end(self) -> None:
            self.seen.append([])

    collected = []
    for model in (half.model, whole):
        streamer = Collect()
        third = model.generate(IDS, max_new_tokens=3, do_sample=False)[0, -1].item()
        model.generate(IDS, max_new_tokens=10, do_sample=False, streamer=streamer, eos_token_id=third)
        collected.append(streamer.seen)
    assert collected[0] == collected[1]
    assert len(collected[0]) <= 5


def test_one_session_over_three_calls_equals_one_call(tiny: tuple[Half, Any]) -> None:
    half, whole = tiny
    with half.model.inference_session(max_length=64):
        out = IDS
        for _ in range(3):
            out = half.model.generate(out, max_new_tokens=5, do_sample=False)
    session = half.opened[-1]
    assert session.closed
    assert [tokens for _, tokens in session.steps] == [8] + [1] * 14
    assert torch.equal(out, whole.generate(IDS, max_new_tokens=15, do_sample=False))


def test_a_session_is_closed_when_generate_fails(tiny: tuple[Half, Any]) -> None:
    half, _ = tiny

    class Interrupt(TextStreamer):
        def __init__(self) -> None:
            self.count = 0

        def put(self, value: torch.Tensor) -> None:
            self.count += 1
            if self.count == 4:
                raise KeyboardInterrupt

        def end(self) -> None:
            return None

    with pytest.raises(KeyboardInterrupt):
        half.model.generate(IDS, max_new_tokens=10, do_sample=False, streamer=Interrupt())
    assert half.opened[-1].closed


def test_only_left_padding_is_taken(tiny: tuple[Half, Any]) -> None:
    half, _ = tiny
    with pytest.raises(UsageError, match="left"):
        half.model(IDS, attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]]))


def test_more_tokens_than_the_context(tiny: tuple[Half, Any]) -> None:
    half, _ = tiny
    with pytest.raises(ContextTooLong, match="64"):
        half.model.generate(IDS, max_new_tokens=60, do_sample=False)


def test_only_embeddings_norm_and_head_are_here(tiny: tuple[Half, Any]) -> None:
    half, _ = tiny
    names = {name for name, _ in half.model.named_parameters()}
    assert names == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


# ---- conversations ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smol() -> Half:
    torch.set_num_threads(1)
    return Half("smollm2")


class Talk:
    def __init__(self, half: Half, max_length: int = 256) -> None:
        self.tokenizer = half.source.tokenizer()
        self.session = LocalSession(half.spans, 1, max_length)
        self.text = TextSession(
            half.model, self.tokenizer, self.session, context_length=half.source.context_length, max_length=max_length
        )

    def say(self, words: str, count: int = 12, **options: Any) -> list[int]:
        return self.text.chat(words, max_new_tokens=count, on_token=lambda token: None, **options)


def test_paris_as_the_whole_model_says_it(smol: Half) -> None:
    talk = Talk(smol)
    ids = talk.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    whole = build_meta_model(smol.source.config, causal_lm=True)
    load_into(whole, smol.source)
    whole.generation_config = smol.source.generation_config()
    expected = whole.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    answer = talk.say("What is the capital of France?")
    assert answer == expected
    assert "Paris" in talk.tokenizer.decode(answer)


def test_a_second_turn_runs_only_what_is_new(smol: Half) -> None:
    talk = Talk(smol)
    first = talk.say("What is the capital of France?")
    held = talk.session.position
    assert held == talk.session.steps[0][1] + len(first) - 1
    second = talk.say("And of Italy?")
    position, tokens = talk.session.steps[len(first)]
    assert position == held
    assert tokens < 20
    once = Talk(smol)
    conversation = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": talk.tokenizer.decode(first, skip_special_tokens=True)},
        {"role": "user", "content": "And of Italy?"},
    ]
    ids = once.text.encode_chat(conversation)
    assert second == once.text.generate(ids, max_new_tokens=12, on_token=lambda token: None)


def test_reset_forgets(smol: Half) -> None:
    talk = Talk(smol)
    fresh = talk.say("Name one colour.")
    talk.say("Another.")
    talk.text.reset()
    assert talk.say("Name one colour.") == fresh
    assert talk.session.steps[-len(fresh)][0] == 0


def test_stopping_leaves_the_session_usable(smol: Half) -> None:
    talk, calls = Talk(smol), iter(range(100))
    stopped = talk.say("Tell me a long story.", 50, should_stop=lambda: next(calls) >= 4)
    assert len(stopped) == 5
    assert "Paris" in talk.tokenizer.decode(talk.say("What is the capital of France?", 24))


def test_sampling_with_a_seed_repeats(smol: Half) -> None:
    answers = [Talk(smol).say("Tell me a story.", 16, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_sent(smol: Half) -> None:
    talk = Talk(smol, max_length=64)
    with pytest.raises(ContextTooLong, match="64"):
        talk.say("word " * 100)
    assert talk.session.steps == []
    assert talk.say("Say yes.", 4)


def test_a_model_without_a_template_gets_the_text_as_it_is(smol: Half) -> None:
    talk = Talk(smol)
    talk.tokenizer.chat_template = None
    assert talk.text.encode_chat([{"role": "user", "content": "Once upon"}]) == talk.tokenizer("Once upon")["input_ids"]


@functools.cache
def tokenizer_of_smollm2() -> Any:
    return open_source("smollm2").tokenizer()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_streamed_pieces_are_the_text_and_whole_characters(text: str) -> None:
    tokenizer = tokenizer_of_smollm2()
    ids = tokenizer(text)["input_ids"]
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces) + decoder.flush() == whole
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in whole


def test_a_long_stream_stays_the_text() -> None:
    tokenizer = tokenizer_of_smollm2()
    text = "A line with words and 🦊 emoji.\n" * 40
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push(token) for token in tokenizer(text)["input_ids"]) + decoder.flush() == text


def test_folder_names_are_model_names(tmp_path: Path, tiny: tuple[Half, Any]) -> None:
    assert tiny[0].source.name == "tiny"
