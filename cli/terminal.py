"""The prompt of the chat, with history. Blocks; runs in a thread."""

from __future__ import annotations

import os
from pathlib import Path


class Prompt:
    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory

        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "swarmlm"
        try:
            base.mkdir(parents=True, exist_ok=True)
            history: FileHistory | InMemoryHistory = FileHistory(str(base / "history"))
        except OSError:
            history = InMemoryHistory()
        self._session: PromptSession[str] = PromptSession(history=history)

    def ask(self) -> str | None:
        """One line; None at Ctrl-D; "" at Ctrl-C, which only clears the line."""
        try:
            return self._session.prompt("> ", handle_sigint=False)
        except KeyboardInterrupt:
            return ""
        except EOFError:
            return None
