"""A type checker rejects a message sent to the wrong actor, and knows what the right one answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import swarmlm

ROOT = Path(swarmlm.__file__).parents[1]

HEAD = """
from swarmlm.actors.core import Actor, Body, Message, Ref, Supervisor, handles

class CatRole: ...
class DogRole: ...
class Purr(Body, tag="purr", frozen=True):
    decibels: float
class Stroke(Message[CatRole, Purr], tag="stroke", frozen=True): ...

class Cat(Actor[CatRole]):
    @handles(Stroke)
    async def stroke(self, message: Stroke) -> Purr:
        return Purr(20.0)
"""
RIGHT = """
async def main(supervisor: Supervisor) -> None:
    cat = await supervisor.start(Cat)
    reveal_type(cat)
    reveal_type(await cat.call(Stroke(), deadline=1.0))
    await cat.cast(Stroke())
"""
WRONG = """
async def main(dog: Ref[DogRole]) -> None:
    await dog.call(Stroke(), deadline=1.0)
    await dog.cast(Stroke())

class Odd(Actor[CatRole]):
    @handles(Stroke)
    async def stroke(self, message: Stroke) -> int:
        return 1
"""


def check(source: str, folder: Path) -> list[str]:
    """What mypy --strict says, one line each, without the file's name."""
    (folder / "snippet.py").write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file=", "snippet.py"]
    done = subprocess.run(
        [*command, f"--cache-dir={ROOT / '.mypy_cache' / 'snippets'}"],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line.startswith("snippet.py")]


def test_the_right_ref_knows_its_reply(tmp_path):
    ref, reply = check(HEAD + RIGHT, tmp_path)
    assert 'Ref[snippet.CatRole]"' in ref
    assert 'note: Revealed type is "snippet.Purr"' in reply


def test_the_wrong_ref_and_the_wrong_reply_are_errors(tmp_path):
    call, cast, *handler = check(HEAD + WRONG, tmp_path)
    for line in (call, cast):
        assert "error" in line
        assert 'has incompatible type "Stroke"' in line
    assert "error" in handler[0]
    assert "int" in handler[0]
    assert "Purr" in handler[0]
