"""Model sources: only what is wanted is read, and whatever is wrong with a checkpoint is one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarmlm.errors import BadSpan, CheckpointCorrupt, ModelNotFound, ModelUnsupported
from swarmlm.models import checkpoint as checkpoints
from swarmlm.models.checkpoint import GGUFCheckpoint
from swarmlm.models.embedded import embedded_gguf
from swarmlm.models.source import open_source
from swarmlm.models.span import Span
from tests.tiny import HIDDEN, tiny_llama

LAYERS = 6


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of about one block a shard."""
    folder = tmp_path_factory.mktemp("models") / "sharded"
    tiny_llama(folder, layers=LAYERS, shard="40KB")
    assert len(list(folder.glob("*.safetensors"))) > LAYERS / 2
    return folder


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(sharded, tmp_path / "sharded"))


def shards_of(folder: Path, start: int, end: int) -> set[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    blocks = tuple(f"model.layers.{block}." for block in range(start, end))
    return {shard for name, shard in index.items() if name.startswith(blocks)}


def test_a_span_opens_only_the_shards_of_its_blocks(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = checkpoints._open_shard
    monkeypatch.setattr(checkpoints, "_open_shard", lambda path: opened.append(path.name) or real(path))
    Span.load(open_source(str(sharded)), 2, 4)
    assert set(opened) == shards_of(sharded, 2, 4)
    assert set(opened) < shards_of(sharded, 0, LAYERS)


def test_progress_counts_the_tensors_read(sharded: Path) -> None:
    seen: list[tuple[int, int]] = []
    Span.load(open_source(str(sharded)), 0, 2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 18) for done in range(19)]


def test_names_and_fingerprints(sharded: Path, copy: Path) -> None:
    source, same = open_source(str(sharded)), open_source(str(copy))
    assert (source.name, source.num_blocks, source.context_length) == ("sharded", LAYERS, 64)
    assert source.fingerprint == same.fingerprint
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5, "_name_or_path": "elsewhere"}))
    assert open_source(str(copy)).fingerprint != source.fingerprint


@pytest.mark.parametrize("span", [(4, 2), (0, 0), (0, LAYERS + 1), (-1, 2)])
def test_spans_that_are_none(sharded: Path, span: tuple[int, int]) -> None:
    with pytest.raises(BadSpan, match=f"{span[0]}:{span[1]} are no span of sharded, which has {LAYERS} blocks"):
        Span.load(open_source(str(sharded)), *span)


def test_a_truncated_shard(copy: Path) -> None:
    shard = copy / min(shards_of(copy, 2, 3))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointCorrupt, match=shard.name):
        Span.load(open_source(str(copy)), 2, 3)
    whole = set(range(LAYERS)) - {block for block in range(LAYERS) if shard.name in shards_of(copy, block, block + 1)}
    Span.load(open_source(str(copy)), min(whole), min(whole) + 1)


def test_a_shard_with_a_garbage_header(copy: Path) -> None:
    shard = copy / min(shards_of(copy, 0, 1))
    shard.write_bytes(b"\xff" * 16 + shard.read_bytes()[16:])
    with pytest.raises(CheckpointCorrupt, match=shard.name):
        Span.load(open_source(str(copy)), 0, 1)


def test_a_missing_shard(copy: Path) -> None:
    shard = copy / min(shards_of(copy, 0, 1))
    shard.unlink()
    with pytest.raises(CheckpointCorrupt, match=f"lacks the file {shard.name}"):
        Span.load(open_source(str(copy)), 0, 1)


def test_a_missing_tensor(copy: Path) -> None:
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointCorrupt, match=r"lacks .*mlp\.up_proj\.weight"):
        Span.load(open_source(str(copy)), 1, 2)


def test_a_tensor_of_the_wrong_shape(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(CheckpointCorrupt, match="shape"):
        Span.load(open_source(str(copy)), 0, 1)


def test_an_index_that_is_none(copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointCorrupt, match=r"index\.json"):
        open_source(str(copy))


def test_a_config_that_is_not_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises((CheckpointCorrupt, ModelUnsupported), match="sharded") as raised:
        open_source(str(copy))
    assert "\n" not in str(raised.value)


def test_pickled_checkpoints_are_refused(copy: Path) -> None:
    for file in copy.glob("model*"):
        file.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelUnsupported, match="pickled"):
        open_source(str(copy))


@pytest.mark.parametrize("name", ["nonsense", "./nowhere", "/no/where", "missing.gguf", "a/b/c"])
def test_names_that_lead_nowhere(name: str) -> None:
    with pytest.raises(ModelNotFound, match=name):
        open_source(name)


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        open_source(str(tmp_path))


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"not a model at all")
    with pytest.raises(CheckpointCorrupt, match=r"fake\.gguf"):
        open_source(str(tmp_path / "fake.gguf"))


def test_the_embedded_model_equals_what_transformers_loads_and_reads_only_its_blocks() -> None:
    path = embedded_gguf()
    assert path is not None
    source = open_source("smollm2")
    span = Span.load(source, 10, 12, fast=False)
    assert isinstance(source.checkpoint, GGUFCheckpoint)
    assert source.checkpoint.tensors_read == 2 * 9
    whole = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = [tensor for _, tensor in span._model.named_parameters()]
    theirs = [tensor for layer in whole.model.layers[10:12] for tensor in layer.parameters()]
    assert len(ours) == len(theirs) == 2 * 9
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
def test_half_precision(sharded: Path, dtype: torch.dtype, tolerance: float) -> None:
    from swarmlm.models.span import SpanJob

    source = open_source(str(sharded))
    hidden = torch.randn(1, 7, HIDDEN, generator=torch.Generator().manual_seed(0))
    outputs = []
    for kind in (torch.float32, dtype):
        span = Span.load(source, 0, LAYERS, dtype=kind)
        assert next(span._model.parameters()).dtype is kind
        output = span.run([SpanJob(span.open(1, 8), hidden, 0)])[0]
        assert output.dtype is kind
        outputs.append(output.float())
    scale = outputs[0].abs().max()
    assert (outputs[0] - outputs[1]).abs().max() < tolerance * scale
