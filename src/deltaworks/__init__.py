"""deltaworks: merge families of fine-tuned models, and place LoRA adapters.

>>> with Catalog() as catalog:                                       # doctest: +SKIP
...     plan = prepare_plan(catalog, load_recipe(Path("recipe.yml")))
...     result = run_plan(catalog, plan, plan_inputs(catalog, plan), Path("merged"))
>>> profile = find_profile("llama-3.1-8b-h100-64gb")                 # doctest: +SKIP
>>> answer = simulate(read_workload(Path("workload.yaml")), profile, Configuration(slots=32))    # doctest: +SKIP
>>> judge = Judge(Demand(read_workload(Path("workload.yaml"))), [profile], [find_surrogate(profile)])   # doctest: +SKIP
>>> gpus = place(judge).gpus                                         # doctest: +SKIP

Everything that goes wrong on purpose is a `DeltaworksError`; `deltaworks.errors` lists the kinds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaworks.catalog.analyze import analyze as analyze
    from deltaworks.catalog.register import register as register
    from deltaworks.catalog.store import Catalog as Catalog
    from deltaworks.errors import DeltaworksError as DeltaworksError
    from deltaworks.errors import UserError as UserError
    from deltaworks.merging.budget import Budget as Budget
    from deltaworks.merging.budget import parse_budget as parse_budget
    from deltaworks.merging.measured_error import measure_error as measure_error
    from deltaworks.merging.plan import Plan as Plan
    from deltaworks.merging.plan import load_plan as load_plan
    from deltaworks.merging.plan import save_plan as save_plan
    from deltaworks.merging.prepare import MergeOptions as MergeOptions
    from deltaworks.merging.prepare import plan_inputs as plan_inputs
    from deltaworks.merging.prepare import prepare_plan as prepare_plan
    from deltaworks.merging.recipe import load_recipe as load_recipe
    from deltaworks.merging.recipe import parse_recipe as parse_recipe
    from deltaworks.merging.snapshot import MergeResult as MergeResult
    from deltaworks.merging.snapshot import run_plan as run_plan
    from deltaworks.merging.snapshot import verify as verify
    from deltaworks.serving.document import describe as describe
    from deltaworks.serving.judge import Demand as Demand
    from deltaworks.serving.judge import Judge as Judge
    from deltaworks.serving.placement import Placement as Placement
    from deltaworks.serving.placement import place as place
    from deltaworks.serving.profile import Profile as Profile
    from deltaworks.serving.profile import find_profile as find_profile
    from deltaworks.serving.simulate import Configuration as Configuration
    from deltaworks.serving.simulate import simulate as simulate
    from deltaworks.serving.surrogate import find_surrogate as find_surrogate
    from deltaworks.serving.workload import parse_workload as parse_workload
    from deltaworks.serving.workload import read_workload as read_workload

_HOMES = {
    "Budget": "merging.budget",
    "Catalog": "catalog.store",
    "Configuration": "serving.simulate",
    "DeltaworksError": "errors",
    "Demand": "serving.judge",
    "Judge": "serving.judge",
    "MergeOptions": "merging.prepare",
    "MergeResult": "merging.snapshot",
    "Placement": "serving.placement",
    "Plan": "merging.plan",
    "Profile": "serving.profile",
    "UserError": "errors",
    "analyze": "catalog.analyze",
    "describe": "serving.document",
    "find_profile": "serving.profile",
    "find_surrogate": "serving.surrogate",
    "load_plan": "merging.plan",
    "load_recipe": "merging.recipe",
    "measure_error": "merging.measured_error",
    "parse_budget": "merging.budget",
    "parse_recipe": "merging.recipe",
    "parse_workload": "serving.workload",
    "place": "serving.placement",
    "plan_inputs": "merging.prepare",
    "prepare_plan": "merging.prepare",
    "read_workload": "serving.workload",
    "register": "catalog.register",
    "run_plan": "merging.snapshot",
    "save_plan": "merging.plan",
    "simulate": "serving.simulate",
    "verify": "merging.snapshot",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605  # a list, as it must be


def __getattr__(name: str) -> Any:
    """Import on first use, so that `deltaworks --help` need not wait for Numba."""
    if name not in _HOMES:
        raise AttributeError(f"module 'deltaworks' has no attribute {name!r}")
    return getattr(import_module(f"deltaworks.{_HOMES[name]}"), name)
