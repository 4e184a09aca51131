import pytest

from deltaworks.checkpoints.comparison import Named, explain_difference, shapes_differ
from deltaworks.checkpoints.dtypes import DTYPES
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.checkpoints.tensor_names import is_recomputed


def info(name: str, shape: tuple[int, ...] = (4, 4), dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name, DTYPES[dtype], shape, "model.safetensors", 0, 0)


def named(model: str, *names: str) -> Named:
    return Named(model, {n: info(n) for n in names})


LLAMA = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
THREE = (*LLAMA, "model.layers.2.mlp.up_proj.weight")
HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (LLAMA, LLAMA),
        (LLAMA, (*LLAMA, HEAD)),
        (LLAMA, (*LLAMA, "model.layers.0.self_attn.rotary_emb.inv_freq")),
        ((*LLAMA, "visual.rotary_pos_emb.inv_freq"), (*LLAMA, "embeddings.position_ids")),
    ],
)
def test_no_difference(a: tuple[str, ...], b: tuple[str, ...]) -> None:
    assert explain_difference(named("a", *a), named("b", *b)) is None
    assert explain_difference(named("b", *b), named("a", *a)) is None


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (LLAMA, THREE, "b has 1 tensor that a lacks, first model.layers.2.mlp.up_proj.weight; take the layers that"),
        (LLAMA, (*LLAMA, "x.bias", "y.bias"), "b has 2 tensors that a lacks, first x.bias; only models"),
        (
            (*LLAMA, "x"),
            (*LLAMA, "y"),
            "a has 1 tensor that b lacks, first x, and b has 1 tensor that a lacks, first y",
        ),
        (LLAMA, [f"language_model.{n}" for n in LLAMA], "b has the same tensors as a under 'language_model.'; rename"),
        (LLAMA, [f"_orig_mod.{n}" for n in LLAMA], "b has the same tensors as a under '_orig_mod.'"),
        (LLAMA, [f"any.{n}" for n in LLAMA], "b has the same tensors as a under 'any.'"),
        (LLAMA, [n.removeprefix("model.") for n in LLAMA], "a has the same tensors as b under 'model.'"),
        ((*LLAMA, HEAD), [*(f"m.{n}" for n in LLAMA), HEAD], "b has the same tensors as a under 'm.'"),
        (LLAMA, [*(f"m.{n}" for n in LLAMA), "vision.w"], "b has the same tensors as a under 'm.', beside 1 others"),
        ([f"transformer.{n}" for n in ("h.0.w", "wte.weight")], ("h.0.w", "wte.weight"), "under 'transformer.'"),
        (
            ["language_model.model.layers.0.w", "vision_tower.v", "language_model.lm_head.weight"],
            ["model.language_model.layers.0.w", "model.vision_tower.v", HEAD],
            r"same tensors as . under other names \((language_model.model|model.language_model).layers.0.w is",
        ),
        (
            ["model.layers.0.mlp.experts.0.up_proj.weight"],
            ["model.layers.0.mlp.experts.gate_up_proj"],
            "b holds the experts of a layer in one tensor, and a holds each by itself",
        ),
        (
            (*LLAMA, HEAD),
            (*LLAMA, "language_model.lm_head.weight"),
            "a has 1 tensor that b lacks, first lm_head.weight",
        ),
    ],
)
def test_a_difference_is_explained_in_either_order(a: tuple[str, ...], b: tuple[str, ...], message: str) -> None:
    import re

    first, second = named("a", *a), named("b", *b)
    there, back = explain_difference(first, second), explain_difference(second, first)
    assert there is not None
    assert back is not None
    assert re.search(message if "\\" in message else re.escape(message), there)
    assert sorted(re.findall(r"has \d+ tensors?|under '[^']*'", there)) == sorted(
        re.findall(r"has \d+ tensors?|under '[^']*'", back)
    )


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), True),
        ("model.rotary_emb.original_inv_freq", (4,), True),
        ("transformer.rotary_pos_emb.inv_freq", (4,), True),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", (1, 1, 8, 4), True),
        ("transformer.h.0.attn.bias", (1, 1, 8, 8), True),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 8, 8), True),
        ("transformer.h.0.attn.attention.bias", (1, 1, 8, 8), True),
        ("transformer.h.0.attn.masked_bias", (), True),
        ("bert.embeddings.position_ids", (1, 512), True),
        ("layers.0.attn.bias", (32,), False),
        ("transformer.h.0.attn.c_attn.bias", (1, 1, 8, 8), False),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (8,), False),
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), False),
    ],
)
def test_buffers_that_loaders_compute(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_recomputed(info(name, shape)) is expected


@pytest.mark.parametrize(
    ("tensor", "a", "b", "hint"),
    [
        ("model.embed_tokens.weight", (64, 32), (66, 32), True),
        ("lm_head.weight", (64, 32), (66, 32), True),
        ("model.embed_tokens.weight", (64, 32), (64, 16), False),
        ("model.layers.0.mlp.up_proj.weight", (64, 32), (66, 32), False),
    ],
)
def test_only_more_tokens_are_a_matter_of_vocabularies(
    tensor: str, a: tuple[int, ...], b: tuple[int, ...], hint: bool
) -> None:
    assert ("align their vocabularies" in shapes_differ(tensor, ("a", a), ("b", b))) is hint
