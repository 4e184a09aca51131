"""Adapter names in the files that run a placement: which can be written there, and how each file wants them written."""

import json
import shlex
from collections.abc import Collection, Iterable, Mapping

from deltaworks.errors import PlacementError, quoted
from deltaworks.serving.schema import has_controls

LONGEST_NAME = 255
"""Bytes of UTF-8; what file systems take as the name of a folder."""

_FOLDER = "\x7f"
"""Stands for the folder of adapters while a shell word is built; no name holds a control character."""


def check_names(names: Iterable[str], paths: Mapping[str, str], models: Collection[str]) -> None:
    """Check that every adapter can be deployed under its name.

    Args:
        names: Of the adapters.
        paths: Paths or hub ids of adapters by name, as far as they are known.
        models: The base models that they are served on.

    Raises:
        PlacementError: one of the generated files, or vLLM, cannot express a name; it is quoted, with the reason.
    """
    for name in names:
        source = paths.get(name, "")
        if (fault := _fault(name, models)) or (not is_hub_id(source) and (fault := _folder_fault(name))):
            raise PlacementError(f"adapter {quoted(name)} cannot be deployed: {fault}; give it another name")
        if has_controls(source):
            raise PlacementError(f"adapter {quoted(name)} cannot be deployed: its path holds a control character")


def is_hub_id(path: str) -> bool:
    """Whether the source of an adapter is a hub id, which every server can load, and no path on this machine."""
    return bool(path) and not path.startswith("/")


def _fault(name: str, models: Collection[str]) -> str:
    """Why no file can hold a name; empty if all can."""
    if not name.strip():
        return "a name must hold more than spaces"
    if has_controls(name):
        return "it holds a control character, a line break or half of a surrogate pair"
    if (size := len(name.encode())) > LONGEST_NAME:
        return f"it takes {size:,} bytes, and file systems take {LONGEST_NAME}"
    if name in models:
        return "it is the name of the base model, which would answer its requests"
    if "*" in name:
        return "LiteLLM would read '*' as a pattern, and send requests for other models there"
    if name.startswith("os.environ/"):
        return "LiteLLM would put the value of an environment variable in its place"
    return ""


def _folder_fault(name: str) -> str:
    """Why a name cannot be that of a folder below the folder of adapters; empty if it can."""
    if name.startswith("/"):
        return "its folder would not lie in the folder of adapters, for it begins with '/'"
    if any(step in ("", ".", "..") for step in name.split("/")):
        return "its folder would not be its own, for a part of its path is empty, '.' or '..'"
    return ""


def lora_module(name: str, path: str) -> str:
    """A word of ``--lora-modules``: ``name=path``, or a JSON object where vLLM would misread that.

    vLLM splits words at "=", takes words with a comma for JSON, and a word that begins with a dash is a flag.
    """
    if name.startswith(("-", "{")) or any(mark in name + path for mark in "=,"):
        return json.dumps({"name": name, "path": path}, ensure_ascii=False)
    return f"{name}={path}"


def shell_module(name: str, path: str | None) -> str:
    """A word of ``--lora-modules`` as a shell reads it; without a path, the adapter lies below ``$ADAPTERS``."""
    if path is not None:
        return shlex.quote(lora_module(name, path))
    before, _, after = lora_module(name, f"{_FOLDER}/{name}").partition(_FOLDER)
    return f'{shlex.quote(before)}"$ADAPTERS"{shlex.quote(after)}'


def doubled(word: str) -> str:
    """A word for a compose file or the arguments of a Kubernetes container: both read ``$$`` as a plain ``$``."""
    return word.replace("$", "$$")
