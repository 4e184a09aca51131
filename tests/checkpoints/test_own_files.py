"""Only files that belong to a model are read and copied."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from families import random_tensors, write_model

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.checkpoint import open_checkpoint
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.sidecars import chat_template, copy_sidecars
from deltaworks.errors import CheckpointError

SHAPES = {"model.layers.0.mlp.up_proj.weight": (64, 64)}


def _link_out(path: Path) -> None:
    secret = path.parent.parent / "secret.txt"
    secret.write_text("{}")
    path.symlink_to(secret)


def _link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the paths of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


FOREIGN: dict[str, tuple[Callable[[Path], None], str]] = {
    "link": (_link_out, "outside of the model"),
    "dangling": (_link_to_nothing, "cannot be followed"),
    "loop": (_loop, "cannot be followed"),
    "pipe": (os.mkfifo, "is a named pipe"),
    "socket": (_socket, "is a socket"),
    "device": (_device, "outside of the model"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", random_tensors(0, SHAPES))


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["tokenizer_extra.txt", "tokenizer.json", "chat_template.jinja", "vocab.json"])
def test_what_is_no_file_of_the_model_is_not_copied(tmp_path: Path, model: Path, name: str, kind: str) -> None:
    make, message = FOREIGN[kind]
    (model / name).unlink(missing_ok=True)
    make(model / name)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=message) as caught:
        copy_sidecars(model, tmp_path / "out")
    assert str(model / name) in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", FOREIGN)
def test_nor_is_it_read_as_a_configuration(model: Path, kind: str) -> None:
    make, message = FOREIGN[kind]
    (model / "config.json").unlink()
    make(model / "config.json")
    with pytest.raises(CheckpointError, match=f"config.json .*{message.removeprefix('is ')}"):
        open_checkpoint(model, ByteCounter())


@pytest.mark.parametrize(("kind", "message"), [("pipe", "is a named pipe"), ("device", "is a device")])
def test_nor_as_weights(model: Path, kind: str, message: str) -> None:
    (model / "model.safetensors").unlink()
    FOREIGN[kind][0](model / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model, ByteCounter())


def test_nor_as_a_chat_template(model: Path) -> None:
    _link_out(model / "chat_template.jinja")
    with pytest.raises(CheckpointError, match="outside of the model"):
        chat_template(model)


def test_nor_kept_beside_layers(catalog: Catalog, model: Path, tmp_path: Path) -> None:
    base = register(catalog, "base", str(write_model(tmp_path / "base", random_tensors(1, SHAPES))))
    expert = register(catalog, "expert", str(model), "base")
    _link_out(model / "tokenizer_secret.txt")
    with pytest.raises(CheckpointError, match=r"tokenizer_secret\.txt is a link"):
        analyze(catalog, expert, base, layers=True)
    assert not list((catalog.path / "layers").glob("*.layers"))


def test_links_inside_the_repository_are_followed(tmp_path: Path) -> None:
    """A cache of the hub: a snapshot's files are links to blobs two folders up; and a link beside its target."""
    whole = write_model(tmp_path / "whole", random_tensors(0, SHAPES))
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for i, file in enumerate(sorted(whole.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (snapshot / "vocab.json").symlink_to("tokenizer.json")
    assert open_checkpoint(snapshot, ByteCounter()).config
    (tmp_path / "out").mkdir()
    assert "vocab.json" in copy_sidecars(snapshot, tmp_path / "out")
    assert all(not p.is_symlink() for p in (tmp_path / "out").iterdir())
