"""What is on disk in place of a model's weights is found when the model is opened, and named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import random_tensors, read_model, recipe, shapes, write_family, write_model
from merges import merge
from safetensors.numpy import save_file

from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.checkpoint import open_checkpoint
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.unread import unread_weights
from deltaworks.errors import ChangedError, CheckpointError
from deltaworks.merging.manifest import MANIFEST

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def opened(path: Path) -> Any:
    return open_checkpoint(path, ByteCounter())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m", random_tensors(0, shapes()), 2)


# Two sets of weights


def test_the_same_weights_twice_are_read_from_the_file_that_loaders_prefer(sharded: Path) -> None:
    save_file(read_model(sharded), sharded / "model.safetensors")
    assert [s.name for s in opened(sharded).shards] == ["model.safetensors"]


def other_values(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + tensors["model.norm.weight"]


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (other_values, "model.norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "extra"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(np.float32)}), "lm_head.weight"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].reshape(-1)}), "lm_head.weight"),
    ],
)
def test_two_sets_of_weights_that_differ(sharded: Path, change: Callable[[Any], None], first: str) -> None:
    tensors = dict(read_model(sharded))
    change(tensors)
    save_file(tensors, sharded / "model.safetensors")
    message = (
        f"two sets of weights that differ .first in tensor '{first}'.*model.safetensors, which .*{SHARD} and 1 more"
    )
    with pytest.raises(CheckpointError, match=message):
        opened(sharded)


def test_an_index_whose_shards_are_gone_rivals_nobody(sharded: Path) -> None:
    save_file(read_model(sharded), sharded / "model.safetensors")
    for shard in sharded.glob("model-*"):
        shard.unlink()
    assert [s.name for s in opened(sharded).shards] == ["model.safetensors"]


def test_a_single_file_that_comes_beside_registered_shards(catalog: Catalog, sharded: Path) -> None:
    from deltaworks.catalog.register import check_unchanged

    model = register(catalog, "m", str(sharded))
    tensors = dict(read_model(sharded))
    other_values(tensors)
    save_file(tensors, sharded / "model.safetensors")
    with pytest.raises(ChangedError, match="put beside the weights"):
        check_unchanged(catalog, model)


# An index and its shards


def reindex(path: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def test_a_tensor_that_the_index_lacks(sharded: Path) -> None:
    reindex(sharded, lambda m: m.pop("lm_head.weight"))
    with pytest.raises(
        CheckpointError, match=r"holds tensor 'lm_head.weight', which model.safetensors.index.json does"
    ):
        opened(sharded)


def test_buffers_that_the_index_lacks_are_no_weights(tmp_path: Path) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    path = write_model(tmp_path / "m", random_tensors(0, shapes() | {buffer: (4,)}), 2)
    reindex(path, lambda m: m.pop(buffer))
    assert buffer not in opened(path).tensors


def test_a_shard_that_the_index_lacks(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", random_tensors(0, shapes()), 3)
    lost = "model-00003-of-00003.safetensors"
    reindex(path, lambda m: [m.pop(n) for n, f in list(m.items()) if f == lost])
    with pytest.raises(CheckpointError, match=f"holds {lost}, which belongs to the shards"):
        opened(path)


def test_shards_of_an_older_set_are_no_part_of_the_model(sharded: Path) -> None:
    save_file({"old": np.zeros(3, np.float32)}, sharded / "model-00003-of-00003.safetensors")
    assert "old" not in opened(sharded).tensors


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    tensors = dict(read_model(sharded))
    save_file({n: tensors[n] for n in json.loads((sharded / INDEX).read_text())["weight_map"]}, sharded / SHARD)
    with pytest.raises(CheckpointError, match=f"stands both in {SHARD} and in model-00002"):
        opened(sharded)


def test_an_index_with_an_endless_name(sharded: Path) -> None:
    reindex(sharded, lambda m: m.update({"model.norm.weight": "x" * 100_000}))
    with pytest.raises(CheckpointError, match="not a plain file name") as refused:
        opened(sharded)
    assert len(str(refused.value)) < 400 + len(str(sharded))


# Other things than safetensors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model-00001-of-00002.bin", "convert its pytorch_model.bin"),
        ("model-q4_k_m.gguf", "is GGUF weights: merge the model's unquantized safetensors"),
        ("consolidated.00.pth", "Meta's own format"),
        ("model.pt", "convert them to safetensors"),
        ("model.ckpt", "a training checkpoint"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("__0_0.distcp", "a distributed training checkpoint"),
        ("global_step100/states", "a DeepSpeed checkpoint"),
        ("optimizer.pt", "optimizer.pt is the state of a training run"),
        ("training_args.bin", "training_args.bin is the state of a training run"),
        ("optimizer.safetensors", "optimizer.safetensors is the state of a training run"),
        ("model.safetensors.incomplete", "is an unfinished download"),
        ("checkpoint-500/model.safetensors", "checkpoint-500 inside it does; pass it"),
        ("adapter_model.bin", "a LoRA adapter in PyTorch's format"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=f"holds no safetensors files; {message}|{message}"):
        opened(tmp_path)


def test_a_training_checkpoint_with_a_model_is_a_model(sharded: Path) -> None:
    for name in ("optimizer.pt", "optimizer.safetensors", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (sharded / name).write_bytes(b"state")
    assert len(opened(sharded).shards) == 2


def test_an_adapter_without_its_configuration(tmp_path: Path) -> None:
    save_file({"q.lora_A.weight": np.zeros((2, 2), np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter without its adapter_config.json"):
        opened(tmp_path)


CONTENTS = [
    (POINTER, "is a Git LFS pointer in place of the file; fetch the file with git lfs pull"),
    (b"", "is empty; the download failed: fetch it again"),
    (b"<!DOCTYPE html><html>" + b" " * 100, "is a web page"),
    (b"Entry not found", "is an error message of the hub"),
]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *CONTENTS,
        (bytes(5000), "begins with zeros; the download did not finish"),
        (b"GGUF\x03\0\0\0" + bytes(100), "is a GGUF file"),
        (b"PK\x03\x04" + b"\x08" * 100, "is a PyTorch archive; convert it"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9" + bytes(100), "is a PyTorch pickle; convert it"),
        (b"abc", "too short"),
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_weights_that_are_something_else(tmp_path: Path, content: bytes, message: str, shards: int) -> None:
    path = write_model(tmp_path / "m", random_tensors(0, shapes()), shards)
    file = path / ("model.safetensors" if shards == 1 else SHARD)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file.name} .*{message}"):
        opened(path)


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_that_are_cut_short(tmp_path: Path, shards: int) -> None:
    path = write_model(tmp_path / "m", random_tensors(0, shapes()), shards)
    file = path / ("model.safetensors" if shards == 1 else SHARD)
    whole = file.read_bytes()
    for size in (10, 200, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f"{file.name} .*(cut short|too short).*fetch it again"):
            opened(path)


@pytest.mark.parametrize(("content", "message"), CONTENTS)
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json", INDEX])
def test_small_files_that_are_something_else(
    catalog: Catalog, sharded: Path, name: str, content: bytes, message: str
) -> None:
    (sharded / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} .*{message}"):
        register(catalog, "m", str(sharded))


def test_a_pointer_for_a_tokenizer_that_is_no_json(catalog: Catalog, sharded: Path) -> None:
    (sharded / "tokenizer.model").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"tokenizer.model is a Git LFS pointer"):
        register(catalog, "m", str(sharded))


# Weights that no loader looks for


def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("model.layers", "layers"): 2 * value for name, value in tensors.items()}


def halves(tensors: dict[str, Any]) -> list[dict[str, Any]]:
    names = sorted(tensors)
    return [{n: tensors[n] for n in half} for half in (names[::2], names[1::2])]


UNREAD = [
    pytest.param(lambda t: {"consolidated.safetensors": renamed(t)}, [("consolidated.safetensors",)], id="Mistral's"),
    pytest.param(lambda t: {"model.fp16.safetensors": t}, [("model.fp16.safetensors",)], id="a variant"),
    pytest.param(
        lambda t: {f"old-0000{i}-of-00002.safetensors": half for i, half in enumerate(halves(t), 1)},
        [("old-00001-of-00002.safetensors", "old-00002-of-00002.safetensors")],
        id="another set of shards",
    ),
    pytest.param(lambda t: {"old-00001-of-00002.safetensors": dict(list(t.items())[:1])}, [], id="a part of a set"),
    pytest.param(lambda _: {"vision.safetensors": {"a": np.zeros((3, 5), np.float32)}}, [], id="another model"),
    pytest.param(lambda t: {"optimizer.safetensors": t}, [], id="the state of a training run"),
    pytest.param(lambda t: {"model-00001-of-00001.safetensors": t}, [("model-00001-of-00001.safetensors",)], id="one"),
]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(("others", "expected"), UNREAD)
def test_weights_beside_those_of_the_model_are_found(
    tmp_path: Path, others: Callable[[dict[str, Any]], dict[str, dict[str, Any]]], expected: list[Any], shards: int
) -> None:
    path = write_model(tmp_path / "m", tensors := random_tensors(0, shapes()), shards)
    for name, content in others(tensors).items():
        save_file(content, path / name)
    assert unread_weights(opened(path)) == expected


def test_a_damaged_file_beside_the_weights_is_passed_over(sharded: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(b"\xff" * 64)
    assert unread_weights(opened(sharded)) == []


def test_a_merge_names_weights_that_it_does_not_read(catalog: Catalog, tmp_path: Path) -> None:
    family = write_family(tmp_path, experts=1)
    save_file(renamed(family["expert0"]), tmp_path / "expert0" / "consolidated.safetensors")
    text = recipe("task_arithmetic", tmp_path, listed=("expert0",), parameters="weight: 0.5")
    merge(catalog, text, tmp_path / "out")
    (note,) = json.loads((tmp_path / "out" / MANIFEST).read_text())["notes"]
    assert note == (
        "'consolidated.safetensors' is not read: expert0 has weights of the same shapes in"
        " 'model-00001-of-00002.safetensors', which transformers loads"
    )
