"""Small model families for tests, written with the safetensors library as an independent writer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Array = NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
SHARED = Path(__file__).parents[2] / "shared"
MICRO = Path(__file__).parents[1] / "examples" / "micro"

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 131,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def shapes(config: Mapping[str, Any] = CONFIG, *, head: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama; the defaults are odd on purpose."""
    h, inter, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], h)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        result |= {
            p + "input_layernorm.weight": (h,),
            p + "self_attn.q_proj.weight": (q, h),
            p + "self_attn.k_proj.weight": (kv, h),
            p + "self_attn.v_proj.weight": (kv, h),
            p + "self_attn.o_proj.weight": (h, q),
            p + "post_attention_layernorm.weight": (h,),
            p + "mlp.gate_proj.weight": (inter, h),
            p + "mlp.up_proj.weight": (inter, h),
            p + "mlp.down_proj.weight": (h, inter),
        }
    result["model.norm.weight"] = (h,)
    if head:
        result["lm_head.weight"] = (config["vocab_size"], h)
    return result


def random_tensors(seed: int, names: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any] = BF16) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    middle = {n: 1.0 if "norm" in n else 0.0 for n in names}
    return {n: np.asarray(rng.standard_normal(s) * 0.05 + middle[n]).astype(dtype) for n, s in names.items()}


def tuned(seed: int, base: Mapping[str, Array], scale: float = 0.01, dtype: np.dtype[Any] = BF16) -> dict[str, Array]:
    """A fine-tune: the base plus heavy-tailed noise, part of it exactly zero."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, values in base.items():
        delta = rng.standard_normal(values.shape) * np.exp(rng.standard_normal(values.shape)) * scale
        delta[rng.random(values.shape) < 0.1] = 0
        result[name] = (values.astype(np.float64) + delta).astype(dtype)
    return result


def write_model(
    path: Path, tensors: Mapping[str, Array], shards: int = 1, config: Mapping[str, Any] | None = CONFIG
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    groups = [names[i::shards] for i in range(shards)]
    files: dict[str, str] = {}
    for i, group in enumerate(groups, 1):
        file = "model.safetensors" if shards == 1 else f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file({n: np.ascontiguousarray(tensors[n]) for n in group}, path / file, metadata={"format": "pt"})
        files |= dict.fromkeys(group, file)
    if shards > 1:
        size = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text("{}")
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}))
    (path / "generation_config.json").write_text("{}")
    return path


def write_family(root: Path, experts: int = 3, *, shards: int = 2, head: bool = True) -> dict[str, dict[str, Array]]:
    """A base and experts under `root`; returns their tensors by model name."""
    base = random_tensors(0, shapes(head=head))
    models = {"base": base} | {f"expert{i}": tuned(i + 1, base, 0.01 * (i + 1)) for i in range(experts)}
    for name, tensors in models.items():
        config = CONFIG | {"tie_word_embeddings": not head}
        write_model(root / name, tensors, shards, config)
    return models


def read_model(path: Path) -> dict[str, Array]:
    from safetensors import safe_open

    tensors: dict[str, Array] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="np") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  # not a dict
    return tensors


def recipe(
    method: str,
    root: Path,
    experts: Mapping[str, str] | None = None,
    *,
    base: bool = True,
    dtypes: str = "dtype: float32\nout_dtype: bfloat16",
    parameters: str = "",
    listed: tuple[str, ...] = ("expert0", "expert1", "expert2"),
) -> str:
    """A recipe over a family; `experts` gives each listed model its parameters, in flow YAML."""
    lines = [f"merge_method: {method}", dtypes, "models:"]
    for name in listed:
        lines.append(f"  - model: {root / name}")
        if experts and name in experts:
            lines.append(f"    parameters: {{{experts[name]}}}")
    if base:
        lines.append(f"base_model: {root / 'base'}")
    if parameters:
        lines.append(f"parameters: {{{parameters}}}")
    return "\n".join(lines) + "\n"
