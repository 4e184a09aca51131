"""Custom code that a model's configuration names: copied where the user trusts it, never run."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaworks.catalog.models import Model
from deltaworks.checkpoints.json_files import read_json
from deltaworks.checkpoints.own_files import own_file
from deltaworks.checkpoints.sidecars import copy_files, write_json
from deltaworks.errors import CheckpointError, quoted
from deltaworks.merging.plan import Plan

_KEYS = ("auto_map", "custom_pipelines")
_SIDECARS = ("tokenizer_config.json", "processor_config.json", "*preprocessor_config.json")
_MODULE = re.compile(r"\w+(?:\.\w+)*")
_COMMENT_OR_CONTINUATION = re.compile(r"#[^\n]*|\\\r?\n")
_IMPORT = re.compile(
    r"^[ \t]*+from[ \t]*+(\.++)[ \t]*+((?!import\b)\w[\w.]*+|)[ \t]*+import\b[ \t]*+(?:\(([^()]*+)\)|([^\n(]*+))",
    re.MULTILINE,
)
"""A relative import: its dots, its module, and the names in parentheses or without.

Quantifiers are possessive, so that the time is linear in the size of the file, whatever it holds. None is of a group:
those go wrong in Python 3.11.2.
"""
_MOST_CODE = 8 << 20
"""Bytes of a file that are looked through for imports."""


def settle_code(plan: Plan, models: Sequence[Model], leader: int, *, trust: bool) -> Plan:
    """Decide on the custom code that a plan's output would need.

    Args:
        plan: the plan, with the configuration of its leading model.
        models: its models, in its order.
        leader: the place of the model whose configuration the output takes.
        trust: whether the user wants custom code copied.

    Returns:
        The plan with the files to copy, where code is trusted. Otherwise its configuration names no code, and a note
        says so.

    Raises:
        CheckpointError: a model lacks code that its configuration names.
    """
    named: dict[int, list[str]] = {leader: list(_references(plan.config))}
    for content in _sidecars(models[plan.tokenizer].path).values():
        named.setdefault(plan.tokenizer, []).extend(_references(content))
    if not trust:
        notes = [_note(models[place].name, names) for place, names in named.items() if names]
        return replace(plan, config=without_code(plan.config), notes=(*plan.notes, *notes))
    code: dict[str, int] = {}
    for place, names in named.items():
        for file in _files(models[place], names):
            if (known := code.setdefault(file, place)) != place:
                contents = {(models[p].path / file).read_bytes() for p in (known, place)}
                if len(contents) > 1:
                    raise CheckpointError(
                        f"{models[known].name} and {models[place].name} have different code in {file}; take the"
                        " tokenizer and the configuration from one model"
                    )
    return replace(plan, code=tuple((place, file) for file, place in code.items()))


def code_names(plan: Plan) -> list[str]:
    """Names of the files of custom code in the output of a plan."""
    return [name for _, name in plan.code or ()]


def write_code(plan: Plan, models: Sequence[Model], folder: Path) -> None:
    """Copy a plan's custom code to its output; where it has none, have the files beside the weights name none.

    Raises:
        CheckpointError: a file is gone, or is no file of the model.
        OSError: a copy cannot be written.
    """
    for place, name in plan.code or ():
        if not _is_inside(name):
            raise CheckpointError(f"the plan names {quoted(name)} as custom code, which is no file of a model")
        copy_files(models[place].path, folder, [name])
    if plan.code is None:
        for path, content in _sidecars(folder).items():
            if any(_references(content)):
                write_json(path, without_code(content))


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that names no custom code, at no level."""
    return {
        key: without_code(value) if isinstance(value, dict) else copy.deepcopy(value)
        for key, value in config.items()
        if key not in _KEYS
    }


def _references(config: Mapping[str, Any]) -> Iterator[str]:
    """Classes of custom code that a configuration names: ``modeling_x.Model``, or ``org/name--modeling_x.Model``."""
    for key, value in config.items():
        if key in _KEYS:
            yield from _texts(value)
        elif isinstance(value, dict):
            yield from _references(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        # A pipeline names code in `impl`, and other things elsewhere.
        for key, item in value.items():
            if "impl" not in value or key == "impl":
                yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _sidecars(folder: Path) -> dict[Path, dict[str, Any]]:
    """Contents of the files beside a model's weights that may name code, by their paths."""
    paths = {p for pattern in _SIDECARS for p in folder.glob(pattern)}
    return {path: read_json(path) for path in sorted(paths) if own_file(path) is not None}


def _files(model: Model, references: Sequence[str]) -> list[str]:
    """Files of a model folder that hold the classes named, and those they import."""
    waiting = [_file(model, r.rpartition(".")[0]) for r in references if "--" not in r]
    found: dict[str, None] = {}
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = None
        path = own_file(model.path / name, model.path)
        if path is None:
            raise CheckpointError(
                f"{model.name} names custom code in {name}, and {model.path} has no such file; finish the download, or"
                " merge without --trust-remote-code"
            )
        with path.open("rb") as file:
            text = file.read(_MOST_CODE).decode(errors="replace")
        waiting += [
            imported
            for imported in _imported(text, name)
            if imported not in found and own_file(model.path / imported, model.path) is not None
        ]
    return sorted(found)


def _imported(text: str, name: str) -> Iterator[str]:
    """The files that the relative imports in a Python file may name, as paths in the model folder.

    Args:
        text: what the file holds.
        name: its path in the model folder.
    """
    for dots, module, listed, plain in _IMPORT.findall(_COMMENT_OR_CONTINUATION.sub(" ", text)):
        package = name.split("/")[:-1]
        up = len(dots) - 1
        if up > len(package):
            continue  # above the model folder
        target = [*package[: len(package) - up], *filter(None, module.split("."))]
        if target:
            yield "/".join(target) + ".py"
        # The module may be a package; what is imported from it may be a module in it.
        yield "/".join([*target, "__init__.py"])
        for item in (listed or plain).split(","):
            if words := item.split():
                yield "/".join([*target, f"{words[0]}.py"])


def _file(model: Model, module: str) -> str:
    if not _MODULE.fullmatch(module):
        raise CheckpointError(
            f"the configuration of {model.name} names custom code in {quoted(module)}, which is no module"
        )
    return f"{module.replace('.', '/')}.py"


def _is_inside(name: str) -> bool:
    return name.endswith(".py") and bool(_MODULE.fullmatch(name.removesuffix(".py").replace("/", ".")))


def _note(name: str, references: Sequence[str]) -> str:
    modules = sorted({r.rpartition(".")[0] for r in references})
    shown = ", ".join(quoted(m, 60) for m in modules[:3]) + (", ..." if len(modules) > 3 else "")
    return (
        f"{name} names custom code ({shown}), which is not copied without --trust-remote-code; the output does not"
        " name it"
    )
