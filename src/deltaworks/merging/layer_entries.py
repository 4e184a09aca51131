"""Rewrite the entries of `config.json` that describe single layers, for slices that put layers in another order."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from deltaworks.errors import RecipeError, quoted
from deltaworks.merging.nested_config import KeyPath, at, text_paths

_MOST_LAYERS = 1 << 16
"""A configuration that counts more layers than that is wrong; lists with an entry for each would fill the memory."""
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "decoder_layers")
_NOT_PER_LAYER = re.compile(
    r"architectures|.*_token_ids?|.*_ids|.*tokens|.*_range|.*_limit|.*_shape|.*_section|.*_sections|languages"
    r"|out_(features|indices)|stage_names|keys_to_.*|.*_pinpoints|.*(vision|audio|image|video|speech).*"
    r"|id2label|label2id|rope_.*|.*quant.*|talker.*|code2wav.*|auto_map|.*generation.*|task_specific_params"
)
_NUMBERS_OF_LAYERS = re.compile(r".*layers?(_(ids|idx|idxs|indices|indexes|list))?|.*_(idxs?|indices|indexes)")
_PER_LAYER = {"layer_types", "no_rope_layers", "mlp_layer_types", "attention_layers", "nope_layers"}
_FROM_ONE = {"kda_layers", "full_attn_layers"}
"""Lists of numbers of layers that begin at 1."""
_PATTERN_TEXTS = ("hybrid_override_pattern",)
"""Keys of a text with a character a layer."""
_CYCLES = ("block_types", "_block_types")
"""Lists that are repeated until every layer has an entry."""
_FIRST_DENSE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""The number of first layers that have no experts."""
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
    "decoder_sparse_step": "",
    "cross_attn_every_n_layers": "",
}
"""Numbers by which a kind of layer comes again, and the list with an entry a layer that a loader prefers."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a family tells kinds of layers where its configuration has no list of them."""

    key: str
    period: str | None
    default: int
    inside: str | int
    last: str | int


_SLIDING = ("sliding_attention", "full_attention")
_RULES = {
    "gemma2": _Rule("layer_types", None, 2, *_SLIDING),
    "gpt_oss": _Rule("layer_types", None, 2, *_SLIDING),
    "gemma3_text": _Rule("layer_types", "sliding_window_pattern", 6, *_SLIDING),
    "cohere2": _Rule("layer_types", "sliding_window_pattern", 4, *_SLIDING),
    "exaone4": _Rule("layer_types", "sliding_window_pattern", 4, *_SLIDING),
    "olmo3": _Rule("layer_types", None, 4, *_SLIDING),
    "qwen3_next": _Rule("layer_types", "full_attention_interval", 4, "linear_attention", "full_attention"),
    "smollm3": _Rule("no_rope_layers", "no_rope_layer_interval", 4, 1, 0),
    "llama4_text": _Rule("no_rope_layers", "no_rope_layer_interval", 4, 1, 0),
}


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
    _entries(target, layers, (), before, notes)
    _first_dense(target, layers)
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
        if isinstance(value, str | list) and key in (*_CYCLES, *_PATTERN_TEXTS) and value:
            return [value[i % len(value)] for i in range(self.count)]
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
            keys = [k for k in _COUNTS if type(part.get(k)) is int and 0 <= part[k] <= _MOST_LAYERS and known(part[k])]
            if keys:
                return path, keys
    return text_paths(model.config)[-1], []


def _count(config: Mapping[str, Any], keys: Sequence[str], otherwise: int) -> int:
    return int(config[keys[0]]) if keys else otherwise


def derived(config: Mapping[str, Any], key: str, count: int) -> list[Any] | None:
    """What a family puts in a list with an entry a layer where its configuration has none; None where nobody knows."""
    kind = config.get("model_type")
    if key == "layer_types" and kind in ("qwen2", "qwen3"):
        slides = config.get("use_sliding_window") and config.get("sliding_window") is not None
        first = config.get("max_window_layers", 28)
        if slides and type(first) is not int:
            return None
        return [_SLIDING[0] if slides and i >= first else _SLIDING[1] for i in range(count)]
    rule = _RULES.get(str(kind))
    if rule is None or rule.key != key:
        return None
    period = config.get(rule.period, config.get(f"_{rule.period}", rule.default)) if rule.period else rule.default
    if type(period) is not int or period < 1:
        return None
    return [rule.inside if (i + 1) % period else rule.last for i in range(count)]


def _entries(target: dict[str, Any], layers: _Layers, path: KeyPath, before: int, notes: list[str]) -> None:
    """Rewrite everything in a configuration, and in those nested in it, that has an entry a layer."""
    leaders = {t[0][0] for t in layers.taken}
    found = {k: v for r in leaders for k, v in at(layers.sources[r].config, path).items()} | target
    kind = target.get("model_type")
    implied = (
        [] if path else [r.key for m, r in _RULES.items() if m == kind] + ["layer_types"] * (kind in ("qwen2", "qwen3"))
    )
    for key in [*found, *(k for k in implied if k not in found)]:
        if _NOT_PER_LAYER.fullmatch(key):
            continue
        value = found.get(key)
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
        is_text = isinstance(value, str) and all(isinstance(entry, str) for entry in entries)
        target[key] = (
            "".join(entries)
            if is_text
            else dict(zip(map(str, range(len(entries))), entries, strict=True))
            if isinstance(value, dict)
            else entries
        )


def _are_numbers(key: str, value: Any, count: int) -> bool:
    """Whether a value lists numbers of layers rather than an entry for each."""
    if key in _PER_LAYER or not isinstance(value, list) or not value or any(type(n) is not int for n in value):
        return False
    first = 1 if key in _FROM_ONE else 0
    in_order = all(a < b for a, b in pairwise(value))
    return bool(_NUMBERS_OF_LAYERS.fullmatch(key)) and in_order and first <= value[0] and value[-1] < count + first


def _renumber(target: dict[str, Any], key: str, layers: _Layers, path: KeyPath) -> None:
    first = 1 if key in _FROM_ONE else 0

    def is_listed(source: _Source) -> list[bool]:
        value = at(source.config, path).get(key)
        listed = {n for n in value if type(n) is int} if isinstance(value, list) else set()
        return [i + first in listed for i in range(source.count)]

    target[key] = [i + first for i, listed in enumerate(layers.of(is_listed)) if listed]


def _first_dense(target: dict[str, Any], layers: _Layers) -> None:
    """Count anew how many layers come before those with experts."""
    for key in _FIRST_DENSE:
        if type(target.get(key)) is not int:
            continue
        dense = layers.of(lambda s, k=key: _is_dense(s, k))  # type: ignore[misc]
        if True in dense[dense.index(False) :] if False in dense else False:
            raise RecipeError(
                f"{key}: the slices put a layer without experts after one with experts, which config.json cannot"
                " describe; take the first layers first"
            )
        target[key] = sum(dense)


def _is_dense(source: _Source, key: str) -> list[bool]:
    """Whether each layer of a model comes before those with experts."""
    first = source.config.get(key)
    if first is not None and type(first) is not int:
        raise source.wrong(key, "a number of layers")
    return [i < (first or 0) for i in range(source.count)]


def _attention_types(source: _Source) -> list[Any]:
    """The kind of each layer of a model, as GPT-Neo lists them: ``[[["global", "local"], 12]]``."""
    kinds: list[Any] = []
    value = source.config.get("attention_types")
    for entry in value if isinstance(value, list) else [value]:
        match entry:
            case [list(cycle), int(times)] if cycle and 0 <= times <= _MOST_LAYERS:
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
