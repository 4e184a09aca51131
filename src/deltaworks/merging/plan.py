"""A merge plan: everything execution needs to know, as frozen data that a person can read and a file can hold."""

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.dtypes import DTYPES, DType
from deltaworks.documents import parse_json, read_bytes
from deltaworks.errors import PlanError, one_line, quoted
from deltaworks.merging.methods import OPERATIONS
from deltaworks.merging.methods.operation import Operation
from deltaworks.merging.plan_schema import check_plan
from deltaworks.merging.summary import by_layer
from deltaworks.outputs import write_file
from deltaworks.units import format_bytes

SCHEMA_VERSION = 2
_PLAN_BYTES = 1 << 30
"""The largest plan that is read: a hundred thousand tensors take 25 MB, and layers in a budget a multiple."""


class PlannedModel(NamedTuple):
    """An input of a plan: what the recipe calls it, its name in the catalog, its role, its identity, its size.

    `base` is the place of the model whose blocks stand in for omitted blocks of this expert; None for a base, and
    where no base is known. `bytes_planned` is what is read of it; 0 for a base, whose bytes no budget counts.
    """

    reference: str
    name: str
    role: str
    fingerprint: str
    nbytes: int
    base: int | None = None
    bytes_planned: int = 0


class InputTensor(NamedTuple):
    """A tensor to read: the model's place in the plan, and the tensor's name there."""

    model: int
    tensor: str


Ranges = tuple[tuple[int, int], ...]
"""Runs of blocks, each as its first and the one after its last."""

Depths = tuple[tuple[int, int, int], ...]
"""Runs of blocks that are read to the same depth: its first, the one after its last, and the number of layers."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One output tensor: its name, type and shape, what it is made from, and how.

    Attributes:
        name, dtype, shape: of the output.
        inputs: what the operation takes.
        operation: how they combine.
        reads: for each input, the blocks that are read; None for all. Empty where all inputs are read in full.
        depths: for each input, how many layers of which blocks are read; None for one that is read as it is. Empty
            where all are.
        nbytes: for each input, the bytes of an expert that are read, where there are `depths`.
        stand_in: what omitted blocks are replaced with.
        error: predicted relative L2 error of this tensor's merged delta; None where nothing is known of it.
        norm: predicted L2 norm of this tensor's merged delta; None likewise.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    inputs: tuple[InputTensor, ...]
    operation: Operation
    reads: tuple[Ranges | None, ...] = ()
    depths: tuple[Depths | None, ...] = ()
    nbytes: tuple[int, ...] = ()
    stand_in: InputTensor | None = None
    error: float | None = 0.0
    norm: float | None = None

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
        block_size: elements a block of `reads`.
        predicted_error: expected L2 distance of the merge from the full merge, relative to the full merge's distance
            from the base, before rounding to the output's type.
        error_bound: what that error cannot exceed, for methods with fixed coefficients; None for others.
        fair: whether experts with small deltas were given the same weight as others.
        balanced: whether tensors with small deltas were given the same weight as others.
        accounting: what becomes of every tensor of each input, as `account_for` gives it; empty in plans of earlier
            versions.
        notes: what the user should know of the merge.
        code: the files of custom code that are copied, each with the place in `models` of the model that has it; None
            where custom code was not asked for.
        read_cost: seconds a request and bytes a second of the storage that was planned for.
        predicted_read_s: seconds that reading will take one reader there.
        sampled_bytes: what planning read of models to compare them; not stored.
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
    block_size: int = 1
    predicted_error: float = 0.0
    error_bound: float | None = 0.0
    fair: bool = False
    balanced: bool = False
    accounting: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    code: tuple[tuple[int, str], ...] | None = None
    read_cost: tuple[float, float] | None = field(default=None, compare=False)
    predicted_read_s: float | None = field(default=None, compare=False)
    sampled_bytes: int = field(default=0, compare=False)
    _digest: list[str] = field(default_factory=list, init=False, compare=False, repr=False)

    @property
    def reads_nothing(self) -> bool:
        """Whether there are experts and no byte of any is read, so that the result is the base model."""
        return self.expert_bytes > 0 and self.expert_bytes_planned == 0

    def check_reads(self, *, force: bool) -> None:
        """Refuse a plan that reads nothing of any expert.

        Args:
            force: accept it all the same.

        Raises:
            PlanError: it reads nothing.
        """
        if not self.reads_nothing or force:
            return
        if self.predicted_error == 0:
            raise PlanError(
                "the plan reads nothing of any expert, as none of them changes the base model; add --force to make"
                " a copy of the base model"
            )
        budget = "" if self.budget_bytes is None else f" ({format_bytes(self.budget_bytes)})"
        raise PlanError(
            f"the plan reads nothing of any expert: its budget{budget} is less than any block takes, so the result"
            " would be the base model; give a larger budget, or add --force"
        )

    @property
    def digest(self) -> str:
        """BLAKE3 of the plan's content; two plans with the same digest write the same bytes."""
        return self._digest_of(None)

    def to_json(self) -> dict[str, Any]:
        """The plan as a file holds it: what `json` writes of it, tuples as arrays."""
        content = self._content()
        return {
            "deltaworks_plan": SCHEMA_VERSION,
            "digest": self._digest_of(content),
            # What a clock measured is told, and is not a part of what the plan says.
            "read_cost": self.read_cost and list(self.read_cost),
            "predicted_read_s": self.predicted_read_s,
            "layers": by_layer(self),
            **content,
        }

    def _digest_of(self, content: dict[str, Any] | None) -> str:
        if not self._digest:
            self._digest.append(blake3(_canonical(content or self._content())).hexdigest())
        return self._digest[0]

    def _content(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "seed": self.seed,
            "budget_bytes": self.budget_bytes,
            "expert_bytes": self.expert_bytes,
            "expert_bytes_planned": self.expert_bytes_planned,
            "block_size": self.block_size,
            "predicted_error": self.predicted_error,
            "error_bound": self.error_bound,
            "fair": self.fair,
            "balanced": self.balanced,
            "models": [m._asdict() for m in self.models],
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            "shard_bytes": self.shard_bytes,
            "config": self.config,
            "recipe": self.recipe,
            # Plans of earlier versions lack what follows, and keep their digests.
            **({"accounting": list(self.accounting)} if self.accounting else {}),
            **({"notes": list(self.notes)} if self.notes else {}),
            **({"code": self.code} if self.code is not None else {}),
            "tensors": [
                {
                    "name": t.name,
                    "dtype": t.dtype.name,
                    "shape": t.shape,
                    "inputs": t.inputs,
                    "operation": t.operation.kind,
                    **t.operation.to_json(),
                    **_reads_to_json(t),
                }
                for t in self.tensors
            ],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Plan":
        """The inverse of `to_json`.

        Raises:
            PlanError: the content is not a plan, of another version, or was edited.
        """
        if content.get("deltaworks_plan") != SCHEMA_VERSION:
            version = content.get("deltaworks_plan")
            raise PlanError(
                "this is not a deltaworks plan"
                if version is None
                else f"the plan has schema {quoted(version)}, this deltaworks reads {SCHEMA_VERSION}; make it again"
            )
        check_plan(content)
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
                        tuple(r if r is None else tuple((a, b) for a, b in r) for r in t.get("reads", ())),
                        tuple(r if r is None else tuple((a, b, d) for a, b, d in r) for r in t.get("depths", ())),
                        tuple(t.get("nbytes", ())),
                        InputTensor(*t["stand_in"]) if "stand_in" in t else None,
                        t.get("error", 0.0),
                        t.get("norm"),
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
                        "block_size",
                        "predicted_error",
                        "error_bound",
                        "fair",
                        "balanced",
                        "predicted_read_s",
                    )
                },
                accounting=tuple(content.get("accounting", ())),
                notes=tuple(content.get("notes", ())),
                code=tuple((i, name) for i, name in content["code"]) if "code" in content else None,
                read_cost=content["read_cost"] and tuple(content["read_cost"]),
            )
        except (LookupError, TypeError, ValueError) as error:
            problem = one_line(str(error))
            raise PlanError(f"the plan is malformed ({type(error).__name__}: {problem}); make it again") from error
        if plan.digest != content.get("digest"):
            raise PlanError(
                "the plan was edited: its digest does not match its content; make it again with `deltaworks plan`"
            )
        return plan


def _reads_to_json(tensor: PlannedTensor) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if tensor.reads:
        content["reads"] = tensor.reads
    if tensor.depths:
        content |= {"depths": tensor.depths, "nbytes": tensor.nbytes}
    if tensor.stand_in is not None:
        content["stand_in"] = tensor.stand_in
    if tensor.error != 0:
        content["error"] = tensor.error
    if tensor.norm is not None:
        content["norm"] = tensor.norm
    return content


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def load_plan(path: Path) -> Plan:
    """Read the plan in the file at `path`.

    Raises:
        PlanError: there is no such file, or it is not a plan of this version.
    """
    # A configuration in it may hold infinity, as those that transformers writes do.
    raw = read_bytes(path, "a plan", PlanError, _PLAN_BYTES)
    content = parse_json(raw, str(path), "a plan", PlanError, finite=False)
    if not isinstance(content, dict):
        raise PlanError(f"{path} is not a deltaworks plan")
    return Plan.from_json(content)


def save_plan(plan: Plan, path: Path) -> None:
    """Write `plan` to a file, whole or not at all.

    It has one line a layer and a tensor, so that plans can be compared line by line.
    """
    content = plan.to_json()
    tables = {name: content.pop(name) for name in ("layers", "tensors")}
    text = json.dumps(content, indent=1, ensure_ascii=False)[:-2]
    for name, rows in tables.items():
        lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
        text += f',\n "{name}": [\n  {lines}\n ]'
    write_file(path, f"{text}\n}}\n")


def keep_plan(catalog: Catalog, plan: Plan) -> None:
    """Have the catalog keep the plan's text under its digest."""
    if not catalog.has_plan(plan.digest):
        catalog.save_plan(plan.digest, json.dumps(plan.to_json()))
