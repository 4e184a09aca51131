"""Which checkpoints are quantized, and which only look like it."""

from pathlib import Path
from typing import Any

import pytest
from families import CONFIG

from deltaworks.checkpoints.checkpoint import Checkpoint
from deltaworks.checkpoints.dtypes import DTYPES
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.checkpoints.quantized import check_not_quantized, quantization, without_quantization
from deltaworks.errors import CheckpointError

P = "model.layers.0.self_attn.q_proj"
E = "model.layers.0.mlp.experts"


def model(config: dict[str, Any], **tensors: tuple[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint with plain embeddings beside the given tensors, whose names are written with __ for dots."""
    named: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("BF16", (8, 4))}
    named |= {n.replace("__", "."): t for n, t in tensors.items()}
    infos = {n: TensorInfo(n, DTYPES[d], shape, "f", 0, 0) for n, (d, shape) in named.items()}
    return Checkpoint(Path("m"), (), infos, CONFIG | config, None, is_adapter=False)


def named(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors of one projection by the last part of their names."""
    return {f"{P}.{n}".replace(".", "__"): t for n, t in tensors.items()}


def told(**content: Any) -> dict[str, Any]:
    return {"quantization_config": content}


FP8 = named(weight=("F8_E4M3", (8, 8)))
QUANTIZED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("bitsandbytes, 4 bit", told(quant_method="bitsandbytes", load_in_4bit=True), named(weight=("U8", (32, 1)))),
    ("bitsandbytes, 8 bit", told(quant_method="bitsandbytes", load_in_8bit=True), named(weight=("I8", (8, 8)))),
    ("bitsandbytes, 4 bit", {}, named(weight=("U8", (32, 1)), weight__absmax=("F32", (4,)))),
    ("bitsandbytes, 8 bit", {}, named(weight=("I8", (8, 8)), SCB=("F32", (8,)))),
    ("gptq, 4 bit", told(quant_method="gptq", bits=4), named(qweight=("I32", (1, 8)), g_idx=("I32", (8,)))),
    ("GPTQ", {}, named(qweight=("I32", (1, 8)), qzeros=("I32", (1, 1)), g_idx=("I32", (8,)))),
    ("awq, 4 bit", told(quant_method="awq", bits=4), named(qweight=("I32", (8, 1)), scales=("F16", (1, 8)))),
    ("GPTQ or AWQ", {}, named(qweight=("I32", (8, 1)), qzeros=("I32", (1, 1)), scales=("F16", (1, 8)))),
    ("mxfp4, 4 bit", told(quant_method="mxfp4"), named(weight_blocks=("U8", (2, 8, 1, 16)))),
    ("MXFP4, 4 bit", {}, {f"{E}.gate_up_proj_blocks".replace(".", "__"): ("U8", (2, 8, 1, 16))}),
    ("compressed-tensors", {}, named(weight_packed=("I32", (8, 1)), weight_scale=("BF16", (8, 1)))),
    (
        "compressed-tensors, 4 bit",
        told(quant_method="compressed-tensors", config_groups={"g": {"weights": {"num_bits": 4}}}),
        named(weight_packed=("I32", (8, 1))),
    ),
    ("MLX, 4 bit", {"quantization": {"bits": 4}}, named(weight=("U32", (8, 1)), biases=("F16", (8,)))),
    ("hqq, 4 bit", told(quant_method="hqq", quant_config={"a": {"nbits": 4}}), named(W_q=("U8", (4, 8)))),
    ("HQQ", {}, named(W_q=("U8", (4, 8)), scale=("F16", (8, 1)))),
    ("AQLM", {}, named(codes=("I8", (8, 1, 1)), codebooks=("F16", (1, 256, 1, 8)))),
    ("eetq", told(quant_method="eetq"), named(weight=("I8", (8, 8)))),
    ("EETQ, 8 bit", {}, named(weight=("I8", (8, 8)), weight_scales=("F16", (8,)))),
    ("fp8", {"text_config": told(quant_method="fp8")}, FP8),
    ("fp8", {"a": {"b": told(quant_method="fp8")}}, FP8),
    ("8-bit floats with scales", {}, FP8 | named(weight_scale=("F32", ()))),
    ("8-bit floats with scales", {}, FP8 | named(weight_scale_inv=("F32", (1, 1)))),
    ("8-bit floats with scales", {}, FP8 | named(scale_weight=("F32", ()))),
    ("8-bit floats with scales", {}, FP8 | named(qscale_weight=("BF16", ()))),
    ("8-bit floats with scales", {}, FP8 | named(scale=("F32", (8,)))),
    ("8-bit floats with scales", {}, FP8 | named(weight__scale=("F32", (8,)))),
    ("8-bit floats with scales", {}, FP8 | {f"{P}_scale".replace(".", "__"): ("F32", ())} | named(scales=("F16", ()))),
    *(
        ("8-bit floats with scales", {}, FP8 | named(**{leaf: ("F32", (1,))}))
        for leaf in ("weight_s", "weight_amax", "weight_deq", "weight_dequant", "weight_mult",
                     "weight__step", "step", "s", "deq", "weight_quantizer___amax")
    ),
    ("bitsandbytes, 4 bit", {}, FP8 | named(weight__absmax=("F32", (1,)))),
    ("8-bit floats with scales", {}, FP8 | {f"{P}_amax".replace(".", "__"): ("BF16", (8, 1))}),
    ("8-bit floats with scales", {}, {"x__gate_up_proj": ("F8_E5M2", (2, 8, 8)), "x__gate_up_proj_s": ("F32", (2,))}),
    ("8-bit floats with scales", {}, {"x__in_proj_weight": ("F8_E4M3", (8, 8)), "x__in_proj_s": ("F32", (2,))}),
    ("packed integers, F4", {}, named(weight=("F4", (8, 8)))),
    ("packed integers, U8", {}, {"lm_head__weight": ("U8", (8, 8))}),
    ("packed integers, I32", {}, {"model__norm__weight": ("I32", (8,))}),
    ("packed integers, I64", {}, named(weight=("I64", (8, 1)))),
    ("packed integers, I16", {}, named(trellis=("I16", (8, 1)))),
]  # fmt: skip


@pytest.mark.parametrize(("how", "config", "tensors"), QUANTIZED)
def test_a_quantized_checkpoint_is_named(how: str, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    assert quantization(model(config, **tensors)) == how
    with pytest.raises(CheckpointError) as refused:
        check_not_quantized("a", model(config, **tensors))
    assert str(refused.value) == f"a is quantized ({how}); merge the unquantized model"


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({}, {}),
        (told(quant_method="bitsandbytes", load_in_4bit=True), {}),
        ({"quantization_config": None}, FP8),
        ({"quantization_config": {}}, FP8),
        ({}, FP8),
        ({}, FP8 | named(bias=("F32", (8,))) | {"model__norm__weight": ("F32", (8,))}),
        ({}, {"x__gate_up_proj": ("F8_E5M2", (2, 8, 8)), "x__gate_up_proj_bias": ("F32", (2, 8))}),
        ({}, {"x__gate__weight": ("F8_E5M2", (8, 8)), "x__gate__e_score_correction_bias": ("F32", (8,))}),
        ({}, {"e__weight": ("F8_E5M2", (8, 8)), "e_norm__weight": ("F32", (8,)), "e__norm__weight": ("F32", (8,))}),
        ({}, FP8 | {"logit_scale": ("F32", ())}),
        ({}, {"clip__logit_scale": ("F32", ()), "clip__text_projection": ("F8_E4M3", (8, 8))}),
        ({}, FP8 | {"model__layers__0__layer_scale": ("F32", (8,))}),
        ({}, {"logit_scale": ("F32", ()), "visual__position_ids": ("I64", (1, 8))}),
        ({}, {"embeddings__position_ids": ("I32", (1, 8)), "bn__num_batches_tracked": ("I64", ())}),
        ({}, {"h__0__attn__bias": ("U8", (1, 1, 8, 8)), "h__0__attn__attention__bias": ("BOOL", (1, 1, 8, 8))}),
        ({}, {"swin__relative_position_index": ("I64", (49, 49)), "x__freqs_cis": ("C64", (8, 4))}),
        ({}, {"x__attention_mask": ("U8", (8, 8)), "x__token_counts": ("I64", (8, 2))}),
        ({}, named(weight=("BF16", (8, 8)), k_scale=("F32", ()))),
    ],
)
def test_plain_weights_are_plain(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    assert quantization(model(config, **tensors)) is None
    check_not_quantized("a", model(config, **tensors))


def test_a_configuration_without_its_quantization() -> None:
    config = {"a": 1, "text_config": {"b": [2]} | told(bits=4)} | told(bits=4)
    assert without_quantization(config) == {"a": 1, "text_config": {"b": [2]}}
