"""Rewrite the entries of `config.json` that describe single layers, for slices that put layers in another order."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from deltaworks.errors import RecipeError, quoted
from deltaworks.merging.layer_kinds import cycled, derived, implied_keys
from deltaworks.merging.nested_config import KeyPath, at, text_paths

_MAX_LAYERS = 1 << 16
"""A configuration that counts more layers than that is wrong; lists with an entry for each would fill the memory."""
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "decoder_layers")
_NOT_PER_LAYER = re.compile(
    r"architectures|.*_token_ids?|.*(?<!layer)_ids|.*tokens|.*_range|.*_limit|.*_shape|.*_section|.*_sections|languages"
    r"|out_(features|indices)|stage_names|keys_to_.*|.*_pinpoints|.*(vision|audio|image|video|speech).*"
    r"|id2label|label2id|rope_.*|.*quant.*|talker.*|code2wav.*|auto_map|.*generation.*|task_specific_params"
)
_NUMBERS_OF_LAYERS = re.compile(r".*layers?(_(ids|idx|idxs|indices|indexes|list|enum))?|.*_(idxs?|indices|indexes)")
_PER_LAYER = {"layer_types", "no_rope_layers", "mlp_layer_types", "attention_layers", "nope_layers"}
_FROM_ONE = {"kda_layers", "full_attn_layers"}
"""Lists of numbers of layers that begin at 1."""
_PATTERN_TEXT = re.compile(r"[A-Z*-]+")
"""A text with a character a layer, under a key that ends in ``pattern``; a shorter one is repeated."""
_NUMBERS_TEXT = re.compile(r"\d{1,6}(?:,\s*\d{1,6})*")
"""A text that lists numbers of layers."""
_CYCLES = ("block_types", "_block_types")
"""Lists that are repeated until every layer has an entry."""
_WINDOW = "max_window_layers"
_DENSE = ("without experts", "with experts")
_FIRST = {
    "first_k_dense_replace": _DENSE,
    "num_dense_layers": _DENSE,
    "moe_layer_start_index": _DENSE,
    _WINDOW: ("on this side of max_window_layers", "beyond it"),
}
"""Keys that count the first layers, which are of another kind than those after them; and what both are."""
_LAST_WITH_EXPERTS = "moe_layer_end_index"
_PERIODS = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
    "attn_layer_period": "layers_block_type",
    "expert_layer_period": "",
    "moe_layer_freq": "",
    "moe_layer_frequency": "",
    "moe_layer_interval": "",
    "layer_group_size": "",
    "cla_share_factor": "",
    "dense_attention_every_n_layers": "",
    "decoder_sparse_step": "",
    "cross_attn_every_n_layers": "",
}
"""Numbers by which a kind of layer comes again, and the list with an entry a layer that a loader prefers."""
_ONLY_IF = {"cla_share_factor": "use_cla"}
"""Patterns that hold only where a switch is on."""
_SHARING = "num_kv_shared_layers"
"""The number of last layers that take keys and values from the last layer of their kind before them."""
_SHARING_DEFAULTS = {"gemma3n_text": 15}
_ENDS_FULL = ("gemma4_text",)
"""Families whose loaders make the last layer one of full attention, whatever the configuration says."""
_EMBEDDED = "hidden_size_per_layer_input"
"""The width of what one tensor outside of the layers holds for each layer; not zero where there is such a tensor."""
_EMBEDDED_DEFAULTS = {"gemma3n_text": 256, "gemma4_text": 256}


@dataclass(frozen=True, slots=True)
class LayeredConfig:
    """The configuration of a model that layers are taken from.

    Attributes:
        name: what messages call the model.
        config: its `config.json`.
        layers: how many layers its tensors have.
    """

    name: str
    config: dict[str, Any]
    layers: int


Taken = tuple[tuple[str, int], ...]
"""What a layer of the output is made from: references of models and numbers of their layers; the leading one first."""


def follow_layers(
    config: dict[str, Any], leader: str, models: Mapping[str, LayeredConfig], taken: Sequence[Taken]
) -> list[str]:
    """Have a configuration describe the layers that slices took, in their order.

    Args:
        config: a copy of the leading model's configuration, which is changed.
        leader: the reference of that model.
        models: the configurations of all models, by reference.
        taken: what each layer of the output is made from.

    Returns:
        Notes on layers of different kinds that are merged with each other.

    Raises:
        RecipeError: the configuration cannot describe these layers.
    """
    path, counts = _place(models[leader])
    target = at(config, path)
    sources = {reference: _Source(model, at(model.config, _place(model)[0])) for reference, model in models.items()}
    before = _count(target, counts, models[leader].layers)
    layers = _Layers(sources, taken)
    notes: list[str] = []
    _check_embedded(target, layers, before)
    _boundaries(target, layers)
    _entries(target, layers, (), before, notes)
    _check_end(target, layers)
    _shared(target, layers, notes)
    _periods(target, layers, before)
    for key in counts or ["num_hidden_layers"]:
        target[key] = len(taken)
    if target.get("num_nextn_predict_layers") and all(index < before for (_, index), *_ in taken):
        target["num_nextn_predict_layers"] = 0
    if "attention_types" in target and "attention_layers" not in target:
        target["attention_types"] = [[[kind], 1] for kind in layers.of(_attention_types)]
    return notes


@dataclass(frozen=True, slots=True)
class _Source:
    model: LayeredConfig
    config: dict[str, Any]

    @property
    def count(self) -> int:
        return _count(self.config, _place(self.model)[1], self.model.layers)

    def wrong(self, key: str, expected: str) -> RecipeError:
        """The error about a setting whose value no loader can take."""
        return RecipeError(
            f"config.json of {self.model.name}: {key} is {quoted(self.config.get(key), 60)}; expected {expected}"
        )

    def entries(self, path: KeyPath, key: str) -> list[Any] | None:
        """The entry of each layer under a key, as the configuration has it or as the family derives it."""
        value = at(self.config, path).get(key)
        is_cycle = isinstance(value, list) and key in _CYCLES and len(value) > 0
        if isinstance(value, str | list) and (is_cycle or _is_pattern(key, value)):
            return cycled(value, self.count)
        if isinstance(value, list) and len(value) == self.count:
            return value
        if isinstance(value, dict) and value.keys() == {str(i) for i in range(self.count)}:
            return [value[str(i)] for i in range(self.count)]
        return derived(self.config, key, self.count) if not path else None


@dataclass(frozen=True, slots=True)
class _Layers:
    sources: Mapping[str, _Source]
    taken: Sequence[Taken]

    def of(self, entries: Callable[[_Source], Sequence[Any]]) -> list[Any]:
        """The entry of each layer of the output: that of the layer that leads there."""
        known = {reference: entries(self.sources[reference]) for reference in {t[0][0] for t in self.taken}}
        for (first, index), *_ in self.taken:
            if index >= len(known[first]):
                raise RecipeError(
                    f"layer_range: config.json of {self.sources[first].model.name} describes {len(known[first])} layers"
                    f" only, so layer {index} cannot be described"
                )
        return [known[first][index] for (first, index), *_ in self.taken]

    def check_alike(self, key: str, entries: Callable[[_Source], Sequence[Any] | None], notes: list[str]) -> None:
        """Note where layers are merged with each other whose entries differ."""
        known = {r: entries(s) for r, s in self.sources.items()}
        for number, ((first, index), *others) in enumerate(self.taken):
            own = known[first]
            for other, place in others:
                its = known[other]
                if own is None or its is None or index >= len(own) or place >= len(its):
                    continue
                if own[index] != its[place]:
                    names = [self.sources[r].model.name for r in (first, other)]
                    kinds = [quoted(kind, 60) for kind in (own[index], its[place])]
                    notes.append(
                        f"layer {number} merges layers of different kinds: {key} is {kinds[0]} for layer {index} of"
                        f" {names[0]} and {kinds[1]} for layer {place} of {names[1]}; the output takes {names[0]}'s"
                    )
                    return


def _place(model: LayeredConfig) -> tuple[KeyPath, list[str]]:
    """Where a configuration keeps the number of layers, and under which keys."""
    for known in (lambda n: n == model.layers, lambda _: True):
        for path in reversed(text_paths(model.config)):
            part = at(model.config, path)
            keys = [k for k in _COUNTS if type(part.get(k)) is int and 0 <= part[k] <= _MAX_LAYERS and known(part[k])]
            if keys:
                return path, keys
    return text_paths(model.config)[-1], []


def _count(config: Mapping[str, Any], keys: Sequence[str], otherwise: int) -> int:
    return int(config[keys[0]]) if keys else otherwise


def _entries(target: dict[str, Any], layers: _Layers, path: KeyPath, before: int, notes: list[str]) -> None:
    """Rewrite everything in a configuration, and in those nested in it, that has an entry a layer."""
    leaders = {t[0][0] for t in layers.taken}
    found = {k: v for r in leaders for k, v in at(layers.sources[r].config, path).items()} | target
    implied = [] if path else implied_keys(target)
    for key in [*found, *(k for k in implied if k not in found)]:
        if _NOT_PER_LAYER.fullmatch(key):
            continue
        value = found.get(key)
        if key == "per_layer_config":
            _renumber_keys(target, key, layers, path)
            continue
        if isinstance(value, dict) and value.keys() != {str(i) for i in range(before)}:
            if isinstance(target.get(key), dict) and key not in ("text_config", "thinker_config"):
                _entries(target[key], layers, (*path, key), before, notes)
            continue
        if _are_numbers(key, value, before):
            _renumber(target, key, layers, path)
            continue
        own = {r: layers.sources[r].entries(path, key) for r in leaders}
        if all(v is None for v in own.values()):
            continue
        if lost := next((layers.sources[r] for r, v in own.items() if v is None), None):
            if at(lost.config, path).get(key) == value:
                continue  # the list's length equals the layer count by coincidence
            raise RecipeError(
                f"config.json of {lost.model.name} has no {key} with an entry a layer, as that of another model has;"
                " save both with the same version of transformers first"
            )
        entries = layers.of(lambda s, k=key: s.entries(path, k) or [])  # type: ignore[misc]
        layers.check_alike(key, lambda s, k=key: s.entries(path, k), notes)  # type: ignore[misc]
        if key not in found and entries == derived(target, key, len(entries)):
            continue  # the loader derives the same
        if (
            _is_pattern(key, target.get(key))
            and len(target[key]) < before
            and cycled(target[key], len(entries)) == entries
        ):
            continue  # the pattern still tells every layer
        is_text = isinstance(value, str) and all(isinstance(entry, str) for entry in entries)
        target[key] = (
            "".join(entries)
            if is_text
            else dict(zip(map(str, range(len(entries))), entries, strict=True))
            if isinstance(value, dict)
            else entries
        )


def _is_pattern(key: str, value: Any) -> bool:
    return key.endswith("pattern") and isinstance(value, str) and bool(_PATTERN_TEXT.fullmatch(value))


def _numbers(value: Any) -> list[int] | None:
    """The numbers of layers that a value lists, as a list or as a text; None where it is neither."""
    if isinstance(value, str) and _NUMBERS_TEXT.fullmatch(value):
        return [int(n) for n in value.split(",")]
    return value if isinstance(value, list) and all(type(n) is int for n in value) else None


def _are_numbers(key: str, value: Any, count: int) -> bool:
    """Whether a value lists numbers of layers rather than an entry for each."""
    numbers = _numbers(value)
    if key in _PER_LAYER or not numbers or not _NUMBERS_OF_LAYERS.fullmatch(key):
        return False
    first = 1 if key in _FROM_ONE else 0
    in_order = all(a < b for a, b in pairwise(numbers))
    return in_order and first <= numbers[0] and numbers[-1] < count + first


def _renumber(target: dict[str, Any], key: str, layers: _Layers, path: KeyPath) -> None:
    first = 1 if key in _FROM_ONE else 0

    def is_listed(source: _Source) -> list[bool]:
        listed = set(_numbers(at(source.config, path).get(key)) or ())
        return [i + first in listed for i in range(source.count)]

    numbers = [i + first for i, listed in enumerate(layers.of(is_listed)) if listed]
    target[key] = ",".join(map(str, numbers)) if isinstance(target.get(key), str) else numbers


def _renumber_keys(target: dict[str, Any], key: str, layers: _Layers, path: KeyPath) -> None:
    """Have settings of some layers, by the number of the layer, follow them."""

    def settings(source: _Source) -> list[Any]:
        value = at(source.config, path).get(key)
        return [value.get(str(i)) if isinstance(value, dict) else None for i in range(source.count)]

    target[key] = {str(i): own for i, own in enumerate(layers.of(settings)) if own is not None}


def _boundaries(target: dict[str, Any], layers: _Layers) -> None:
    """Count anew how many layers come before those of another kind."""
    for key, (first, then) in _FIRST.items():
        if type(target.get(key)) is not int or (key == _WINDOW and not _has_window(target)):
            continue
        flags = layers.of(lambda s, k=key: _is_first(s, k))  # type: ignore[misc]
        if flags == sorted(flags, reverse=True):
            target[key] = sum(flags)
        elif key != _WINDOW or not (isinstance(target.get("layer_types"), list) or implied_keys(target)):
            raise RecipeError(
                f"{key}: the slices put a layer {first} after one {then}, which config.json cannot describe; take the"
                " first layers first"
            )
    end = target.get(_LAST_WITH_EXPERTS)
    if type(end) is int and end >= 0:
        flags = layers.of(lambda s: _is_first(s, _LAST_WITH_EXPERTS, 1))
        if flags != sorted(flags, reverse=True) or not any(flags):
            raise RecipeError(
                f"{_LAST_WITH_EXPERTS}: the slices put a layer without experts before one with experts, which"
                " config.json cannot describe; take the last layers last"
            )
        target[_LAST_WITH_EXPERTS] = sum(flags) - 1


def _has_window(config: Mapping[str, Any]) -> bool:
    return bool(config.get("use_sliding_window")) and config.get("sliding_window", 4096) is not None


def _is_first(source: _Source, key: str, more: int = 0) -> list[bool]:
    """Whether each layer of a model is among the first ones, which a key counts; `more` is added to the count."""
    first = source.config.get(key)
    if first is not None and type(first) is not int:
        raise source.wrong(key, "a number of layers")
    if more and (first is None or first < 0):
        return [True] * source.count
    return [i < (first or 0) + more for i in range(source.count)]


def _check_embedded(target: dict[str, Any], layers: _Layers, before: int) -> None:
    """Make sure that a tensor outside of the layers that holds a part for each still fits them."""
    width = target.get(_EMBEDDED, _EMBEDDED_DEFAULTS.get(str(target.get("model_type"))))
    if width and [index for (_, index), *_ in layers.taken] != list(range(before)):
        raise RecipeError(
            f"config.json has {_EMBEDDED}: {quoted(width, 60)}, so a tensor outside of the layers holds a part for each"
            " layer, in their order; no layer can be left out, repeated or moved: take all layers in order"
        )


def _check_end(target: dict[str, Any], layers: _Layers) -> None:
    """Make sure that a loader that changes the kind of the last layer has nothing to change."""
    last = layers.of(_kinds)[-1]
    if target.get("model_type") in _ENDS_FULL and last not in (None, "full_attention"):
        raise RecipeError(
            f"the last layer that the slices take is of kind {quoted(last, 60)}, and loaders of this family take it as"
            " full_attention; end with a layer of that kind"
        )


def _shared(target: dict[str, Any], layers: _Layers, notes: list[str]) -> None:
    """Count anew the last layers, which take keys and values from the last layer of their kind before them."""
    own = [_sharing(layers.sources[r]) for r in {t[0][0] for t in layers.taken}]
    if not any(own):
        return
    shares = layers.of(lambda s: [i >= s.count - _sharing(s) for i in range(s.count)])
    if shares != sorted(shares):
        raise RecipeError(
            f"{_SHARING}: the slices put a layer with keys and values of its own after one that takes those of an"
            " earlier layer, which config.json cannot describe; take the layers that share them last"
        )
    if _SHARING in target or sum(shares) != _SHARING_DEFAULTS.get(str(target.get("model_type")), 0):
        target[_SHARING] = sum(shares)
    kinds = layers.of(_kinds)
    givers = {kind: i for i, kind in enumerate(kinds) if not shares[i]}
    for number, ((reference, index), *_) in enumerate(layers.taken):
        if not shares[number]:
            continue
        source, giver = layers.sources[reference], givers.get(kinds[number])
        theirs = _giver(source, index)
        if giver is None and theirs is not None:
            raise RecipeError(
                f"{_SHARING}: layer {index} of {source.model.name} takes keys and values from layer {theirs}, and the"
                " slices take no earlier layer of that kind; take one before it"
            )
        if giver is not None and layers.taken[giver][0] != (reference, theirs):
            other, place = layers.taken[giver][0]
            notes.append(
                f"layer {number} (layer {index} of {source.model.name}) now takes keys and values from layer {place} of"
                f" {layers.sources[other].model.name}, and had them from layer {theirs} of its own model"
            )
            return


def _sharing(source: _Source) -> int:
    """How many of the last layers of a model take keys and values from an earlier one."""
    number = source.config.get(_SHARING, _SHARING_DEFAULTS.get(str(source.config.get("model_type")), 0))
    if number is None:
        return 0
    if type(number) is not int or number < 0:
        raise source.wrong(_SHARING, "a number of layers")
    return min(number, source.count)


def _kinds(source: _Source) -> list[Any]:
    return source.entries((), "layer_types") or [None] * source.count


def _giver(source: _Source, index: int) -> int | None:
    """The layer of a model that a layer takes keys and values from; None where there is none."""
    kinds = _kinds(source)
    return max((i for i in range(source.count - _sharing(source)) if kinds[i] == kinds[index]), default=None)


def _attention_types(source: _Source) -> list[Any]:
    """The kind of each layer of a model, as GPT-Neo lists them: ``[[["global", "local"], 12]]``."""
    kinds: list[Any] = []
    value = source.config.get("attention_types")
    for entry in value if isinstance(value, list) else [value]:
        match entry:
            case [list(cycle), int(times)] if cycle and 0 <= times <= _MAX_LAYERS:
                kinds += cycle * times
            case _:
                raise source.wrong("attention_types", "a list of pairs of kinds of layers and how often they come")
    return kinds


def _periods(target: dict[str, Any], layers: _Layers, before: int) -> None:
    """Make sure that patterns over layers still describe them."""
    for key, listed in _PERIODS.items():
        period = target.get(key)
        if type(period) is not int or period < 2 or isinstance(target.get(listed), list):
            continue
        if key in _ONLY_IF and not target.get(_ONLY_IF[key]):
            continue
        if all((i - index) % period == 0 for i, ((_, index), *_) in enumerate(layers.taken)):
            continue
        if listed and derived(target, listed, before) is not None:
            continue  # the list is left out because the loader derives the same
        if key == "decoder_sparse_step":
            dense = layers.of(_without_experts)
            target |= {key: 1, "mlp_only_layers": [i for i, d in enumerate(dense) if d]}
            continue
        raise RecipeError(
            f"config.json has {key}: {period}, a pattern over layers that the slices break and that no list in it"
            f" replaces; take layers in whole groups of {period}"
        )


def _without_experts(source: _Source) -> list[bool]:
    step, plain = source.config.get("decoder_sparse_step", 1), source.config.get("mlp_only_layers") or []
    if type(step) is not int or step < 1:
        raise source.wrong("decoder_sparse_step", "a whole number from 1 on")
    if not isinstance(plain, list):
        raise source.wrong("mlp_only_layers", "a list of numbers of layers")
    return [i in plain or (i + 1) % step != 0 for i in range(source.count)]
