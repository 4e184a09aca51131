"""In what else than weights models differ: noted where a merge may make sense, refused where it does not."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import CONFIG, recipe, write_family
from merges import merge

from deltaworks.catalog.store import Catalog
from deltaworks.errors import RecipeError
from deltaworks.merging import parents
from deltaworks.merging.manifest import read_manifest
from deltaworks.merging.parents import Parent, compare_configs, compare_tokens
from deltaworks.merging.prepare import MergeOptions


def compare(base: dict[str, Any], other: dict[str, Any], *, is_sliced: bool = False) -> tuple[list[str], list[str]]:
    parents = [Parent(n, c, Path()) for n, c in (("base", base), ("a", other))]
    return compare_configs(parents[0], parents[1:], is_sliced=is_sliced)


LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "hidden_size": 32,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
ROPE5 = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("base", "other", "note"),
    [
        ({}, {"rope_theta": 1e6}, "a has rope_theta 1000000.0, base has 10000.0; the output takes base's"),
        ({}, {"rope_scaling": LINEAR}, "a has rope_scaling {'factor': 4.0, 'rope_type': 'linear'}, base has none; the"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": LINEAR}, "rope_scaling"),
        ({}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "a has rope_theta 500000.0, base has"),
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}, "a has rms_norm_eps 1e-06, base has 1e-05"),
        ({}, {"hidden_act": "gelu"}, "a has hidden_act 'gelu', base has 'silu'"),
        ({}, {"sliding_window": 16}, "a has sliding_window 16, base has none"),
        ({}, {"final_logit_softcapping": 30.0}, "a has final_logit_softcapping 30.0, base has none"),
        ({"num_experts_per_tok": 2}, {"num_experts_per_tok": 4}, "a has num_experts_per_tok 4, base has 2"),
        ({"eos_token_id": 2}, {"eos_token_id": [2, 3]}, "a has eos_token_id [2, 3], base has 2"),
        ({"layer_types": ["x"]}, {"layer_types": ["y"]}, "a has layer_types ['y'], base has ['x']"),
        ({"text_config": {"rope_theta": 1.0}}, {"text_config": {"rope_theta": 2.0}}, "text_config.rope_theta 2.0"),
        ({"any_setting": 1}, {"any_setting": 2}, "a has any_setting 2, base has 1"),
        ({"architectures": ["A"]}, {"architectures": ["B"]}, "a has architectures ['B'], base has ['A']"),
    ],
)  # fmt: skip
def test_settings_that_differ_are_noted(base: dict[str, Any], other: dict[str, Any], note: str) -> None:
    notes, senseless = compare(LLAMA | base, LLAMA | base | other)
    assert len(notes) == 1
    assert note in notes[0]
    assert senseless == []


@pytest.mark.parametrize(
    ("base", "other"),
    [
        ({}, {"transformers_version": "5", "torch_dtype": "float16", "use_cache": False, "_name_or_path": "x"}),
        ({}, {"num_key_value_heads": 4, "head_dim": 8, "attention_bias": False}),
        ({}, {"rope_scaling": None, "sliding_window": None, "unknown": 3}),
        ({"rope_theta": 10000}, {}),
        ({"eos_token_id": 2}, {"eos_token_id": [2]}),
        ({"use_sliding_window": False, "sliding_window": 16}, {"use_sliding_window": False, "sliding_window": None}),
        ({"tie_word_embeddings": True, "vocab_size": 64}, {"tie_word_embeddings": False, "vocab_size": 65}),
    ],
)
def test_settings_that_do_not_matter(base: dict[str, Any], other: dict[str, Any]) -> None:
    assert compare(LLAMA | base, LLAMA | other) == ([], [])


def test_two_versions_of_transformers_say_the_same() -> None:
    five = {k: v for k, v in LLAMA.items() if k != "rope_theta"} | ROPE5
    assert compare(LLAMA, five) == compare(five, LLAMA) == ([], [])


def test_models_that_say_the_same_share_a_note() -> None:
    others = [Parent(n, LLAMA | {"hidden_act": "gelu"}, Path()) for n in "abcde"]
    notes, _ = compare_configs(Parent("base", LLAMA, Path()), others, is_sliced=False)
    assert notes == ["a, b, c and 2 more have hidden_act 'gelu', base has 'silu'; the output takes base's"]


def test_slices_may_be_of_another_depth() -> None:
    a, b = ({"num_hidden_layers": n, "layer_types": ["x"] * n} for n in (2, 3))
    assert compare(a, b, is_sliced=True) == ([], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "expert1 has model_type 'mistral' and base 'llama'"),
        ({"num_attention_heads": 6, "head_dim": 4}, "expert1 has num_attention_heads 6 and base 3"),
        ({"num_key_value_heads": 3}, "expert1 has num_key_value_heads 3 and base 1"),
    ],
)
def test_weights_that_mean_something_else_are_refused(
    catalog: Catalog, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_family(tmp_path, 2)
    (tmp_path / "expert1" / "config.json").write_text(json.dumps(CONFIG | change))
    text = recipe("task_arithmetic", tmp_path, listed=("expert0", "expert1"), parameters="weight: 0.5")
    with pytest.raises(RecipeError, match=f"{message}.* add --allow-mismatch"):
        merge(catalog, text, tmp_path / "out")
    result = merge(catalog, text, tmp_path / "out", MergeOptions(allow_mismatch=True))
    assert any(next(iter(change)) in note for note in result.notes)
    assert read_manifest(tmp_path / "out")["notes"] == list(result.notes)


def tokenizer(path: Path, tokens: dict[str, int], added: dict[int, str] | None = None) -> Parent:
    path.mkdir()
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))
    decoder = {str(i): {"content": name} for i, name in (added or {}).items()}
    (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    return Parent(path.name, {}, path)


@pytest.mark.parametrize(
    ("tokens", "added", "expected"),
    [
        ({"x": 0, "y": 1}, {}, []),
        ({"x": 0, "z": 1}, {}, ["a has other tokens than base at 1 id, first 1: 'z' and 'y'; the output takes base's"]),
        (
            {"x": 0, "y": 1},
            {1: "<|im_start|>"},
            ["a has other tokens than base at 1 id, first 1: '<|im_start|>' and 'y'"],
        ),
        ({"x": 0, "y": 1, "q": 2}, {}, ["a has tokens that base lacks at 1 id, first 2: 'q'; the output takes base's"]),
    ],
)
def test_other_tokens_at_the_same_ids(
    tmp_path: Path, tokens: dict[str, int], added: dict[int, str], expected: list[str]
) -> None:
    base, other = tokenizer(tmp_path / "base", {"x": 0, "y": 1}), tokenizer(tmp_path / "a", tokens, added)
    notes = compare_tokens(base, [other])
    assert len(notes) == len(expected)
    assert all(note.startswith(start) for note, start in zip(notes, expected, strict=True))


def test_equal_files_of_tokens_are_not_parsed_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    donor, *others = [tokenizer(tmp_path / n, {"a": 0, "b": 1}) for n in ("donor", "one", "two", "three")]
    opened: list[str] = []
    plain_open = Path.open

    def count(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(path.parent.name)
        return plain_open(path, *args, **kwargs)

    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} is parsed")

    monkeypatch.setattr(parents, "_tokens", refuse)
    monkeypatch.setattr(Path, "open", count)
    assert compare_tokens(donor, others) == []
    files = opened.count("donor")
    assert files > 0
    assert [opened.count(n) for n in ("one", "two", "three")] == [files] * 3


def test_files_of_tokens_of_equal_size_may_differ(tmp_path: Path) -> None:
    donor, other = tokenizer(tmp_path / "donor", {"a": 0, "b": 1}), tokenizer(tmp_path / "other", {"b": 0, "a": 1})
    (note,) = compare_tokens(donor, [other])
    assert note.startswith("other has other tokens than donor at 2 ids")


def test_tokens_that_cannot_be_read_are_noted(tmp_path: Path) -> None:
    donor, other = tokenizer(tmp_path / "donor", {"a": 0}), tokenizer(tmp_path / "other", {"a": 0})
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    (note,) = compare_tokens(donor, [other])
    assert note.startswith("the tokens of other are not compared with those of donor: ")
    assert "tokenizer.json" in note
