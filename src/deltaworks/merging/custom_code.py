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
_MAX_CODE = 8 << 20
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
    notes = _malformed(models[leader].name, "config.json", plan.config)
    for path, content in _sidecars(models[plan.tokenizer].path).items():
        named.setdefault(plan.tokenizer, []).extend(_references(content))
        notes += _malformed(models[plan.tokenizer].name, path.name, content)
    if not trust:
        notes += [_note(models[place].name, names) for place, names in named.items() if names]
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
    config, notes = without_code(plan.config, only_malformed=True), [*plan.notes, *notes]
    return replace(plan, config=config, notes=tuple(notes), code=tuple((place, file) for file, place in code.items()))


def code_names(plan: Plan) -> list[str]:
    """Names of the files of custom code in the output of a plan."""
    return [name for _, name in plan.code or ()]


def write_code(plan: Plan, models: Sequence[Model], folder: Path) -> None:
    """Copy a plan's custom code to its output, and have the files beside the weights name no other.

    Raises:
        CheckpointError: a file is gone, or is not a file of the model.
        OSError: a copy cannot be written.
    """
    for place, name in plan.code or ():
        if not _is_inside(name):
            raise CheckpointError(f"the plan names {quoted(name)} as custom code, which is not a file of a model")
        copy_files(models[place].path, folder, [name])
    for path, content in _sidecars(folder).items():
        kept = without_code(content, only_malformed=plan.code is not None)
        if kept != content:
            write_json(path, kept)


def without_code(config: Mapping[str, Any], *, only_malformed: bool = False) -> dict[str, Any]:
    """A configuration that names no custom code, at no level; or none in a way that no loader understands."""
    return {
        key: without_code(value, only_malformed=only_malformed) if isinstance(value, dict) else copy.deepcopy(value)
        for key, value in config.items()
        if key not in _KEYS or (only_malformed and _classes(key, value) is not None)
    }


def _references(config: Mapping[str, Any]) -> Iterator[str]:
    """Classes of custom code that a configuration names: ``modeling_x.Model``, or ``org/name--modeling_x.Model``."""
    for key, value in config.items():
        if key in _KEYS:
            yield from _classes(key, value) or ()
        elif isinstance(value, dict):
            yield from _references(value)


def _classes(key: str, value: Any) -> list[str] | None:
    """The classes that `auto_map` or `custom_pipelines` names; None where it is not what a loader understands.

    `auto_map` gives each kind of model one class, or a slow and a fast tokenizer of which one may be null; files of
    early tokenizers hold that pair alone. A pipeline names its class in ``impl``, and other things elsewhere.
    """
    if value is None:
        return []
    entries: list[Any]
    if not isinstance(value, dict):
        entries = [value] if isinstance(value, list) and key == "auto_map" else [0]
    elif key == "auto_map":
        entries = list(value.values())
    else:
        entries = [e.get("impl", 0) if isinstance(e, dict) else 0 for e in value.values()]
    classes: list[Any] = [e for entry in entries for e in (entry if isinstance(entry, list) else [entry])]
    return [e for e in classes if e is not None] if all(isinstance(e, str | None) for e in classes) else None


def _sidecars(folder: Path) -> dict[Path, dict[str, Any]]:
    """Contents of the files beside a model's weights that may name code, by their paths."""
    paths = {p for pattern in _SIDECARS for p in folder.glob(pattern)}
    return {path: read_json(path) for path in sorted(paths) if own_file(path) is not None}


def _files(model: Model, references: Sequence[str]) -> list[str]:
    """Files of a model folder that hold the classes named, and those they import."""
    waiting = [_file(model, reference) for reference in references if "--" not in reference]
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
            text = file.read(_MAX_CODE).decode(errors="replace")
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


def _file(model: Model, reference: str) -> str:
    module, _, name = reference.rpartition(".")
    if not _MODULE.fullmatch(module) or not name:
        raise CheckpointError(
            f"the configuration of {model.name} names custom code as {quoted(reference)}; expected a module in the"
            " model folder and a class, such as 'modeling_x.Model'"
        )
    return f"{module.replace('.', '/')}.py"


def _is_inside(name: str) -> bool:
    return name.endswith(".py") and bool(_MODULE.fullmatch(name.removesuffix(".py").replace("/", ".")))


def _malformed(name: str, file: str, config: Mapping[str, Any]) -> list[str]:
    """Notes on what names custom code in a way that no loader understands."""
    notes = []
    for key, value in config.items():
        if key in _KEYS and _classes(key, value) is None:
            notes.append(
                f"{key} in {file} of {name} is {quoted(value, 60)}, which names no classes; the output leaves it out"
            )
        elif key not in _KEYS and isinstance(value, dict):
            notes += _malformed(name, file, value)
    return notes


def _note(name: str, references: Sequence[str]) -> str:
    modules = sorted({r.rpartition(".")[0] or r for r in references})
    shown = ", ".join(quoted(m, 60) for m in modules[:3]) + (", ..." if len(modules) > 3 else "")
    return (
        f"{name} names custom code ({shown}), which is not copied without --trust-remote-code; the output does not"
        " name it"
    )
