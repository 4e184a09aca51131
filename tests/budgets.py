"""A family whose experts are worth weighing, and plans for it."""

from pathlib import Path
from typing import Any

import numpy as np
from families import BF16, Array, random_tensors, tuned, write_model

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.models import Model
from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.merging.plan import Plan
from deltaworks.merging.prepare import MergeOptions, Prepared
from deltaworks.merging.recipe import parse_recipe

SHAPES = {
    "model.embed_tokens.weight": (150, 300),
    "model.layers.0.w.weight": (9, 4111),
    "model.layers.1.w.weight": (64, 128),
    "model.norm.weight": (300,),
}


def tensors_of(dtype: Any = BF16, experts: int = 3) -> dict[str, dict[str, Array]]:
    """A base, experts of it with deltas of different size, and blocks that never changed."""
    base = random_tensors(0, SHAPES, np.dtype(dtype))
    base["model.norm.weight"][:40] = 0
    models = {"base": base}
    for i in range(experts):
        expert = tuned(i + 1, base, 0.004 * (i + 1), np.dtype(dtype))
        flat = expert["model.embed_tokens.weight"].reshape(-1)
        flat[4096 * i : 4096 * (i + 4)] = base["model.embed_tokens.weight"].reshape(-1)[4096 * i : 4096 * (i + 4)]
        # Only the sign of zero differs: no delta, and yet other bits.
        expert["model.norm.weight"][:] = base["model.norm.weight"]
        expert["model.norm.weight"][:20] = -0.0
        models[f"expert{i}"] = expert
    return models


def write_family(root: Path, dtype: Any = BF16, experts: int = 3) -> Path:
    for i, (name, tensors) in enumerate(tensors_of(dtype, experts).items()):
        write_model(root / name, tensors, 1 + i % 3)
    return root


def enter(catalog: Catalog, root: Path, *, block_size: int = 4096) -> list[Model]:
    base = register(catalog, "base", str(root / "base"))
    experts = [register(catalog, p.name, str(p), "base") for p in sorted(root.glob("expert*"))]
    for expert in experts:
        analyze(catalog, expert, base, block_size=block_size)
    return [base, *experts]


def prepared(catalog: Catalog, text: str, **options: Any) -> tuple[Prepared, Plan]:
    parsed = parse_recipe(text)
    found = Prepared(catalog, parsed, MergeOptions(**options), weighs=True)
    return found, found.plan(parsed, None)


def weights(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.glob("*.safetensors")}
