"""config.json follows the layers that slices take."""

import copy
from typing import Any

import pytest

from deltaworks.errors import RecipeError
from deltaworks.merging.layer_entries import LayeredConfig, follow_layers

S, F, L = "sliding_attention", "full_attention", "linear_attention"


def follow(
    config: dict[str, Any], *ranges: tuple[int, int], layers: int, other: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The configuration of a stack of layers of `a`, the last range of `b` where there is one."""
    models = {"a": LayeredConfig("a", config, layers)}
    taken = [(("a", i),) for first, end in ranges for i in range(first, end)]
    if other is not None:
        models["b"] = LayeredConfig("b", other, layers)
        taken = [
            ((("b" if n >= len(taken) - (ranges[-1][1] - ranges[-1][0]) else "a"), t[0][1]),)
            for n, t in enumerate(taken)
        ]
    result = copy.deepcopy(config)
    assert follow_layers(result, "a", models, taken) == []
    return result


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers", "n_layers"])
def test_the_key_that_counts_layers_is_the_one_that_changes(key: str) -> None:
    assert follow({key: 4, "n_head": 2}, (0, 3), (1, 4), layers=4) == {key: 6, "n_head": 2}


def test_a_nested_count_is_changed_where_it_stands() -> None:
    config = {"text_config": {"num_hidden_layers": 2, "layer_types": [S, F]}, "vision_config": {"num_hidden_layers": 2}}
    expected = {
        "text_config": {"num_hidden_layers": 3, "layer_types": [S, F, F]},
        "vision_config": {"num_hidden_layers": 2},
    }
    assert follow(config, (0, 2), (1, 2), layers=2) == expected


def test_a_config_that_counts_no_layers_gets_a_count() -> None:
    assert follow({"hidden_size": 4}, (0, 1), layers=2) == {"hidden_size": 4, "num_hidden_layers": 1}


LISTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # Of four layers, those numbered 1, 2, 3, 2, 3 are taken.
    ({"layer_types": [F, S, S, F]}, {"layer_types": [S, S, F, S, F]}),
    ({"no_rope_layers": [1, 1, 1, 0]}, {"no_rope_layers": [1, 1, 0, 1, 0]}),
    ({"no_rope_layers": [0, 1, 2, 3]}, {"no_rope_layers": [1, 2, 3, 2, 3]}),
    ({"intermediate_size": [8, 8, 16, 32]}, {"intermediate_size": [8, 16, 32, 16, 32]}),
    ({"activation_sparsity_pattern": [0.9, 0.5, 0.0, 0.0]}, {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0]}),
    ({"block_configs": [{"n": i} for i in range(4)]}, {"block_configs": [{"n": i} for i in (1, 2, 3, 2, 3)]}),
    ({"heads": {"0": 4, "1": 5, "2": 6, "3": 7}}, {"heads": {"0": 5, "1": 6, "2": 7, "3": 6, "4": 7}}),
    ({"attn_config": {"kinds": [1, 2, 3, 4]}}, {"attn_config": {"kinds": [2, 3, 4, 3, 4]}}),
    ({"hybrid_override_pattern": "M-M*"}, {"hybrid_override_pattern": "-M*M*"}),
    ({"sliding_window_pattern": "LLLG", "layer_types": [S, S, S, F]},
     {"sliding_window_pattern": "LLGLG", "layer_types": [S, S, F, S, F]}),
    ({"model_type": "exaone4", "sliding_window_pattern": "LG"},
     {"model_type": "exaone4", "sliding_window_pattern": "GLGLG"}),
    ({"layers_block_type": ["mamba", "hybrid", "mamba", "mamba"], "hybrid_layer_ids": [1]},
     {"layers_block_type": ["hybrid", "mamba", "mamba", "mamba", "mamba"], "hybrid_layer_ids": [0]}),
    ({"attn_layer_indices": [3]}, {"attn_layer_indices": [2, 4]}),
    ({"cross_attention_layers": [1, 2]}, {"cross_attention_layers": [0, 1, 3]}),
    ({"moe_layers_enum": "1,2,3"}, {"moe_layers_enum": "0,1,2,3,4"}),
    ({"per_layer_config": {"3": {"head_dim": 8}}}, {"per_layer_config": {"2": {"head_dim": 8}, "4": {"head_dim": 8}}}),
    ({"num_kv_shared_layers": 0}, {"num_kv_shared_layers": 0}),
    ({"moe_layer_start_index": 0, "moe_layer_end_index": 3}, {"moe_layer_start_index": 0, "moe_layer_end_index": 4}),
    ({"moe_layer_end_index": -1}, {"moe_layer_end_index": -1}),
    ({"cla_share_factor": 2, "use_cla": False}, {"cla_share_factor": 2, "use_cla": False}),
    ({"altup_active_idx": 0, "altup_num_inputs": 4}, {"altup_active_idx": 0, "altup_num_inputs": 4}),
    ({"block_types": ["r", "r", "a"]}, {"block_types": ["r", "a", "r", "a", "r"]}),
    ({"mlp_only_layers": [0, 2]}, {"mlp_only_layers": [1, 3]}),
    ({"mlp_only_layers": []}, {"mlp_only_layers": []}),
    ({"moe_layers": [0, 1, 2, 3]}, {"moe_layers": [0, 1, 2, 3, 4]}),
    ({"linear_attn_config": {"kda_layers": [1, 3], "full_attn_layers": [2, 4]}},
     {"linear_attn_config": {"kda_layers": [2, 4], "full_attn_layers": [1, 3, 5]}}),
    ({"attention_types": [[["global", "local"], 2]]},
     {"attention_types": [[[k], 1] for k in ("local", "global", "local", "global", "local")]}),
    ({"first_k_dense_replace": 1}, {"first_k_dense_replace": 0}),
    ({"first_k_dense_replace": 4}, {"first_k_dense_replace": 5}),
    # What has no entry a layer, by its name or by its place.
    ({"eos_token_id": [1, 2, 3, 4]}, {"eos_token_id": [1, 2, 3, 4]}),
    ({"rope_scaling": {"short_factor": [1, 2, 3, 4]}}, {"rope_scaling": {"short_factor": [1, 2, 3, 4]}}),
    ({"id2label": {"0": "a", "1": "b", "2": "c", "3": "d"}}, {"id2label": {"0": "a", "1": "b", "2": "c", "3": "d"}}),
    ({"vision_config": {"depths": [1, 2, 3, 4]}}, {"vision_config": {"depths": [1, 2, 3, 4]}}),
    ({"depths": [1, 2, 3]}, {"depths": [1, 2, 3]}),
    # Families that derive the list: it is written where the layers do not follow the pattern any more.
    ({"model_type": "gemma2"}, {"model_type": "gemma2", "layer_types": [F, S, F, S, F]}),
    ({"model_type": "cohere2", "sliding_window_pattern": 2},
     {"model_type": "cohere2", "sliding_window_pattern": 2, "layer_types": [F, S, F, S, F]}),
    ({"model_type": "qwen3_next", "full_attention_interval": 4},
     {"model_type": "qwen3_next", "full_attention_interval": 4, "layer_types": [L, L, F, L, F]}),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
     {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
     {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3,
      "layer_types": [F, F, S, F, S]}),
    ({"use_sliding_window": True, "max_window_layers": 4}, {"use_sliding_window": True, "max_window_layers": 5}),
    ({"model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 2},
     {"model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 2}),
    ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 3]}),
    ({"num_nextn_predict_layers": 1}, {"num_nextn_predict_layers": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "expected"), LISTS)
def test_entries_follow_the_layers(config: dict[str, Any], expected: dict[str, Any]) -> None:
    found = follow({"num_hidden_layers": 4} | config, (1, 4), (2, 4), layers=4)
    assert found == {"num_hidden_layers": 5} | expected


def test_entries_come_from_the_model_of_the_layer() -> None:
    a, b = ({"num_hidden_layers": 2, "layer_types": kinds} for kinds in ([S, F], [F, S]))
    assert follow(a, (0, 2), (0, 2), layers=2, other=b)["layer_types"] == [S, F, F, S]
    derived = {"num_hidden_layers": 2, "model_type": "gemma2"}
    assert follow(a | {"model_type": "gemma2"}, (0, 2), (1, 2), layers=2, other=derived)["layer_types"] == [S, F, F]


def test_a_pattern_that_is_kept_needs_no_list() -> None:
    config = {"num_hidden_layers": 4, "model_type": "gemma2"}
    assert follow(config, (0, 4), (2, 4), layers=4) == config | {"num_hidden_layers": 6}
    config = {"num_hidden_layers": 4, "model_type": "exaone4", "sliding_window_pattern": "LG"}
    assert follow(config, (0, 4), (2, 4), layers=4) == config | {"num_hidden_layers": 6}


SHARING: list[tuple[dict[str, Any], list[tuple[int, int]], dict[str, Any]]] = [
    ({"num_kv_shared_layers": 2}, [(0, 4)], {"num_kv_shared_layers": 2}),
    ({"num_kv_shared_layers": 2}, [(0, 4), (2, 4)], {"num_kv_shared_layers": 4}),
    ({"num_kv_shared_layers": 2}, [(0, 2)], {"num_kv_shared_layers": 0}),
    ({"num_kv_shared_layers": 2}, [(0, 3)], {"num_kv_shared_layers": 1}),
    ({"num_kv_shared_layers": 1, "layer_types": [S, F, S, S]}, [(0, 4), (3, 4)],
     {"num_kv_shared_layers": 2, "layer_types": [S, F, S, S, S]}),
    ({"model_type": "gemma3n_text", "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2}, [(0, 4), (3, 4)],
     {"model_type": "gemma3n_text", "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 3,
      "layer_types": [S] * 5}),
    ({"model_type": "gemma3n_text", "hidden_size_per_layer_input": 256, "num_kv_shared_layers": 2}, [(0, 4)],
     {"model_type": "gemma3n_text", "hidden_size_per_layer_input": 256, "num_kv_shared_layers": 2}),
]  # fmt: skip


@pytest.mark.parametrize("nested", [False, True], ids=["at the top", "in text_config"])
@pytest.mark.parametrize(("config", "ranges", "expected"), SHARING)
def test_layers_that_share_keys_and_values_are_counted_anew(
    config: dict[str, Any], ranges: list[tuple[int, int]], expected: dict[str, Any], nested: bool
) -> None:
    def wrapped(part: dict[str, Any]) -> dict[str, Any]:
        return {"model_type": "outer", "text_config": part} if nested else part

    layers = sum(end - first for first, end in ranges)
    found = follow(wrapped({"num_hidden_layers": 4} | config), *ranges, layers=4)
    assert found == wrapped({"num_hidden_layers": layers} | expected)


def test_keys_and_values_from_another_layer_than_before_are_noted() -> None:
    own = {"num_hidden_layers": 4, "num_kv_shared_layers": 1}
    config = copy.deepcopy(own)
    taken = [(("a", i),) for i in (0, 1, 3)]
    assert follow_layers(config, "a", {"a": LayeredConfig("a", own, 4)}, taken) == [
        "layer 2 (layer 3 of a) now takes keys and values from layer 1 of a, and had them from layer 2 of its own model"
    ]
    assert config == {"num_hidden_layers": 3, "num_kv_shared_layers": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_kv_shared_layers": 2}, "keys and values of its own after one that takes those of an earlier layer"),
        ({"num_kv_shared_layers": 4, "layer_types": [S, S, S, F], "model_type": "gemma4_text",
          "hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input: 8, so a tensor outside of the layers"),
        ({"model_type": "gemma3n_text"}, "hidden_size_per_layer_input: 256"),
        ({"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "layer_types": [S, F, F, S]},
         "the last layer that the slices take is of kind 'sliding_attention'"),
        ({"use_sliding_window": True, "max_window_layers": 2}, "puts? a layer on this side of max_window_layers after"),
        ({"moe_layer_end_index": 2}, "moe_layer_end_index: the slices put a layer without experts before"),
        ({"cla_share_factor": 2, "use_cla": True}, "take layers in whole groups of 2"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers is -1; expected a number of layers"),
        ({"expert_layer_period": 2}, "has expert_layer_period: 2, a pattern over layers that the slices break"),
        ({"moe_layer_freq": 4}, "take layers in whole groups of 4"),
        ({"first_k_dense_replace": 2}, "puts? a layer without experts after one with experts"),
    ],
)  # fmt: skip
def test_what_no_config_can_describe_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        follow({"num_hidden_layers": 4} | config, (0, 4), (1, 4), layers=4)


def test_a_layer_whose_keys_and_values_are_left_out_is_refused() -> None:
    config = {"num_hidden_layers": 4, "num_kv_shared_layers": 1, "layer_types": [S, F, S, F]}
    with pytest.raises(RecipeError, match="layer 3 of a takes keys and values from layer 1, and the slices take no"):
        follow(config, (0, 1), (2, 4), layers=4)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; expected a whole number from 1 on"),
    ({"decoder_sparse_step": None}, "decoder_sparse_step is null; expected a whole number from 1 on"),
    ({"mlp_only_layers": 1}, "mlp_only_layers is 1; expected a list of numbers of layers"),
    ({"first_k_dense_replace": "3"}, "first_k_dense_replace is '3'; expected a number of layers"),
    ({"attention_types": [1]}, r"attention_types is \[1\]; expected a list of pairs"),
    ({"attention_types": None}, "attention_types is null; expected a list of pairs"),
    ({"attention_types": [[["global"], 10**15]]}, "attention_types is .*; expected a list of pairs"),
]


@pytest.mark.parametrize(("config", "message"), WRONG)
def test_a_setting_of_another_model_that_no_loader_takes_is_named(config: dict[str, Any], message: str) -> None:
    own = {
        "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [0], "first_k_dense_replace": 1,
        "attention_types": [[["global", "local"], 2]],
    }  # fmt: skip
    with pytest.raises(RecipeError, match=f"config.json of b: {message}"):
        follow(own, (0, 2), (1, 4), layers=4, other=own | config)


def test_a_window_without_a_first_layer_leaves_the_kinds_of_layers_unknown() -> None:
    config = {
        "model_type": "qwen2", "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8,
        "max_window_layers": None,
    }  # fmt: skip
    assert follow(config, (0, 2), (1, 4), layers=4) == config | {"num_hidden_layers": 5}


def test_a_count_of_layers_that_no_model_has_is_passed_over() -> None:
    config = {"num_hidden_layers": 10**15, "layer_types": [S, F]}
    expected = {"num_hidden_layers": 3, "layer_types": [S, F, F]}
    assert follow(config, (0, 2), (1, 2), layers=2) == expected


def test_a_model_without_the_list_is_named() -> None:
    a, b = {"num_hidden_layers": 2, "layer_types": [S, F]}, {"num_hidden_layers": 2}
    with pytest.raises(RecipeError, match="of b has no layer_types with an entry a layer"):
        follow(a, (0, 2), (0, 2), layers=2, other=b)


def test_layers_of_different_kinds_are_noted() -> None:
    models = {
        n: LayeredConfig(n, {"num_hidden_layers": 2, "layer_types": k}, 2) for n, k in (("a", [S, F]), ("b", [F, F]))
    }
    config = copy.deepcopy(models["a"].config)
    notes = follow_layers(config, "a", models, [(("a", 0), ("b", 1)), (("a", 1), ("b", 1))])
    assert config["layer_types"] == [S, F]
    (note,) = notes
    assert note.startswith(
        "layer 0 merges layers of different kinds: layer_types is 'sliding_attention' for layer 0 of a"
    )
    assert note.endswith("and 'full_attention' for layer 1 of b; the output takes a's")
