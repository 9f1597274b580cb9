"""What compressing hidden states on the wire costs and saves: bytes, and how far the next token's odds move."""

from __future__ import annotations

import torch
import trio

from swarmlm.bench.options import BenchOptions
from swarmlm.bench.reference import prose
from swarmlm.bench.report import Report
from swarmlm.bench.swarm import open_client_model, open_swarm
from swarmlm.config import CODECS
from swarmlm.kernels.compression import compressed_bytes

TOKENS = 256  # of prose, read at once


async def run(options: BenchOptions) -> Report:
    """Raises what serving and opening sessions raise."""
    async with open_swarm(options) as swarm:
        hidden = int(swarm.source.config.hidden_size)
        tokenizer = swarm.source.tokenizer()
        ids = torch.tensor([tokenizer(prose())["input_ids"][: options.tokens or TOKENS]])
        report = Report("wire", f"Compressing hidden states of {swarm.source.name} between peers")
        exact: torch.Tensor | None = None
        for codec in CODECS:
            options.progress(codec)
            async with open_client_model(swarm, codec=codec) as model:

                def read(model: object = model) -> torch.Tensor:
                    with torch.inference_mode():
                        logits: torch.Tensor = model(ids).logits  # type: ignore[operator]
                        return logits[0].double().log_softmax(-1)

                odds = await trio.to_thread.run_sync(read)
            exact = odds if exact is None else exact
            divergence = float((exact.exp() * (exact - odds)).sum(-1).mean())
            same = float((exact.argmax(-1) == odds.argmax(-1)).double().mean())
            size, whole = (compressed_bytes((1, 1, hidden), how) for how in (codec, CODECS[0]))
            report.add(
                f"{codec}: a token's hidden state", [size], "bytes", ratio=size / whole, against="x uncompressed"
            )
            report.add(f"{codec}: divergence (KL) of the next token's odds", [divergence], "nats")
            report.add(f"{codec}: likeliest token unchanged", [100 * same], "%")
    report.notes.append(f"{ids.shape[1]} tokens of prose through {len(swarm.hosts)} hosts, compressed at every hop.")
    return report
