import json
from pathlib import Path
from typing import Any

import pytest
from families import random_tensors, shapes, write_model

from deltaworks.checkpoints.checkpoint import open_checkpoint
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.errors import CheckpointError


def opened(path: Path) -> Any:
    return open_checkpoint(path, ByteCounter())


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_reads_single_and_sharded(tmp_path: Path, shards: int) -> None:
    tensors = random_tensors(0, shapes())
    checkpoint = opened(write_model(tmp_path / "m", tensors, shards))
    assert checkpoint.tensors.keys() == tensors.keys()
    assert checkpoint.count == sum(t.size for t in tensors.values())
    assert len(checkpoint.shards) == shards
    assert checkpoint.config["model_type"] == "llama"


def test_a_single_file_of_another_name(tmp_path: Path) -> None:
    write_model(tmp_path / "m", random_tensors(0, {"a": (3,)}))
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "weights.safetensors")
    assert list(opened(tmp_path / "m").tensors) == ["a"]


def test_headers_are_counted(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", random_tensors(0, shapes()))
    counter = ByteCounter()
    checkpoint = open_checkpoint(path, counter)
    assert counter.value == checkpoint.nbytes - sum(t.nbytes for t in checkpoint.tensors.values())


def spoil_index(path: Path, change: Any) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", random_tensors(0, shapes()), 3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 3 files.*model-00002-of-00003"):
        opened(path)


def test_an_index_that_points_outside(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", random_tensors(0, shapes()), 2)
    spoil_index(path, lambda m: m.update({"model.norm.weight": "../../etc/passwd"}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        opened(path)


def test_an_index_of_another_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", random_tensors(0, shapes()), 2)
    spoil_index(path, lambda m: m.update({"model.extra": "model-00001-of-00002.safetensors"}))
    with pytest.raises(CheckpointError, match=r"places tensor 'model.extra'"):
        opened(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "model.safetensors").unlink(), "holds no safetensors files$"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "convert its pytorch_model.bin"),
        (lambda p: (p / "config.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / "config.json").write_text("[]"), "not a JSON object"),
        (lambda p: (p / "model.safetensors").rename(p / "a.safetensors") and
                   (p / "b.safetensors").write_bytes((p / "a.safetensors").read_bytes()), "no model.safetensors.index"),
    ],
)  # fmt: skip
def test_refuses(tmp_path: Path, spoil: Any, message: str) -> None:
    path = write_model(tmp_path / "m", random_tensors(0, {"a": (3,)}))
    spoil(path)
    with pytest.raises(CheckpointError, match=message):
        opened(path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        opened(tmp_path / "nothing")


def test_a_tied_head_stands_for_the_embeddings(tmp_path: Path) -> None:
    checkpoint = opened(write_model(tmp_path / "m", random_tensors(0, shapes(head=False))))
    assert checkpoint.find("lm_head.weight") is checkpoint.tensors["model.embed_tokens.weight"]
    assert checkpoint.find("model.nothing.weight") is None


def test_an_adapter_is_recognised(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", random_tensors(0, {"base_model.model.q.lora_A.weight": (4, 8)}))
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"r": 4}')
    checkpoint = opened(path)
    assert checkpoint.is_adapter
    assert checkpoint.config == {"r": 4}
