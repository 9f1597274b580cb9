"""Loading from a hub, against a small stand-in over HTTP: only the shards needed, then offline from the cache."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.tiny import tiny_llama

REPOSITORY = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LAYERS = 6

LOAD = """
import sys
from swarmlm.errors import SwarmError
from swarmlm.models.source import open_source
from swarmlm.models.span import Span
try:
    span = Span.load(open_source(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
except SwarmError as error:
    print(type(error).__name__, error)
else:
    print("loaded", span.name, span.start, span.end)
"""


class Hub:
    """Serves one repository as huggingface_hub asks for it, and notes which files were downloaded."""

    def __init__(self, folder: Path) -> None:
        self.downloads: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                path = self.path.partition("?")[0]
                if path.startswith(f"/api/models/{REPOSITORY}"):
                    names = sorted(file.name for file in folder.iterdir())
                    info = {"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                    self._send(json.dumps(info | {"private": False, "tags": [], "downloads": 0}).encode(), body)
                    return
                start = f"/{REPOSITORY}/resolve/"
                file = folder / path.rpartition("/")[2]
                if not path.startswith(start) or not file.is_file():
                    missing = "EntryNotFound" if path.startswith(start) else "RepoNotFound"
                    self.send_response(404)
                    self.send_header("X-Error-Code", missing)
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if body:
                    hub.downloads.append(file.name)
                self._send(file.read_bytes(), body)

            def _send(self, data: bytes, body: bool) -> None:
                first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
                self.send_response(206 if first else 200)
                self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(data) - first))
                self.end_headers()
                if body:
                    self.wfile.write(data[first:])

            def log_message(self, *_: object) -> None:
                return None

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    tiny_llama(folder, layers=LAYERS, shard="40KB")
    return folder


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def load(model: str, start: int, end: int, **environment: str) -> str:
    """What a fresh process prints; huggingface_hub reads its environment when imported."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, model, str(start), str(end)],
        capture_output=True,
        text=True,
        timeout=120,
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_only_the_shards_needed_are_downloaded_and_then_none(hub: Hub, folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for name, shard in index.items() if name.startswith(("model.layers.2.", "model.layers.3."))}
    assert load(REPOSITORY, 2, 4, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path)) == f"loaded {REPOSITORY} 2 4"
    assert {name for name in hub.downloads if name.endswith(".safetensors")} == needed
    assert needed < set(index.values())

    hub.downloads.clear()
    offline = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert load(REPOSITORY, 2, 4, **offline) == f"loaded {REPOSITORY} 2 4"
    assert hub.downloads == []
    other = load(REPOSITORY, 0, 1, **offline)
    assert other.startswith("ModelNotFound")
    assert "not in the local cache" in other
    assert load("someone/else", 0, 1, **offline).startswith("ModelNotFound cannot get someone/else")


def test_a_repository_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    line = load("someone/nothing", 0, 1, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    assert line.startswith("ModelNotFound cannot get someone/nothing from the hub: ")


def test_a_hub_that_cannot_be_reached_is_told_of_soon(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    line = load("someone/tiny", 0, 1, HF_ENDPOINT=f"http://127.0.0.1:{port}", HF_HOME=str(tmp_path))
    assert line.startswith("ModelNotFound")
    assert time.monotonic() - started < 15  # importing torch and transformers is most of it
