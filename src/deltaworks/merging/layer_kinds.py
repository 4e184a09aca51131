"""The kind of each layer, where a family derives it from a few settings rather than listing it in `config.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SLIDING = ("sliding_attention", "full_attention")
_LINEAR = ("linear_attention", "full_attention")


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a family tells kinds of layers where its configuration has no list of them."""

    key: str
    period: str | None
    default: int
    inside: str | int
    last: str | int


_RULES = {
    "gemma2": _Rule("layer_types", None, 2, *_SLIDING),
    "vaultgemma": _Rule("layer_types", None, 2, *_SLIDING),
    "gpt_oss": _Rule("layer_types", None, 2, *_SLIDING),
    "gemma3_text": _Rule("layer_types", "sliding_window_pattern", 6, *_SLIDING),
    "gemma3n_text": _Rule("layer_types", None, 5, *_SLIDING),
    "gemma4_text": _Rule("layer_types", None, 6, *_SLIDING),
    "cohere2": _Rule("layer_types", "sliding_window_pattern", 4, *_SLIDING),
    "exaone4": _Rule("layer_types", "sliding_window_pattern", 4, *_SLIDING),
    "olmo3": _Rule("layer_types", None, 4, *_SLIDING),
    "qwen3_next": _Rule("layer_types", "full_attention_interval", 4, *_LINEAR),
    "qwen3_5_text": _Rule("layer_types", "full_attention_interval", 4, *_LINEAR),
    "qwen3_5_moe_text": _Rule("layer_types", "full_attention_interval", 4, *_LINEAR),
    "smollm3": _Rule("no_rope_layers", "no_rope_layer_interval", 4, 1, 0),
    "llama4_text": _Rule("no_rope_layers", "no_rope_layer_interval", 4, 1, 0),
}
_FIRST_WITH_WINDOW = {
    "qwen2": 28, "qwen3": 28, "qwen2_vl": 80, "qwen2_vl_text": 80, "qwen2_5_vl": 80, "qwen2_5_vl_text": 80,
    "qwen2_5_omni_text": 28, "dots1": 62,
}  # fmt: skip
"""Families whose layers slide from `max_window_layers` on, and what that is where the configuration does not say."""


def implied_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys of lists with an entry a layer that the family of a configuration derives."""
    kind = str(config.get("model_type"))
    if kind in _FIRST_WITH_WINDOW or kind == "qwen2_moe":
        return ["layer_types"]
    return [_RULES[kind].key] if kind in _RULES else []


def derived(config: Mapping[str, Any], key: str, count: int) -> list[Any] | None:
    """What a family puts in a list with an entry a layer where its configuration has none; None where nobody knows."""
    if key not in implied_keys(config):
        return None
    kind = config["model_type"]
    rule = _RULES.get(kind)
    if rule is None:
        return _by_window(config, count)
    period = config.get(rule.period, config.get(f"_{rule.period}", rule.default)) if rule.period else rule.default
    if isinstance(period, str):
        kinds = {"L": rule.inside, "G": rule.last}
        return [kinds[c] for c in cycled(period, count)] if period and kinds.keys() >= set(period) else None
    if type(period) is not int or period < 1:
        return None
    return [rule.inside if (i + 1) % period else rule.last for i in range(count)]


def cycled(pattern: Sequence[Any], count: int) -> list[Any]:
    """The entry of each of `count` layers, by a pattern that is repeated."""
    return [pattern[i % len(pattern)] for i in range(count)]


def _by_window(config: Mapping[str, Any], count: int) -> list[Any] | None:
    kind = config["model_type"]
    slides = bool(config.get("use_sliding_window", kind == "dots1")) and config.get("sliding_window", 4096) is not None
    end = config.get("max_window_layers", _FIRST_WITH_WINDOW.get(kind, 28))
    if not slides:
        return [_SLIDING[1]] * count
    if type(end) is not int:
        return None
    if kind == "qwen2_moe":
        return [_SLIDING[0] if i % 2 == 0 and i < end else _SLIDING[1] for i in range(count)]
    return [_SLIDING[0] if i >= end else _SLIDING[1] for i in range(count)]
