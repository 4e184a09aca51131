"""A merge plan: everything execution needs to know, as frozen data that a person can read and a file can hold."""

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from deltaworks.checkpoints.dtypes import DTYPES, DType
from deltaworks.errors import PlanError
from deltaworks.merging.methods import OPERATIONS
from deltaworks.merging.methods.operation import Operation

SCHEMA_VERSION = 1


class PlannedModel(NamedTuple):
    """An input of a plan: what the recipe calls it, its name in the catalog, its role, its identity, its size."""

    reference: str
    name: str
    role: str
    fingerprint: str
    nbytes: int


class InputTensor(NamedTuple):
    """A tensor to read: the model's place in the plan, and the tensor's name there."""

    model: int
    tensor: str


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One output tensor: its name, type and shape, what it is made from, and how."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    inputs: tuple[InputTensor, ...]
    operation: Operation

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Plan:
    """A merge plan.

    Attributes:
        method: name of the merge method.
        models: what is read; the base model, if any, has the role ``base``.
        tensors: what is written, in the order of the output.
        config: `config.json` of the output.
        tokenizer: the model whose tokenizer and generation settings the output gets, by its place in `models`.
        chat_template: a template to install, or None to keep the tokenizer's.
        shard_bytes: largest amount of data in one output file.
        seed: what random methods start from.
        recipe: the recipe as it was written.
        expert_bytes: what all the experts hold, headers included.
        expert_bytes_planned: what execution will read of them to produce the output once.
        budget_bytes: the most that may be read from experts; None for no budget.
        predicted_error: expected relative L2 error of the merged delta against the full merge.
    """

    method: str
    models: tuple[PlannedModel, ...]
    tensors: tuple[PlannedTensor, ...]
    config: dict[str, Any]
    tokenizer: int
    chat_template: str | None
    shard_bytes: int
    seed: int
    recipe: str
    expert_bytes: int
    expert_bytes_planned: int
    budget_bytes: int | None = None
    predicted_error: float = 0.0
    _digest: list[str] = field(default_factory=list, init=False, compare=False, repr=False)

    @property
    def digest(self) -> str:
        """BLAKE3 of the plan's content; two plans with the same digest write the same bytes."""
        if not self._digest:
            self._digest.append(blake3(_canonical(self._content())).hexdigest())
        return self._digest[0]

    def to_json(self) -> dict[str, Any]:
        """The plan as a file holds it."""
        return {"deltaworks_plan": SCHEMA_VERSION, "digest": self.digest, **self._content()}

    def _content(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "seed": self.seed,
            "budget_bytes": self.budget_bytes,
            "expert_bytes": self.expert_bytes,
            "expert_bytes_planned": self.expert_bytes_planned,
            "predicted_error": self.predicted_error,
            "models": [m._asdict() for m in self.models],
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            "shard_bytes": self.shard_bytes,
            "config": self.config,
            "recipe": self.recipe,
            "tensors": [
                {
                    "name": t.name,
                    "dtype": t.dtype.name,
                    "shape": list(t.shape),
                    "inputs": [list(i) for i in t.inputs],
                    "operation": t.operation.kind,
                    **t.operation.to_json(),
                }
                for t in self.tensors
            ],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Plan":
        """The inverse of `to_json`.

        Raises:
            PlanError: the content is no plan, of another version, or was edited.
        """
        if content.get("deltaworks_plan") != SCHEMA_VERSION:
            version = content.get("deltaworks_plan")
            raise PlanError(
                "this is not a deltaworks plan"
                if version is None
                else f"the plan has schema {version}, this deltaworks reads {SCHEMA_VERSION}; make it again"
            )
        try:
            plan = cls(
                method=content["method"],
                models=tuple(PlannedModel(**m) for m in content["models"]),
                tensors=tuple(
                    PlannedTensor(
                        t["name"],
                        DTYPES[t["dtype"]],
                        tuple(t["shape"]),
                        tuple(InputTensor(*i) for i in t["inputs"]),
                        OPERATIONS[t["operation"]].from_json(t),
                    )
                    for t in content["tensors"]
                ),
                **{
                    key: content[key]
                    for key in (
                        "config",
                        "tokenizer",
                        "chat_template",
                        "shard_bytes",
                        "seed",
                        "recipe",
                        "expert_bytes",
                        "expert_bytes_planned",
                        "budget_bytes",
                        "predicted_error",
                    )
                },
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"the plan is malformed ({type(error).__name__}: {error}); make it again") from error
        if plan.digest != content.get("digest"):
            raise PlanError(
                "the plan was edited: its digest does not match its content; make it again with `deltaworks plan`"
            )
        return plan


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def load_plan(path: Path) -> Plan:
    """Read the plan in the file at `path`.

    Raises:
        PlanError: there is no such file, or it is no plan of this version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error
    except ValueError as error:
        raise PlanError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise PlanError(f"{path} is not a deltaworks plan")
    return Plan.from_json(content)


def save_plan(plan: Plan, path: Path) -> None:
    """Write `plan` to a file: one line a tensor, so that plans can be compared line by line."""
    content = plan.to_json()
    tensors = content.pop("tensors")
    head = json.dumps(content, indent=1, ensure_ascii=False)[:-2]
    lines = ",\n  ".join(json.dumps(t, ensure_ascii=False) for t in tensors)
    path.write_text(f'{head},\n "tensors": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
