"""Recipes: mergekit's YAML, read strictly.

The dialect is mergekit 0.1.5's. Where mergekit ignores a key it does not know, reading here fails and names the key.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaworks.checkpoints.dtypes import DType, float_dtype
from deltaworks.documents import YAML_BYTES, parse_yaml, read_text
from deltaworks.errors import RecipeError, UserError, did_you_mean, quoted
from deltaworks.merging.budget import parse_budget
from deltaworks.merging.methods import METHODS, Method, Parameter, Scope
from deltaworks.merging.parameters import Setting, Settings, parse_setting

_TOP = (
    "models",
    "slices",
    "merge_method",
    "base_model",
    "dtype",
    "out_dtype",
    "parameters",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
EXTENSION = "x-deltaworks"
"""The key for what mergekit has no word for; mergekit skips it."""

_EVERY_PARAMETER = {p.name for m in METHODS.values() for p in m.parameters}


@dataclass(frozen=True, slots=True)
class Input:
    """One model of a recipe: its reference, the layers taken (all where None), its own parameters."""

    model: str
    layers: tuple[int, int] | None
    parameters: Settings


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of output layers: the inputs merged into it, the base model, and the slice's parameters."""

    inputs: tuple[Input, ...]
    base_model: str | None
    parameters: Settings


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge recipe.

    Attributes:
        method: how to merge.
        slices: runs of output layers; one run over all layers where the recipe lists `models`.
        base_model: the model that deltas are taken against.
        dtype: element type asked for; arithmetic is float32 whatever it says.
        out_dtype: element type written; `dtype` where None, and the inputs' own where both are None.
        parameters: settings for all models.
        tokenizer_source: the model whose tokenizer the result gets; the base model's, or the first's, where None.
        chat_template: a Jinja template, ``auto``, or None to keep the tokenizer's.
        text: the recipe as it was written.
        warnings: what was read but has no effect.
        budget: most that may be read from experts, as written under `x-deltaworks`.
        stand_in: the model that blocks which are not read are taken from, where `base_model` does not say.
        fair: whether a budget weighs all experts alike, however small their deltas.
        balanced: whether a budget weighs all tensors alike.
    """

    method: Method
    slices: tuple[Slice, ...]
    base_model: str | None
    dtype: DType | None
    out_dtype: DType | None
    parameters: Settings
    tokenizer_source: str | None
    chat_template: str | None
    text: str
    warnings: tuple[str, ...]
    budget: str | None = None
    stand_in: str | None = None
    fair: bool = False
    balanced: bool = False

    @property
    def is_sliced(self) -> bool:
        """Whether layers are chosen one by one."""
        return self.slices[0].inputs[0].layers is not None

    def models(self) -> list[str]:
        """Every model referred to, the base first, each once."""
        references = [self.base_model] if self.base_model else []
        for part in self.slices:
            references += [part.base_model] if part.base_model else []
            references += [i.model for i in part.inputs]
        return list(dict.fromkeys(references))


def load_recipe(path: Path) -> Recipe:
    """Read the recipe in the file at `path`.

    Raises:
        RecipeError: it cannot be read; the message names the key and, where there is one, the right spelling.
    """
    return _parse(read_text(path, "a recipe", RecipeError, YAML_BYTES), str(path))


def parse_recipe(text: str) -> Recipe:
    """Read a recipe from its YAML text.

    Raises:
        RecipeError: as `load_recipe`.
    """
    return _parse(text, "the recipe")


def _parse(text: str, where: str) -> Recipe:
    # Infinity and NaN are refused where they stand, by the name of their key.
    content = parse_yaml(text, where, "a recipe", RecipeError, finite=False)
    if not isinstance(content, dict):
        raise RecipeError("a recipe is a YAML mapping with merge_method and models")
    return _Reader(content, text).recipe()


class _Reader:
    def __init__(self, content: dict[str, Any], text: str) -> None:
        self._content, self._text = content, text
        self._warnings: list[str] = []
        # Keys of other tools are theirs: mergekit skips what starts like this, and so do we.
        self._check_keys(
            {k: v for k, v in content.items() if not (isinstance(k, str) and k.startswith("x-"))},
            (*_TOP, EXTENSION),
            "",
        )
        name = content.get("merge_method")
        if not isinstance(name, str) or name not in METHODS:
            problem = "missing" if name is None else f"{quoted(name)} is not known"
            raise RecipeError(f"merge_method: {problem}{did_you_mean(name, METHODS) or _known(METHODS)}")
        self._method = METHODS[name]

    def recipe(self) -> Recipe:
        content = self._content
        if ("models" in content) == ("slices" in content):
            raise RecipeError("a recipe has either models or slices, exactly one of them")
        base = None if content.get("base_model") is None else self._reference(content["base_model"], "base_model")
        parameters = self._settings(content.get("parameters"), "parameters", every=True)
        if "models" in content:
            inputs = self._inputs(content["models"], "models", sliced=False)
            if base is not None and base not in [i.model for i in inputs]:
                inputs += (Input(base, None, {}),)
            slices: tuple[Slice, ...] = (Slice(inputs, None, {}),)
        else:
            slices = tuple(
                self._slice(s, f"slices[{i}]") for i, s in enumerate(self._list(content["slices"], "slices"))
            )
        for i, part in enumerate(slices):
            self._check_inputs(part, base, "models" if "models" in content else f"slices[{i}]")
        dtypes = [self._dtype(key) for key in ("dtype", "out_dtype")]
        return Recipe(
            self._method,
            slices,
            base,
            dtypes[0],
            dtypes[1],
            parameters,
            self._tokenizer(),
            self._text_or_none("chat_template"),
            self._text,
            tuple(self._warnings),
            **self._extension(),
        )

    def _extension(self) -> dict[str, Any]:
        raw = self._content.get(EXTENSION)
        if raw is None:
            return {}
        self._check_mapping(raw, EXTENSION)
        self._check_keys(raw, ("budget", "base", "fair", "balanced"), f"{EXTENSION}.")
        budget, base = raw.get("budget"), raw.get("base")
        switches = {name: raw.get(name, False) for name in ("fair", "balanced")}
        if isinstance(budget, bool) or not isinstance(budget, int | float | str | None):
            raise RecipeError(
                f"{EXTENSION}.budget: write a share like 25%, or an amount like 2GiB, not {quoted(budget)}"
            )
        if budget is not None:
            budget = budget if isinstance(budget, str) else quoted(budget)
            try:
                parse_budget(budget, f"{EXTENSION}.budget")
            except UserError as error:
                raise RecipeError(str(error)) from error
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise RecipeError(f"{EXTENSION}.{name}: expected true or false, not {quoted(value)}")
        return {
            "budget": budget,
            "stand_in": None if base is None else self._reference(base, f"{EXTENSION}.base"),
            **switches,
        }

    def _slice(self, raw: Any, where: str) -> Slice:
        self._check_mapping(raw, where)
        self._check_keys(raw, ("sources", "base_model", "parameters"), f"{where}.")
        inputs = self._inputs(raw.get("sources"), f"{where}.sources", sliced=True)
        lengths = {i.layers[1] - i.layers[0] for i in inputs if i.layers}
        if len(lengths) > 1:
            raise RecipeError(
                f"{where}: its sources have different numbers of layers ({sorted(lengths)}); they must be equal"
            )
        base = raw.get("base_model")
        return Slice(
            inputs,
            None if base is None else self._reference(base, f"{where}.base_model"),
            self._settings(raw.get("parameters"), f"{where}.parameters", every=True),
        )

    def _inputs(self, raw: Any, where: str, *, sliced: bool) -> tuple[Input, ...]:
        return tuple(self._input(x, f"{where}[{i}]", sliced=sliced) for i, x in enumerate(self._list(raw, where)))

    def _input(self, raw: Any, where: str, *, sliced: bool) -> Input:
        self._check_mapping(raw, where)
        self._check_keys(raw, ("model", "parameters", *(["layer_range"] if sliced else [])), f"{where}.")
        if "model" not in raw:
            raise RecipeError(f"{where}: lacks the key 'model'")
        layers = None
        if sliced:
            layers = raw.get("layer_range")
            if (
                not isinstance(layers, list)
                or len(layers) != 2
                or any(type(n) is not int for n in layers)
                or not 0 <= layers[0] < layers[1]
            ):
                raise RecipeError(
                    f"{where}.layer_range: expected [first, end] with 0 <= first < end, not {quoted(layers)}"
                )
            layers = (layers[0], layers[1])
        return Input(
            self._reference(raw["model"], f"{where}.model"),
            layers,
            self._settings(raw.get("parameters"), f"{where}.parameters", every=False),
        )

    def _check_inputs(self, part: Slice, base: str | None, where: str) -> None:
        method, names = self._method, [i.model for i in part.inputs]
        base = part.base_model or base
        if twice := [n for n in names if names.count(n) > 1]:
            raise RecipeError(f"{where}: {quoted(twice[0])} stands twice")
        if method.needs_base and base is None:
            raise RecipeError(
                f"base_model: missing; {method.name} merges deltas, so it must know what they are taken against"
            )
        if method.needs_base and base not in names:
            raise RecipeError(f"{where}: the base model {quoted(base)} must be one of the sources")
        if len(names) < method.min_inputs or (method.max_inputs and len(names) > method.max_inputs):
            wanted = method.max_inputs or f"at least {method.min_inputs}"
            raise RecipeError(
                f"{where}: {method.name} takes {wanted} model{'' if wanted == 1 else 's'}, the base model included,"
                f" and there are {len(names)}: {', '.join(names)}"
            )

    def _settings(self, raw: Any, where: str, *, every: bool) -> dict[str, Setting]:
        if raw is None:
            return {}
        self._check_mapping(raw, where)
        known = {p.name: p for p in self._method.parameters if every or p.scope is not Scope.SHARED}
        shared = {p.name for p in self._method.parameters}
        settings = {}
        for name, value in raw.items():
            if value is None:
                continue
            if name in known:
                settings[name] = parse_setting(value, known[name].type, f"{where}.{name}")
                self._check_range(known[name], settings[name], f"{where}.{name}")
            elif name in shared:
                self._warnings.append(f"{where}.{name}: belongs to all models; move it to the top-level parameters")
            elif name in _EVERY_PARAMETER:
                self._warnings.append(f"{where}.{name}: not a parameter of {self._method.name}; it has no effect")
            else:
                raise RecipeError(
                    f"{where}: unknown parameter {quoted(name)}{did_you_mean(name, known) or _known(known)}"
                )
        return settings

    @staticmethod
    def _check_range(parameter: Parameter, setting: Setting, where: str) -> None:
        values = [v for _, choice in setting.choices for v in choice]
        what = {"density": "a density", "select_topk": "select_topk"}.get(parameter.name)
        if what is not None and any(not 0 <= v <= 1 for v in values):
            raise RecipeError(f"{where}: {what} is a share from 0 to 1")

    def _reference(self, raw: Any, where: str) -> str:
        if isinstance(raw, dict) and isinstance(raw.get("model"), dict) and "path" in raw["model"]:
            self._check_keys(raw, ("model", "lora", "override_architecture"), f"{where}.")
            for key, what in (("lora", "applies an adapter to a model; fold the adapter in first"),
                              ("override_architecture", "reads a model as another architecture")):  # fmt: skip
                if raw.get(key) is not None:
                    raise RecipeError(f"{where}.{key}: {quoted(raw[key])} {what}, that is not done here")
            raw = raw["model"]
        if isinstance(raw, dict) and raw.keys() <= {"path", "revision"} and isinstance(raw.get("path"), str):
            raw = raw["path"] + (f"@{raw['revision']}" if raw.get("revision") else "")
        if not isinstance(raw, str) or not raw.strip():
            raise RecipeError(f"{where}: expected a path, a hub id or a registered name, not {quoted(raw)}")
        # Unlike `Path.is_dir`, this is false for a name that is too long.
        if "+" in raw and not os.path.isdir(raw):  # noqa: PTH112
            raise RecipeError(
                f"{where}: {quoted(raw)} applies an adapter to a model; fold the adapter in first, that is not done"
                " here"
            )
        return raw

    def _dtype(self, key: str) -> DType | None:
        name = self._text_or_none(key)
        try:
            return None if name is None else float_dtype(name)
        except UserError as error:
            raise RecipeError(f"{key}: {error}") from error

    def _tokenizer(self) -> str | None:
        source = self._content.get("tokenizer_source")
        raw = self._content.get("tokenizer")
        if raw is not None:
            if source is not None:
                raise RecipeError("give either tokenizer_source or tokenizer, not both")
            self._check_mapping(raw, "tokenizer")
            self._check_keys(raw, ("source", "tokens", "pad_to_multiple_of"), "tokenizer.")
            for key in ("tokens", "pad_to_multiple_of"):
                if raw.get(key):
                    raise RecipeError(
                        f"tokenizer.{key}: changing the vocabulary in a merge is not done here; remove it"
                    )
            source = raw.get("source", "union")
        return None if source is None else self._reference(source, "tokenizer_source")

    def _text_or_none(self, key: str) -> str | None:
        value = self._content.get(key)
        if value is not None and not isinstance(value, str):
            raise RecipeError(f"{key}: expected text, not {quoted(value)}")
        return value

    @staticmethod
    def _list(raw: Any, where: str) -> list[Any]:
        if not isinstance(raw, list) or not raw:
            raise RecipeError(f"{where}: expected a list with at least one entry, not {quoted(raw)}")
        return raw

    @staticmethod
    def _check_mapping(raw: Any, where: str) -> None:
        if not isinstance(raw, dict):
            raise RecipeError(f"{where}: expected keys and values, not {quoted(raw)}")

    @staticmethod
    def _check_keys(raw: dict[str, Any], known: tuple[str, ...], where: str) -> None:
        for key in raw:
            if key not in known:
                if key in ("modules", "residual_weight"):
                    raise RecipeError(f"{where}{key}: not supported; use models or slices")
                name = quoted(where + key if isinstance(key, str) else key)
                raise RecipeError(f"unknown key {name}{did_you_mean(key, known) or _known(known)}")


def _known(known: Any) -> str:
    return f"; known are {', '.join(known)}"
