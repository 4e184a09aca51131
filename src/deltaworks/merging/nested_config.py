"""Find the settings of the language model in a `config.json`: at the top, or nested beside other parts."""

from typing import Any

_TEXT_PARTS = ("thinker_config", "text_config", "llm_config", "language_config", "language_model_config")

KeyPath = tuple[str, ...]
"""Keys that lead from the top of a configuration to a nested one."""


def text_paths(config: dict[str, Any]) -> list[KeyPath]:
    """The places that may describe the language model, the top first; the last is the innermost."""
    paths: list[KeyPath] = [()]
    for key in _TEXT_PARTS:
        if isinstance(part := config.get(key), dict):
            paths += [(key, *path) for path in text_paths(part)]
    return paths


def at(config: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    """The nested configuration at a place; empty where there is none."""
    for key in path:
        part = config.get(key)
        config = part if isinstance(part, dict) else {}
    return config
