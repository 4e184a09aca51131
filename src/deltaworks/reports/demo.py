"""The demo: a small real family, registered, analyzed, merged by several methods, and judged on held-out text."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.errors import UserError
from deltaworks.merging.prepare import plan_inputs, prepare_plan
from deltaworks.merging.recipe import parse_recipe
from deltaworks.merging.snapshot import MergeResult, run_plan
from deltaworks.progress import Progress
from deltaworks.reports.loss import load_weights, mean_loss

MERGES = {
    "linear": "weight: 1.0",
    "task_arithmetic": "weight: 0.15",
    "ties": "weight: 1.0, density: 0.5, lambda: 0.35",
    "dare_linear": "weight: 0.2, density: 0.5",
    "dare_ties": "weight: 0.15, density: 0.8",
}
"""The demo's merges: each method with parameters that suit the micro family."""


@dataclass(frozen=True, slots=True)
class DemoRow:
    """A model's losses: its name, its kind (base, expert, merge), nats a token by domain, the merge's own figures."""

    name: str
    kind: str
    losses: dict[str, float]
    merge: MergeResult | None = None

    @property
    def mean(self) -> float:
        """Mean over the domains."""
        return sum(self.losses.values()) / len(self.losses)


def family_folder() -> Path:
    """The micro family that ships with deltaworks, in an installed package or in a checkout.

    Raises:
        UserError: neither is there.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "_micro", package.parents[1] / "examples" / "micro"):
        if (folder / "base").is_dir():
            return folder
    raise UserError("the micro family is missing from this installation; reinstall, or give one with --family")


def family_recipe(folder: Path, experts: list[str], method: str, parameters: str) -> str:
    """The text of a recipe that merges a family's experts, all with the same parameters (flow YAML, without braces)."""
    lines = [f"merge_method: {method}", "dtype: float32", "out_dtype: bfloat16"]
    lines += [] if method == "linear" else [f"base_model: {folder / 'base'}"]
    lines += [f"parameters: {{{parameters}}}", "models:", *(f"  - model: {folder / e}" for e in experts)]
    return "\n".join(lines) + "\n"


def run_demo(
    folder: Path, out: Path | None, windows: int, progress: Progress, each: Callable[[DemoRow], None]
) -> list[DemoRow]:
    """Register, analyze and merge the family in `folder`, and measure every model's loss on every domain.

    Args:
        folder: holds `base`, one folder an expert, and `eval/<domain>.npy` with token ids.
        out: where the merges are kept; nowhere where None.
        windows: windows of 256 tokens to judge by, of each domain.
        progress: told of the work.
        each: called with every row as it is known.
    """
    texts = {p.stem.partition(".")[0]: np.load(p) for p in sorted((folder / "eval").glob("*.npy"))}
    experts = sorted(p.name for p in folder.iterdir() if (p / "config.json").is_file() and p.name != "base")
    if not texts or not experts:
        raise UserError(f"{folder} holds no family: it needs base/, experts beside it, and eval/<domain>.npy")
    rows: list[DemoRow] = []

    def judge(name: str, kind: str, path: Path, merge: MergeResult | None = None) -> None:
        config, weights = load_weights(path)
        losses = {domain: mean_loss(config, weights, tokens, windows) for domain, tokens in texts.items()}
        rows.append(DemoRow(name, kind, losses, merge))
        each(rows[-1])

    with tempfile.TemporaryDirectory(prefix="deltaworks-demo-") as scratch:
        target = out or Path(scratch) / "merges"
        with Catalog(Path(scratch) / "catalog") as catalog:
            base = register(catalog, "base", str(folder / "base"), progress=progress)
            judge("base", "base", base.path)
            for name in experts:
                expert = register(catalog, name, str(folder / name), "base", progress=progress)
                analyze(catalog, expert, base, progress=progress)
                judge(name, "expert", expert.path)
            for method, parameters in MERGES.items():
                recipe = parse_recipe(family_recipe(folder, experts, method, parameters))
                plan = prepare_plan(catalog, recipe, progress=progress)
                models = plan_inputs(catalog, plan)
                result = run_plan(catalog, plan, models, target / method, force=True, progress=progress)
                judge(method, "merge", target / method, result)
    return rows
