"""Text over a session: a conversation that re-sends nothing, and text out of tokens, piece by piece.

Everything here blocks; `swarmlm.session` runs it in a worker thread.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from swarmlm.errors import ContextTooLong, UsageError
from swarmlm.models.remote import BlockingSession, RemoteCache


class StreamDecoder:
    """Token ids to text, as soon as it is whole: half a UTF-8 character is never emitted."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """The new text, "" while a character is incomplete."""
        self._ids.append(token)
        text = self._text()
        if text.endswith("\ufffd"):
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """What is left at the end."""
        return self._emit(self._text())

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _emit(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._shown = text
        if text.endswith("\n") and len(self._ids) > 32:  # a safe place to forget: decoding stays linear
            self._ids = self._ids[-1:]  # one stays: some tokenizers drop a space at the very start
            self._shown = self._text()
        return new


class TextSession:
    """One conversation with a client model over one session of one row."""

    def __init__(
        self, model: Any, tokenizer: Any, session: BlockingSession, *, context_length: int, max_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self._model = model
        self._session = session
        self._context_length = context_length
        self._max_length = max_length
        self._cache = RemoteCache.over(session, max_length)
        self._ids: list[int] = []  # what the session was given, and the last answer
        self._messages: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget what was said; the session stays open."""
        self._cache.length = 0
        self._ids, self._messages = [], []

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of a conversation by the model's own template; without one, the last message as it is."""
        if getattr(self.tokenizer, "chat_template", None):
            encoded = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
            return list(encoded["input_ids"])
        new = self.tokenizer(messages[-1]["content"], add_special_tokens=not self._ids)["input_ids"]
        return [*self._ids, *new]

    def chat(self, text: str, **options: Any) -> list[int]:
        """The next turn. Options and errors as `generate`; a turn that fails leaves the conversation as it was."""
        messages = [*self._messages, {"role": "user", "content": text}]
        ids = self.encode_chat(messages)
        answer: list[int] = []
        on_token = options.pop("on_token")

        def take(token: int) -> None:
            answer.append(token)
            on_token(token)

        try:
            return self.generate(ids, on_token=take, **options)
        finally:
            if answer:
                said = self.tokenizer.decode(answer, skip_special_tokens=True)
                self._messages = [*messages, {"role": "assistant", "content": said}]

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int,
        on_token: Callable[[int], None],
        temperature: float = 0.0,
        seed: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[int]:
        """Continue `prompt` (text or ids), calling `on_token` for each new id, and return the new ids.

        Greedy at temperature 0, else transformers' sampling, equal to a local model's after `torch.manual_seed(seed)`.
        Raises `ContextTooLong` before anything is sent.
        """
        ids = list(self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
        if not ids:
            raise UsageError("there is nothing to continue: the prompt has no tokens")
        if max_new_tokens < 1:
            raise UsageError(f"cannot generate {max_new_tokens} tokens")
        room = self._max_length - len(ids)
        if room < 1:
            whole = "the model's context" if self._max_length == self._context_length else "this session"
            raise ContextTooLong(
                f"the prompt has {len(ids)} tokens, {whole} room for {self._max_length}",
                tokens=len(ids),
                limit=self._max_length,
            )
        self._cache.length = self._common(ids)
        self._ids = list(ids)
        new: list[int] = []

        def take(token: int) -> None:
            new.append(token)
            self._ids.append(token)
            on_token(token)

        if seed is not None:
            torch.manual_seed(seed)
        self._model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            generation_config=self._settings(min(max_new_tokens, room), temperature),
            past_key_values=self._cache,
            streamer=_TokenSink(take),
            stopping_criteria=StoppingCriteriaList([_Stop(should_stop)]),
        )
        return new

    def _common(self, ids: list[int]) -> int:
        """How many tokens the session holds that `ids` starts with; at least one token is always run."""
        held = self._ids[: self._cache.length]
        same = next((i for i, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b), min(len(held), len(ids)))
        return min(same, len(ids) - 1)

    def _settings(self, max_new_tokens: int, temperature: float) -> Any:
        settings = copy.deepcopy(self._model.generation_config)
        settings.max_new_tokens = max_new_tokens
        settings.max_length = None
        settings.do_sample = temperature > 0
        settings.temperature = temperature if temperature > 0 else None
        if temperature <= 0:
            settings.top_k = settings.top_p = None
        if settings.pad_token_id is None:
            eos = settings.eos_token_id
            settings.pad_token_id = eos[0] if isinstance(eos, list) else eos
        return settings


class _TokenSink:
    """A transformers streamer: the first put is the prompt, each later one a new token."""

    def __init__(self, take: Callable[[int], None]) -> None:
        self._take = take
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            for token in value.reshape(-1).tolist():
                self._take(token)
        self._prompt_seen = True

    def end(self) -> None:
        return None


class _Stop(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._should_stop(), dtype=torch.bool, device=input_ids.device)
