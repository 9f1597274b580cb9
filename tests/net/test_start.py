"""How soon a fresh process answers, and how much memory a host takes beside its weights."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.net.conftest import PROMPTS
from tests.net.harness import HostProcess, LocalSwarm, environment, run_cli

BLOCK_BYTES = 3_540_096 * 4  # parameters of one block of the embedded model, in float32
OVERHEAD_BYTES = 400e6  # resident beside weights and KV: interpreter, torch, transformers, libp2p
FIRST_TOKEN_SECONDS = 4.0  # from starting the process, on a machine where PLAIN_SECONDS holds
PLAIN_SECONDS = 1.5  # `import torch, transformers` in a fresh process on such a machine, files in memory
TRIES = 2  # the best counts: other tests may run beside this one


def seconds_to_import() -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import torch, transformers"], env=environment(), check=True, capture_output=True
    )
    return time.perf_counter() - started


def seconds_to_first_token(address: str) -> tuple[float, str]:
    """(seconds from starting `swarmlm chat` to its first character, all it wrote)."""
    command = [sys.executable, "-m", "swarmlm.cli", "chat", "--peers", address, "--prompt", PROMPTS[0]]
    started = time.perf_counter()
    with subprocess.Popen(
        [*command, "--max-tokens", "8"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment()
    ) as chat:
        assert chat.stdout is not None
        try:
            first = chat.stdout.read(1)
            seconds = time.perf_counter() - started
            return seconds, (first + chat.stdout.read()).decode()
        finally:
            chat.kill()


def overhead(host: HostProcess, blocks: int) -> float:
    """Resident bytes beside the weights of `blocks`; nobody is using the host's KV."""
    return float(psutil.Process(host.process.pid).memory_info().rss - blocks * BLOCK_BYTES)


def test_a_fresh_chat_writes_its_first_token_within_seconds(pair: LocalSwarm) -> None:
    plain = seconds_to_import()
    answers = [seconds_to_first_token(pair.addresses[0]) for _ in range(TRIES)]
    best = min(seconds for seconds, _ in answers)
    print(f"\nfirst token after {best:.2f} s; import torch, transformers alone {plain:.2f} s")
    assert all("Paris" in text for _, text in answers)
    assert best <= FIRST_TOKEN_SECONDS * max(1.0, plain / PLAIN_SECONDS)


def test_a_host_is_little_more_than_its_weights(pair: LocalSwarm) -> None:
    before = [overhead(host, 15) for host in pair.hosts]
    done = run_cli("chat", "--peers", pair.addresses[0], "--prompt", PROMPTS[0], "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    after = [overhead(host, 15) for host in pair.hosts]
    print(f"\nbeside the weights: {', '.join(f'{bytes_ / 1e6:.0f} MB' for bytes_ in before + after)}")
    assert max(before + after) <= OVERHEAD_BYTES


def test_a_host_loads_nothing_that_it_never_runs(pair: LocalSwarm) -> None:
    """The compiler, symbols and triton stay out of a serving process, as its mapped files show."""
    for host in pair.hosts:
        mapped = {Path(region.path).name for region in psutil.Process(host.process.pid).memory_maps()}
        assert "libtorch_cpu.so" in mapped
        assert not {name for name in mapped if name.startswith(("libtriton", "libLLVM")) or name.endswith(".gguf")}
