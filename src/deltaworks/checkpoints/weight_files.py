"""Which files of a model folder hold its weights, by the order in which transformers looks for them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaworks.checkpoints.json_files import read_json
from deltaworks.errors import CheckpointError, quoted

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_LONGEST_NAME = 255
_OTHER_FORMATS = (
    ("*.gguf", "GGUF weights", "merge the model's unquantized safetensors"),
    ("consolidated*.pth", "Meta's own format", "convert it with the script that transformers has for the model"),
    ("pytorch_model*.bin", "PyTorch weights", "convert its pytorch_model.bin to safetensors first"),
    ("adapter_model.bin", "a LoRA adapter in PyTorch's format", "convert it to safetensors first"),
    ("*.distcp", "a distributed training checkpoint", "save it as a whole model first"),
    ("global_step*", "a DeepSpeed checkpoint", "run its zero_to_fp32.py, and convert the result to safetensors"),
    ("tf_model*.h5", "TensorFlow weights", "convert them to safetensors first"),
    ("flax_model*.msgpack", "Flax weights", "convert them to safetensors first"),
    ("*.nemo", "a NeMo archive", "export it to the Hugging Face format first"),
    ("*.onnx", "an ONNX graph", "merge the model that it was exported from"),
    ("*.ckpt", "a training checkpoint", "save it as a model of safetensors first"),
    ("*.pth", "PyTorch weights", "convert them to safetensors first"),
    ("*.pt", "PyTorch weights", "convert them to safetensors first"),
    ("*.npz", "NumPy arrays", "convert them to safetensors first"),
    ("*.bin", "PyTorch weights", "convert them to safetensors first"),
)
_TRAINING_STATE = ("optimizer", "scheduler", "training_args", "rng_state", "random_states", "scaler", "trainer_state")
"""How files of a training checkpoint begin that are not weights."""


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files of a model folder.

    Attributes:
        names: of the files, sorted.
        weight_map: the file of every tensor, as the index has it; None where there is no index.
        alternatives: names of other files that a loader might read instead: shards of an index beside a single file.
        unlisted: names of files that belong to the shards of the index and are not named by it.
    """

    names: list[str]
    weight_map: dict[str, str] | None = None
    alternatives: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()


def find_weight_files(path: Path, *, is_adapter: bool) -> WeightFiles:
    """The weight files of the model folder at `path`.

    transformers takes ``model.safetensors`` where it is there, and looks for an index only where it is not.

    Raises:
        CheckpointError: there are none, or it is not clear which; the message says what is there instead.
    """
    if is_adapter:
        if not (path / ADAPTER).is_file() and (path / "adapter_model.bin").is_file():
            raise CheckpointError(f"{path} holds adapter_model.bin; convert it to {ADAPTER} first")
        return WeightFiles([ADAPTER])
    if (path / SINGLE).is_file():
        if not (path / INDEX).is_file():
            return WeightFiles([SINGLE])
        named = set(_weight_map(path).values()) - {SINGLE}
        return WeightFiles([SINGLE], alternatives=tuple(sorted(n for n in named if (path / n).is_file())))
    if (path / INDEX).is_file():
        weight_map = _weight_map(path)
        names = sorted(set(weight_map.values()))
        if lost := [n for n in names if not (path / n).is_file()]:
            raise CheckpointError(
                f"{path} lacks {len(lost)} of the {len(names)} files its index names (first: {lost[0]});"
                " finish the download"
            )
        return WeightFiles(names, weight_map, unlisted=_unlisted(path, names))
    found = sorted(p.name for p in path.glob("*.safetensors") if not p.name.startswith(_TRAINING_STATE))
    if found == [ADAPTER]:
        raise CheckpointError(f"{path} holds a LoRA adapter without its {ADAPTER_CONFIG}; fetch that too")
    if len(found) == 1:
        return WeightFiles(found)
    if found:
        raise CheckpointError(
            f"{path} holds {len(found)} safetensors files and no {INDEX}; the index is needed to read them"
        )
    raise CheckpointError(f"{path} holds no safetensors files{_what_is_there(path)}")


def other_weights(path: Path, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The safetensors files of a model folder that are not its weight files, shards of one set together.

    Args:
        path: the folder.
        names: of the model's weight files; where those are shards and loaders may take a single file, or the other way
            round, `find_weight_files` has made sure that both hold the same, and they are left out.
    """
    known = {ADAPTER, *names}
    if SINGLE in known and (path / INDEX).is_file():
        known |= set(_weight_map(path).values())
    sets: dict[str, list[str]] = {}
    for name in sorted(p.name for p in path.glob("*.safetensors")):
        if name not in known and not name.startswith(_TRAINING_STATE):
            sets.setdefault(_set_of(name) or name, []).append(name)
    return [tuple(found) for found in sets.values()]


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in (".", "..") or _is_too_long(file):
            raise CheckpointError(
                f"{path / INDEX} places tensor {quoted(name)} in {quoted(file)}, which is not a plain file name"
            )
    return weight_map


def _is_too_long(name: str) -> bool:
    return "\0" in name or len(os.fsencode(name)) > _LONGEST_NAME


def _unlisted(path: Path, names: list[str]) -> tuple[str, ...]:
    """Files of the very set of shards that an index names, which it does not name."""
    sets = {own for n in names if (own := _set_of(n)) is not None}
    others = sorted(p.name for p in path.glob("*.safetensors") if p.name not in names)
    return tuple(n for n in others if _set_of(n) in sets)


def _set_of(name: str) -> str | None:
    """What shards of one set have in common: ``model`` and ``00003`` of ``model-00001-of-00003.safetensors``."""
    stem, dash, total = name.removesuffix(".safetensors").rpartition("-of-")
    start, _, number = stem.rpartition("-")
    return f"{start}-of-{total}" if dash and total.isdecimal() and number.isdecimal() else None


def _what_is_there(path: Path) -> str:
    """The end of an error about a folder without safetensors: what it holds instead, and what to do with it."""
    names = sorted(p.name for p in path.iterdir())
    weights = [n for n in names if not n.startswith(_TRAINING_STATE)]
    for pattern, what, advice in _OTHER_FORMATS:
        if found := [n for n in weights if Path(n).match(pattern)]:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return f"; {found[0]}{more} is {what}: {advice}"
    if unfinished := [n for n in names if n.endswith((".incomplete", ".part", ".crdownload", ".aria2", ".tmp"))]:
        return f"; {unfinished[0]} is an unfinished download: finish it"
    if inside := [n for n in names if (path / n).is_dir() and any((path / n).glob("*.safetensors"))]:
        return f"; {', '.join(inside[:3])} inside it {'does; pass it' if len(inside) == 1 else 'do; pass one of them'}"
    if states := [n for n in names if n.startswith(_TRAINING_STATE)]:
        return f"; {states[0]} is the state of a training run, without the model's weights: give the saved model"
    return ""
