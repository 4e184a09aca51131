"""Sweeps: a grid of variations of one recipe, planned over the same statistics."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from deltaworks.catalog.store import Catalog
from deltaworks.documents import parse_yaml
from deltaworks.errors import RecipeError, UserError, quoted
from deltaworks.merging.budget import Budget, parse_budget
from deltaworks.merging.plan import Plan, keep_plan
from deltaworks.merging.prepare import MergeOptions, Prepared
from deltaworks.merging.recipe import Recipe, parse_recipe
from deltaworks.progress import Progress

BUDGET = "budget"


@dataclass(frozen=True, slots=True)
class Variation:
    """One point of a grid: what was set, the recipe it gives, its plan, and the seconds that planning took."""

    settings: dict[str, Any]
    recipe: Recipe
    plan: Plan
    plan_s: float


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """An axis of a grid, written ``NAME=VALUE,VALUE`` or ``MODEL:NAME=VALUE,VALUE``.

    Raises:
        UserError: it is not.
    """
    name, equals, values = text.partition("=")
    parsed = [parse_yaml(v, quoted(text), "an axis of a grid", UserError) for v in values.split(",") if v.strip()]
    if not equals or not name.strip() or not parsed:
        raise UserError(
            f"{quoted(text)} is not an axis of a grid; write it like density=0.1,0.2 or expert:weight=0.5,1"
        )
    return name.strip(), parsed


def vary(text: str, settings: dict[str, Any]) -> str:
    """The recipe `text` with parameters set: ``NAME`` for all models, ``MODEL:NAME`` for one.

    A parameter set for all replaces what the recipe says of it for single models and slices. A model is meant by its
    reference in the recipe or by the last part of that.

    Raises:
        RecipeError: the recipe has no such model.
    """
    content = parse_yaml(text, "the recipe", "a recipe", RecipeError, finite=False)
    for name, value in settings.items():
        model, colon, parameter = name.rpartition(":")
        entries = list(_entries(content))
        if colon:
            chosen = [e for e in entries if _is(e, model)]
            if not chosen:
                raise RecipeError(f"{name}: the recipe has no model {model!r}")
            for entry in chosen:
                entry["parameters"] = {**(entry.get("parameters") or {}), parameter: value}
            continue
        for entry in (*entries, *(content.get("slices") or ())):
            if isinstance(entry.get("parameters"), dict):
                entry["parameters"].pop(parameter, None)
        content["parameters"] = {**(content.get("parameters") or {}), parameter: value}
    return yaml.safe_dump(content, sort_keys=False)


def _entries(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from content.get("models") or ()
    for part in content.get("slices") or ():
        yield from part["sources"]


def _is(entry: dict[str, Any], model: str) -> bool:
    reference = str(entry["model"])
    return model in (reference, Path(reference).name)


def sweep(
    catalog: Catalog,
    text: str,
    axes: Sequence[tuple[str, Sequence[Any]]],
    budgets: Sequence[str],
    options: MergeOptions,
    *,
    relative_to: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[Variation]:
    """Plan every point of the grid `axes` x `budgets` of the recipe `text`.

    Statistics are read once, for all.

    Args:
        catalog: as for `prepare_plan`.
        text: the recipe.
        axes: parameters with the values each takes.
        budgets: as `parse_budget` reads them; the recipe's own, or none, where there are none.
        options: how to merge.
        relative_to: a second folder in which paths are looked up.
        progress: told of the work.

    Raises:
        RecipeError, UserError: as `vary`, `parse_recipe` and `prepare_plan`.
    """
    parse_recipe(text)  # so that only a recipe is varied
    points = [dict(zip([n for n, _ in axes], values, strict=True)) for values in product(*(v for _, v in axes))]
    recipes = [parse_recipe(vary(text, point) if point else text) for point in points]
    own = options.budget or (parse_budget(recipes[0].budget) if recipes[0].budget is not None else None)
    allowed: list[tuple[str | None, Budget | None]] = [(b, parse_budget(b)) for b in budgets] or [(None, own)]
    weighs = any(b is not None for _, b in allowed)
    prepared = Prepared(catalog, recipes[0], options, relative_to=relative_to, progress=progress, weighs=weighs)
    for point, recipe in zip(points, recipes, strict=True):
        full = None
        for label, budget in allowed:
            started = time.perf_counter()
            full = full or prepared.plan(recipe, None)
            plan = full if budget is None else prepared.within(full, budget)
            seconds = time.perf_counter() - started
            keep_plan(catalog, plan)
            settings = point | ({} if label is None else {BUDGET: label})
            yield Variation(settings, recipe, plan, seconds)
