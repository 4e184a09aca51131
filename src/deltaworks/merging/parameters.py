"""Parameters of a recipe: scalars, gradients over the layers, and choices by tensor name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deltaworks.errors import RecipeError, quoted
from deltaworks.merging.methods import REQUIRED, Parameter

Settings = Mapping[str, "Setting"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a recipe says of one parameter: choices, the first of which whose filter fits a tensor applies.

    Attributes:
        choices: (filter, values); a filter of None fits every tensor, another fits names that contain it; one value
            is a constant, more are a gradient from the first layer to the last.
    """

    choices: tuple[tuple[str | None, tuple[float | bool, ...]], ...]

    def at(self, tensor: str, position: float) -> float | bool | None:
        """The value for a tensor at `position` (0 first layer, 1 last layer); None where no filter fits.

        Gradients interpolate linearly; switches take the value at or before the position.
        """
        for pattern, values in self.choices:
            if pattern is not None and pattern not in tensor:
                continue
            if len(values) == 1:
                return values[0]
            place = position * (len(values) - 1)
            lower = int(place)
            upper = min(len(values) - 1, lower + 1)
            if isinstance(values[0], bool):
                return values[lower]
            return (1 - (place - lower)) * values[lower] + (place - lower) * values[upper]
        return None


def parse_setting(raw: Any, kind: type, where: str) -> Setting:
    """Read a parameter's value: a scalar, a list of scalars, or one or several ``{filter, value}``.

    Args:
        raw: what YAML gave.
        kind: float or bool.
        where: its place in the recipe, for messages.

    Raises:
        RecipeError: it is not one of these.
    """
    if isinstance(raw, dict) or (isinstance(raw, list) and any(isinstance(x, dict) for x in raw)):
        return Setting(tuple(_choice(x, kind, where) for x in (raw if isinstance(raw, list) else [raw])))
    return Setting(((None, _values(raw, kind, where)),))


def _choice(raw: Any, kind: type, where: str) -> tuple[str | None, tuple[float | bool, ...]]:
    if not isinstance(raw, dict) or "value" not in raw or not raw.keys() <= {"filter", "value"}:
        raise RecipeError(
            f"{where}: a choice by tensor name is written {{filter: NAME, value: VALUE}}, not {quoted(raw)}"
        )
    pattern = raw.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        raise RecipeError(f"{where}: a filter is a part of a tensor's name, not {quoted(pattern)}")
    return None if pattern in (None, "*") else pattern, _values(raw["value"], kind, where)


def _values(raw: Any, kind: type, where: str) -> tuple[float | bool, ...]:
    items = raw if isinstance(raw, list) else [raw]
    if not items:
        raise RecipeError(f"{where}: an empty list has no value")
    return tuple(_scalar(x, kind, where) for x in items)


def _scalar(raw: Any, kind: type, where: str) -> float | bool:
    if kind is bool:
        if isinstance(raw, bool) or raw in (0, 1):
            return bool(raw)
        raise RecipeError(f"{where}: expected true or false, not {quoted(raw)}")
    try:
        if not isinstance(raw, bool):
            value = float(raw)  # YAML reads 1e-3 as text
            if value == value and abs(value) != float("inf"):  # noqa: PLR0124  # NaN differs from itself
                return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise RecipeError(f"{where}: expected a number, not {quoted(raw)}")


def resolve(parameter: Parameter, sources: Iterable[Settings], tensor: str, position: float, model: str = "") -> Any:
    """The value of `parameter` for one tensor: the first source that has one for it, else the default.

    Raises:
        RecipeError: no source has a value and there is no default.
    """
    for settings in sources:
        setting = settings.get(parameter.name)
        value = None if setting is None else setting.at(tensor, position)
        if value is not None:
            return value
    if parameter.default is REQUIRED:
        of = f" of {model}" if model else ""
        raise RecipeError(
            f"no value for the parameter {parameter.name!r}{of} at tensor {tensor!r};"
            " set it for the model or under parameters"
        )
    return parameter.default
