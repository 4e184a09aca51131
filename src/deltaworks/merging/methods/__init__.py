"""How numbers combine: one file a family of methods, and this table of what a recipe may call."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from deltaworks.merging.methods.copying import Copy
from deltaworks.merging.methods.delta import DeltaSum
from deltaworks.merging.methods.operation import Operation
from deltaworks.merging.methods.sce import SelectedSum
from deltaworks.merging.methods.spherical import Slerp
from deltaworks.merging.methods.weighted import WeightedSum

REQUIRED = object()
"""Default of a parameter that has none."""


class Scope(StrEnum):
    """Whom a parameter belongs to."""

    SHARED = "shared"
    EVERY_MODEL = "every model"
    EXPERTS = "experts"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a merge method: its name in recipes, scope, type (float or bool) and default."""

    name: str
    scope: Scope
    type: type
    default: Any = REQUIRED


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method as recipes see it.

    Attributes:
        name: its name in recipes.
        parameters: what it understands, with mergekit's defaults.
        needs_base: whether one of the inputs must be the base model.
        min_inputs, max_inputs: how many models, base included; no maximum where None.
    """

    name: str
    parameters: tuple[Parameter, ...]
    needs_base: bool = True
    min_inputs: int = 1
    max_inputs: int | None = None


# Asks mergekit to keep its masks in 8 bits; ours never exist as tensors, so it changes nothing here.
_INT8_MASK = Parameter("int8_mask", Scope.SHARED, bool, default=False)


def _delta_parameters(*, normalize: bool, rescale: bool) -> tuple[Parameter, ...]:
    return (
        Parameter("weight", Scope.EXPERTS, float),
        Parameter("density", Scope.EXPERTS, float, 1.0),
        Parameter("normalize", Scope.SHARED, bool, normalize),
        Parameter("rescale", Scope.SHARED, bool, rescale),
        Parameter("lambda", Scope.SHARED, float, 1.0),
        _INT8_MASK,
    )


_GAMMA = Parameter("gamma", Scope.EXPERTS, float, 0.01)
_EPSILON = Parameter("epsilon", Scope.EXPERTS, float, 0.15)

METHODS = {
    m.name: m
    for m in (
        Method(
            "linear",
            (
                Parameter("weight", Scope.EVERY_MODEL, float),
                Parameter("normalize", Scope.SHARED, bool, default=True),
            ),
            needs_base=False,
        ),
        Method("task_arithmetic", _delta_parameters(normalize=False, rescale=False)),
        Method("ties", _delta_parameters(normalize=True, rescale=False)),
        Method("dare_linear", _delta_parameters(normalize=False, rescale=True)),
        Method("dare_ties", _delta_parameters(normalize=False, rescale=True)),
        Method("della", (*_delta_parameters(normalize=True, rescale=True), _EPSILON)),
        Method("della_linear", (*_delta_parameters(normalize=False, rescale=True), _EPSILON)),
        Method("breadcrumbs", (*_delta_parameters(normalize=False, rescale=False), _GAMMA)),
        Method("breadcrumbs_ties", (*_delta_parameters(normalize=False, rescale=False), _GAMMA)),
        Method(
            "sce",
            (
                Parameter("select_topk", Scope.SHARED, float, 1.0),
                _INT8_MASK,
            ),
        ),
        Method("slerp", (Parameter("t", Scope.SHARED, float),), min_inputs=2, max_inputs=2),
        Method(
            "passthrough",
            (Parameter("scale", Scope.EVERY_MODEL, float, None),),
            needs_base=False,
            max_inputs=1,
        ),
    )
}

OPERATIONS: dict[str, type[Operation]] = {o.kind: o for o in (Copy, WeightedSum, Slerp, DeltaSum, SelectedSum)}
"""Operations by the name under which plans store them."""
