#!/usr/bin/env python3
"""Generate a family of any size: a base and experts whose deltas look like those of real fine-tunes.

    python benchmarks/make_family.py FOLDER --preset 0.5b --experts 16      # FOLDER/base, FOLDER/expert_00 ...

Every model is a Llama folder with sharded bf16 safetensors. Real fine-tunes are uneven, and what a merge costs hangs
on it, so an expert's delta varies in size by expert, by depth, by kind of tensor and by row; its elements have heavy
tails; a part of it is common to all experts; some experts leave embeddings or early layers untouched, some are
exactly low-rank, and some move so little that most elements round back to the base.

Each tensor's numbers come from (seed, model, tensor) alone: expert_03 is the same in a family of 4 and of 16.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from deltaworks.checkpoints.dtypes import BF16
from deltaworks.checkpoints.weight_files import INDEX
from deltaworks.checkpoints.writer import OutputTensor, ShardWriter, plan_shards

Array = NDArray[np.float32]
PRESETS = {
    "tiny": {"hidden": 128, "layers": 4, "inter": 352, "heads": 4, "kv": 2, "vocab": 1024},
    "0.1b": {"hidden": 512, "layers": 12, "inter": 2048, "heads": 8, "kv": 4, "vocab": 32000},
    "0.5b": {"hidden": 1024, "layers": 24, "inter": 4864, "heads": 16, "kv": 8, "vocab": 32000},
    "1.5b": {"hidden": 2048, "layers": 24, "inter": 7680, "heads": 32, "kv": 8, "vocab": 32000},
}
SIZE_BY_KIND = {"embed": 0.5, "head": 0.8, "norm": 0.3, "q": 0.8, "k": 0.7, "v": 1.2, "o": 1.1, "gate": 1.0, "up": 1.1}


@dataclass(frozen=True)
class Style:
    """How one expert was tuned: size of its delta relative to a weight, tail, part shared with others, what moved."""

    size: float
    tail: float
    shared: float
    depth: str
    moved: frozenset[str] | None = None  # kinds of tensors; all where None
    rank: int = 0
    frozen_share: float = 0.0  # of the layers, from the first


_LINEAR = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
STYLES = (
    Style(2.0e-2, 0.10, 0.20, "late"),
    Style(3.0e-2, 0.00, 0.00, "flat", frozenset({"q", "v"}), rank=16),
    Style(6.0e-2, 0.15, 0.30, "flat"),
    Style(1.2e-3, 0.20, 0.10, "middle", _LINEAR | {"norm"}),
    Style(2.5e-2, 0.10, 0.20, "middle", _LINEAR | {"norm"}),
    Style(1.5e-2, 0.00, 0.00, "late", _LINEAR, rank=32),
    Style(3.0e-2, 0.12, 0.15, "late", frozen_share=0.5),
    Style(1.2e-2, 0.25, 0.15, "early", frozenset({"gate", "up", "down"})),
)


def generator(*key: object) -> np.random.Generator:
    digest = blake3("/".join(map(str, key)).encode()).digest(16)
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))


def tensors(p: dict[str, int]) -> list[tuple[str, str, int, tuple[int, ...]]]:
    """Name, kind, layer and shape of every tensor."""
    h, kv, inter = p["hidden"], p["hidden"] // p["heads"] * p["kv"], p["inter"]
    found: list[tuple[str, str, int, tuple[int, ...]]] = [("model.embed_tokens.weight", "embed", 0, (p["vocab"], h))]
    for i in range(p["layers"]):
        q = f"model.layers.{i}."
        found += [
            (q + "input_layernorm.weight", "norm", i, (h,)),
            (q + "mlp.down_proj.weight", "down", i, (h, inter)),
            (q + "mlp.gate_proj.weight", "gate", i, (inter, h)),
            (q + "mlp.up_proj.weight", "up", i, (inter, h)),
            (q + "post_attention_layernorm.weight", "norm", i, (h,)),
            (q + "self_attn.k_proj.weight", "k", i, (kv, h)),
            (q + "self_attn.o_proj.weight", "o", i, (h, h)),
            (q + "self_attn.q_proj.weight", "q", i, (h, h)),
            (q + "self_attn.v_proj.weight", "v", i, (kv, h)),
        ]
    last = p["layers"] - 1
    return [*found, ("model.norm.weight", "norm", last, (h,)), ("lm_head.weight", "head", last, (p["vocab"], h))]


def base_values(seed: int, name: str, kind: str, shape: tuple[int, ...]) -> Array:
    rng = generator(seed, "base", name)
    values = rng.standard_normal(shape, np.float32)
    if kind == "norm":
        return 1 + np.float32(0.05) * values
    scaled: Array = values * np.exp(0.25 * rng.standard_normal((shape[0], 1), np.float32)) * np.float32(0.02)
    return scaled


def depth_factor(profile: str, x: float) -> float:
    return {
        "flat": 1.0,
        "late": 0.25 + 1.5 * x * x,
        "early": 1.6 - 1.35 * x,
        "middle": 0.3 + 1.4 * float(np.exp(-(((x - 0.55) / 0.22) ** 2))),
    }[profile]


def delta_values(
    seed: int, expert: int, name: str, kind: str, layer: int, shape: tuple[int, ...], layers: int
) -> Array | None:
    """The delta of one tensor; None where the expert did not move it."""
    style = STYLES[expert % len(STYLES)]
    if (style.moved is not None and kind not in style.moved) or layer < style.frozen_share * layers:
        return None
    rng = generator(seed, "expert", expert, name)
    later = (1.0, 0.45, 1.8, 0.7)[expert // len(STYLES) % 4]
    size = style.size * later * SIZE_BY_KIND.get(kind, 1.25) * depth_factor(style.depth, layer / max(1, layers - 1))
    size *= float(np.exp(0.35 * rng.standard_normal())) * (0.05 if kind == "norm" else 0.02)
    z: Array
    if style.rank and len(shape) == 2:
        a = rng.standard_normal((style.rank, shape[1]), np.float32)
        b = rng.standard_normal((shape[0], style.rank), np.float32) / np.float32(np.sqrt(style.rank))
        return (b @ a * np.float32(size)).astype(np.float32)
    z = rng.standard_normal(shape, np.float32)
    if style.shared:
        common = generator(seed, "common", name).standard_normal(shape, np.float32)
        z = np.float32(np.sqrt(1 - style.shared)) * z + np.float32(np.sqrt(style.shared)) * common
    if style.tail:
        z *= np.exp(np.minimum(z * z, 36) * np.float32(style.tail / 2))
    if len(shape) == 2:
        rows = np.exp(0.4 * rng.standard_normal((shape[0], 1), np.float32))
        if kind in ("embed", "head"):  # frequent tokens come first and move most; the rarest do not move
            place = np.arange(shape[0], dtype=np.float32)[:, None] / shape[0]
            rows *= np.exp(-4 * place) * (place < 0.9)
        z *= rows
    return (z * np.float32(size)).astype(np.float32)


def write_model(folder: Path, preset: str, seed: int, expert: int | None, shard_bytes: int) -> float:
    """Write one model; returns the norm of its delta relative to the base."""
    p = PRESETS[preset]
    table = {t[0]: t for t in tensors(p)}
    layouts = plan_shards((OutputTensor(n, BF16, s) for n, _, _, s in table.values()), shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    moved = total = 0.0
    for layout in layouts:
        writer = ShardWriter(folder / layout.name, layout)
        for tensor in layout.tensors:
            name, kind, layer, shape = table[tensor.name]
            values = base_values(seed, name, kind, shape).astype(ml_dtypes.bfloat16)
            if expert is not None:
                delta = delta_values(seed, expert, name, kind, layer, shape, p["layers"])
                if delta is not None:
                    total += float(np.square(values.astype(np.float32)).sum())
                    moved += float(np.square(delta).sum())
                    values = (values.astype(np.float32) + delta).astype(ml_dtypes.bfloat16)
            writer.write(name, 0, np.ascontiguousarray(values).view(np.uint8).reshape(-1))
        writer.finish()
    if len(layouts) > 1:
        size = sum(t.nbytes for layout in layouts for t in layout.tensors)
        weight_map = {t.name: layout.name for layout in layouts for t in layout.tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(folder / "config.json", config(p))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    return float(np.sqrt(moved / total)) if total else 0.0


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def config(p: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": p["hidden"],
        "intermediate_size": p["inter"],
        "num_hidden_layers": p["layers"],
        "num_attention_heads": p["heads"],
        "num_key_value_heads": p["kv"],
        "head_dim": p["hidden"] // p["heads"],
        "vocab_size": p["vocab"],
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="0.5b")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-mb", type=float, default=400)
    args = parser.parse_args()
    started = time.monotonic()
    names = {"base": None} | {f"expert_{i:02d}": i for i in range(args.experts)}
    todo = {n: i for n, i in names.items() if not (args.folder / n / "generation_config.json").exists()}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            name: pool.submit(write_model, args.folder / name, args.preset, args.seed, i, int(args.shard_mb * 1e6))
            for name, i in todo.items()
        }
        for name, job in jobs.items():
            print(
                f"{name}: delta norm {job.result():.2%} of what it moved, {time.monotonic() - started:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
