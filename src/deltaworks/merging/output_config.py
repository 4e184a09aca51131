"""`config.json` of a merged model: the base's, changed to describe the tensors of the output."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from deltaworks.checkpoints.dtypes import DTYPES
from deltaworks.checkpoints.tensor_names import HEADS, LAYER, is_embeddings
from deltaworks.merging.nested_config import at, text_paths
from deltaworks.merging.plan import PlannedTensor

_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_SCALED_WHERE_TIED = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "pop2piano")
"""Families that scale activations when the head is tied, so that a copy of the embeddings is not an untied head."""
_DTYPE_KEYS = ("dtype", "torch_dtype")
_DTYPE_NAMES = {d.torch_name for d in DTYPES.values() if d.is_float}


def describe_output(
    config: Mapping[str, Any], tensors: Sequence[PlannedTensor], dtype: str, parents: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The configuration of a model with the given tensors; `follow_layers` describes its layers.

    Args:
        config: that of the model whose configuration the output takes.
        tensors: of the output.
        dtype: the element type that most of the output has, or that was asked for.
        parents: the configurations of all inputs.
    """
    result = copy.deepcopy(dict(config))
    _set_dtype(result, dtype, everywhere=len({t.dtype for t in tensors if t.dtype.is_float}) <= 1)
    is_tied = _is_tied(result, tensors, parents)
    if is_tied is not None:
        for path in text_paths(result):
            at(result, path)["tie_word_embeddings"] = is_tied
    return result


def says_untied(config: dict[str, Any]) -> bool:
    """Whether a configuration says that the head is not tied to the embeddings, at the top or for its text model."""
    said = [at(config, path).get("tie_word_embeddings") for path in text_paths(config)]
    return False in said and True not in said


def _set_dtype(config: dict[str, Any], dtype: str, *, everywhere: bool) -> None:
    """Name the element type at the top and, where all of the output has it, in every nested configuration."""
    for key in _DTYPE_KEYS:
        if key in config:
            config[key] = dtype
    if "dtype" not in config:
        config["torch_dtype"] = dtype
    texts = {id(at(config, path)) for path in text_paths(config)}

    def set_nested(part: dict[str, Any]) -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                set_nested(value)
            elif key in _DTYPE_KEYS and (everywhere or id(part) in texts) and _is_dtype(value):
                part[key] = dtype

    set_nested(config)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value.removeprefix("torch.") in _DTYPE_NAMES


def _is_tied(
    config: Mapping[str, Any], tensors: Sequence[PlannedTensor], parents: Sequence[Mapping[str, Any]]
) -> bool | None:
    """Whether the head of the output is its embeddings; None where the tensors do not tell."""
    outside = [t for t in tensors if not LAYER.fullmatch(t.name)]
    if any(t.name.endswith(HEADS) for t in outside):
        keeps = config.get("model_type") in _SCALED_WHERE_TIED
        return None if keeps and all(p.get("tie_word_embeddings", True) for p in parents) else False
    embeddings = {t.shape for t in outside if is_embeddings(t.name)}
    names = config.get("architectures")
    has_head = isinstance(names, list) and any(str(n).endswith(_WITH_HEAD) for n in names)
    if not embeddings or not has_head:
        return None
    # A head of another name has as many rows as the embeddings.
    return None if any(t.shape in embeddings and not is_embeddings(t.name) for t in outside) else True
