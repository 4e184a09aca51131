"""Compare settings of `config.json` and tokens of the models of a merge."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from deltaworks.checkpoints.json_files import read_json
from deltaworks.checkpoints.own_files import own_file
from deltaworks.checkpoints.sidecars import vocabulary
from deltaworks.errors import CheckpointError, RecipeError, quoted
from deltaworks.wording import listed

_INCOMPATIBLE = re.compile(
    r"model_type|(num_)?(attention_|key_value_|kv_)?heads|num_attention_heads|num_key_value_heads|head_dim|n_heads?"
    r"|num_kv_heads|n_head_kv|multi_query|attention_head_dim"
)
"""Settings that decide how weights are used: models that differ in them are not merged unless asked."""

_NOT_REPORTED = re.compile(
    r"transformers_version|(torch_)?dtype|_?name_or_path|use_cache|.*dropout.*|.*_pdrop|initializer_.*|init_.*|output_.*"
    r"|return_dict.*|torchscript|gradient_checkpointing|finetuning_task|task_specific_params|auto_map|custom_pipelines"
    r"|architectures|quantization_config|.*unsloth.*|pretraining_tp|tokenizer_class|.*aux_loss.*|router_.*noise|.*z_loss.*"
    r"|tie_(word_embeddings|encoder_decoder)|temperature|top_[kp]|typical_p|max_length|min_length|num_beams|do_sample"
    r"|repetition_penalty|.*attn_implementation.*|use_flash.*|pruned_heads|_.*|use_bfloat16|chunk_size_feed_forward"
    r"|keys_to_ignore_.*|length_penalty|early_stopping|diversity_penalty|no_repeat_.*|encoder_no_repeat_.*|remove_invalid_values"
    r"|num_return_sequences|num_beam_groups|model_max_length|problem_type|vocab_size|fused_.*|mlp_bias|attention_bias"
)
"""Settings that are not reported: of training, generation and storage, and those that follow from the tensors."""

_DEPTH = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|(num_)?decoder_layers|max_window_layers|first_k_dense_replace"
)

_REPORTED_IF_OMITTED = re.compile(
    r"rope_.*|.*softcap.*|sliding_window|logit.*|.*_multiplier|query_pre_attn_scalar|scale_(emb|depth)|partial_rotary_factor"
    r"|rotary_.*|alibi|layer_types|no_rope_layers|num_experts_per_tok|norm_topk_prob|routed_scaling_factor|clip_qkv"
    r"|.*norm_eps.*|hidden_act.*|activation_function|num_key_value_heads|head_dim"
)
"""Settings that are reported even if one model omits them and therefore uses its class default."""

_MAX_NOTES = 24
_CHUNK = 1 << 20
"""Bytes of a tokenizer's file that are read at once."""


@dataclass(frozen=True, slots=True)
class Parent:
    """An input of a merge: what messages call it, its `config.json`, and its folder."""

    name: str
    config: Mapping[str, Any]
    path: Path


@dataclass(frozen=True, slots=True)
class _Difference:
    key: str
    value: Any
    leading: Any


def compare_configs(leader: Parent, others: Sequence[Parent], *, is_sliced: bool) -> tuple[list[str], list[str]]:
    """Compare the settings of models with those of the model whose configuration the output takes.

    Args:
        leader: that model.
        others: the others.
        is_sliced: whether layers are chosen one by one, so that depths may differ.

    Returns:
        A note for every setting that differs and matters; and the incompatible settings, in words.
    """
    noted: dict[tuple[str, str, str], list[str]] = {}
    incompatible: list[str] = []
    for other in others:
        if not leader.config or not other.config:
            continue
        for found in _differences(leader.config, other.config, is_sliced=is_sliced):
            if _INCOMPATIBLE.fullmatch(found.key.rpartition(".")[2]):
                incompatible.append(
                    f"{other.name} has {found.key} {_setting(found.value)} and {leader.name} {_setting(found.leading)}"
                )
            key = found.key, _setting(found.value), _setting(found.leading)
            noted.setdefault(key, []).append(other.name)
    notes = [
        f"{listed(names, 3)} {'has' if len(names) == 1 else 'have'} {key} {value}, {leader.name} has {leading};"
        f" the output takes {leader.name}'s"
        for (key, value, leading), names in noted.items()
    ]
    if len(notes) > _MAX_NOTES:
        rest = list(noted)[_MAX_NOTES:]
        notes = [*notes[:_MAX_NOTES], f"{len(rest)} other settings differ, first {rest[0][0]}"]
    return notes, incompatible


def check_compatible(incompatible: Sequence[str]) -> None:
    """Refuse models whose weights are not comparable.

    Args:
        incompatible: the incompatible settings, as `compare_configs` returns them.

    Raises:
        RecipeError: there are any.
    """
    if incompatible:
        more = f"; and {len(incompatible) - 6} more" if len(incompatible) > 6 else ""
        raise RecipeError(
            f"{'; '.join(incompatible[:6])}{more}: their weights are not comparable; merge models of one architecture,"
            " or add --allow-mismatch"
        )


def _differences(
    leading: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "", *, is_sliced: bool
) -> Iterator[_Difference]:
    ours, theirs = _normal(leading), _normal(other)
    for key in dict.fromkeys([*ours, *theirs]):
        if _NOT_REPORTED.fullmatch(key) or (_DEPTH.fullmatch(key) and (is_sliced or (key in ours and key in theirs))):
            continue
        mine, its = ours.get(key), theirs.get(key)
        if _equal(mine, its) or (is_sliced and isinstance(mine, list) and isinstance(its, list) and "token" not in key):
            continue
        if isinstance(mine, dict) and isinstance(its, dict) and not key.startswith("rope"):
            yield from _differences(mine, its, f"{prefix}{key}.", is_sliced=is_sliced)
            continue
        if (key in ours) != (key in theirs) and not (
            _REPORTED_IF_OMITTED.fullmatch(key) and any(v not in (None, False) for v in (mine, its))
        ):
            continue
        yield _Difference(prefix + key, its, mine)
    named = leading.get("architectures"), other.get("architectures")
    if named[0] != named[1] and all(named) and leading.get("model_type") == other.get("model_type"):
        yield _Difference(f"{prefix}architectures", named[1], named[0])


def _normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in which settings have one spelling, whatever version of transformers wrote it."""
    result = dict(config)
    rope = dict(result.pop("rope_parameters")) if _is_rope(result) else {}
    if "rope_scaling" in result or rope:
        scaling = result.pop("rope_scaling", None)
        rope = (scaling if isinstance(scaling, dict) else {}) | rope
        rope = {("rope_type" if k == "type" else k): v for k, v in rope.items()}
        if (theta := rope.pop("rope_theta", None)) is not None:
            result["rope_theta"] = theta
        result["rope_scaling"] = None if rope.get("rope_type", "default") == "default" and len(rope) <= 1 else rope
    heads = result.get("num_attention_heads")
    if type(heads) is int and heads > 0:
        result["num_key_value_heads"] = result.get("num_key_value_heads") or heads
        hidden = result.get("hidden_size")
        if result.get("head_dim") is None and type(hidden) is int and not hidden % heads:
            result["head_dim"] = hidden // heads
    if result.get("use_sliding_window") is False:
        result["sliding_window"] = None
        result.pop("max_window_layers", None)
    for key, value in result.items():
        if key.endswith("_token_id") and isinstance(value, list) and len(value) == 1:
            result[key] = value[0]
    return result


def _is_rope(config: Mapping[str, Any]) -> bool:
    """Whether rotary settings are for all layers, not for each kind by itself."""
    found = config.get("rope_parameters")
    return isinstance(found, dict) and not any(isinstance(v, dict) for v in found.values())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)  # 10000 and 10000.0 are the same


def _setting(value: Any) -> str:
    return "none" if value is None else quoted(value, 60)


def compare_tokens(donor: Parent, others: Sequence[Parent]) -> list[str]:
    """Compare the tokens of models, id by id, with those of the model whose tokenizer the output gets.

    Args:
        donor: that model.
        others: the others.

    Returns:
        A note for every model with different or additional tokens, or whose tokens cannot be compared because a
        tokenizer's file is malformed: the weights can be merged all the same.
    """
    notes = []
    own: dict[int, str] | None = None
    files = _token_files(donor.path)
    digests: dict[Path, str] = {}
    for other in others:
        if _same_files(files, _token_files(other.path), digests):
            continue
        try:
            own = _tokens(donor.path) if own is None else own
            theirs = _tokens(other.path)
        except CheckpointError as error:
            notes.append(f"the tokens of {other.name} are not compared with those of {donor.name}: {error}")
            continue
        if not own or not theirs:
            continue
        moved = [i for i in sorted(own.keys() & theirs.keys()) if own[i] != theirs[i]]
        added = sorted(theirs.keys() - own.keys())
        if moved:
            first = moved[0]
            notes.append(
                f"{other.name} has other tokens than {donor.name} at {_ids(moved)}, first {first}:"
                f" {quoted(theirs[first], 60)} and {quoted(own[first], 60)}; the output takes {donor.name}'s"
            )
        if added:
            notes.append(
                f"{other.name} has tokens that {donor.name} lacks at {_ids(added)}, first {added[0]}:"
                f" {quoted(theirs[added[0]], 60)}; the output takes {donor.name}'s tokenizer"
            )
    return notes


def _ids(found: Sequence[int]) -> str:
    return "1 id" if len(found) == 1 else f"{len(found)} ids"


_TOKEN_FILES = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")


def _token_files(folder: Path) -> list[Path | None]:
    """The files of a model that hold tokens, links resolved; None for those that it does not have."""
    return [own_file(folder / name) for name in _TOKEN_FILES]


def _same_files(ones: Sequence[Path | None], others: Sequence[Path | None], digests: dict[Path, str]) -> bool:
    """Whether files hold the same bytes, so that they need not be parsed; sizes are compared first.

    Args:
        ones: files of one model.
        others: those of another, in the same order.
        digests: of files that were read already; it grows.
    """
    for one, other in zip(ones, others, strict=True):
        if one is None or other is None:
            if one is not other:
                return False
        elif one != other and (
            one.stat().st_size != other.stat().st_size or _digest(one, digests) != _digest(other, digests)
        ):
            return False
    return True


def _digest(path: Path, digests: dict[Path, str]) -> str:
    if path not in digests:
        hasher = blake3(max_threads=blake3.AUTO)
        with path.open("rb", buffering=0) as file:
            while part := file.read(_CHUNK):
                hasher.update(part)
        digests[path] = hasher.hexdigest()
    return digests[path]


def _tokens(path: Path) -> dict[int, str]:
    """Tokens by their ids, as far as files in JSON tell."""
    tokens = {number: name for name, number in (vocabulary(path) or {}).items()}
    if own_file(path / "added_tokens.json") is not None:
        added = read_json(path / "added_tokens.json")
        tokens |= {number: name for name, number in added.items() if type(number) is int}
    if own_file(path / "tokenizer_config.json") is not None:
        decoder = read_json(path / "tokenizer_config.json").get("added_tokens_decoder")
        for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
            if (
                number.isdecimal()
                and len(number) < 10
                and isinstance(entry, dict)
                and isinstance(entry.get("content"), str)
            ):
                tokens[int(number)] = entry["content"]
    return tokens
