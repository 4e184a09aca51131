"""From a recipe and catalog rows to a plan: a pure function of both, without clock or randomness."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from math import prod
from typing import Any, NamedTuple

from deltaworks.catalog.histogram import KEEP_ALL, Cut, Interval, kept_elements, ranks_between
from deltaworks.catalog.models import Model
from deltaworks.checkpoints.dtypes import DTYPES, DType, promote
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.checkpoints.quantized import quantization, without_quantization
from deltaworks.errors import RecipeError, UserError, quoted
from deltaworks.merging.accounting import account_for
from deltaworks.merging.layer_entries import LayeredConfig, follow_layers
from deltaworks.merging.methods.copying import Copy
from deltaworks.merging.methods.delta import DeltaSum, Sparsify
from deltaworks.merging.methods.operation import Operation
from deltaworks.merging.methods.random_mask import random_key
from deltaworks.merging.methods.ranked_mask import LARGEST_ROWS_BLOCK, LONGEST_ROW, rows_block
from deltaworks.merging.methods.sce import SelectedSum
from deltaworks.merging.methods.spherical import Slerp
from deltaworks.merging.methods.weighted import WeightedSum
from deltaworks.merging.normalized import check_range, check_sum, normalizable, rescaled
from deltaworks.merging.output_config import describe_output, says_untied
from deltaworks.merging.parameters import Setting, resolve
from deltaworks.merging.plan import InputTensor, Plan, PlannedModel, PlannedTensor
from deltaworks.merging.plan_schema import SEEDS
from deltaworks.merging.recipe import Recipe
from deltaworks.merging.tensors import TensorRecipe, layer_count, layers_taken, output_tensors

DEFAULT_SHARD_BYTES = 5 * 10**9
_SPARSIFY = {
    "ties": Sparsify.MAGNITUDE,
    "dare_linear": Sparsify.RANDOM,
    "dare_ties": Sparsify.RANDOM,
    "della": Sparsify.RANKS,
    "della_linear": Sparsify.RANKS,
    "breadcrumbs": Sparsify.OUTLIERS,
    "breadcrumbs_ties": Sparsify.OUTLIERS,
}
_CONSENSUS = {"ties", "dare_ties", "della", "breadcrumbs_ties"}


_Cuts = tuple[Cut | Interval | None, Cut | Interval | None]
"""Of an expert, and of its outliers."""


class Trim(NamedTuple):
    """A cut that a plan needs: of the delta `expert` minus `base` (references) in `tensor`, keeping `keep` elements."""

    expert: str
    base: str
    tensor: str
    keep: int


def make_plan(
    recipe: Recipe,
    models: Mapping[str, Model],
    find_cuts: Callable[[Sequence[Trim]], Sequence[Cut | Interval]],
    *,
    bases: Mapping[str, str] | None = None,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    seed: int = 0,
) -> Plan:
    """Plan a merge that reads every expert in full; `Weighed` makes it read less.

    Args:
        recipe: what to merge, and how.
        models: the registered model behind every reference in the recipe.
        find_cuts: says where trims fall; asked once, where there are any.
        bases: the reference of the base that each expert was tuned from, as far as known; models that the recipe does
            not name may be among them.
        tokenizer: the reference of the model whose tokenizer the output gets; the base, or the first, where None.
        chat_template: a template to install.
        shard_bytes: largest amount of data in one output file.
        seed: what random methods start from.

    Raises:
        RecipeError, CheckpointError: the recipe does not fit the models.
        UserError: the seed has more than 64 bits.
    """
    if seed not in SEEDS:
        raise UserError(f"--seed {quoted(seed)}: a seed is a whole number from {SEEDS[0]:,} to {SEEDS[-1]:,}")
    bases = bases or {}
    references = list(dict.fromkeys([*recipe.models(), *bases.values()]))
    place = {reference: i for i, reference in enumerate(references)}
    outputs = output_tensors(recipe, models)
    sources = [_sources(t, models) for t in outputs]
    trims = [_trims(recipe, t, s) for t, s in zip(outputs, sources, strict=True)]
    wanted = [t for own in trims for both in own for t in both if t is not None]
    cuts = iter(find_cuts(wanted) if wanted else ())
    tensors = tuple(
        _plan_tensor(recipe, tensor, place, own, [(t and next(cuts), top and next(cuts)) for t, top in of], seed)
        for tensor, own, of in zip(outputs, sources, trims, strict=True)
    )
    named = {b for part in recipe.slices if (b := part.base_model or recipe.base_model) is not None}
    unread = (named - bases.keys()) | set(bases.values())
    planned = tuple(
        PlannedModel(
            r,
            models[r].name,
            "base" if r in unread else "expert",
            models[r].fingerprint,
            models[r].checkpoint.nbytes,
            place[bases[r]] if r in bases and r not in unread else None,
        )
        for r in references
    )
    read = [0] * len(references)
    for tensor in tensors:
        for i, source in _infos(tensor, references, models):
            read[i] += source.nbytes if planned[i].role != "base" else 0
    donor = tokenizer or recipe.base_model or references[0]
    config, notes = _config(recipe, models, references, tensors)
    return Plan(
        method=recipe.method.name,
        models=tuple(m._replace(bytes_planned=n) for m, n in zip(planned, read, strict=True)),
        tensors=tensors,
        config=config,
        tokenizer=place[donor],
        chat_template=chat_template,
        shard_bytes=shard_bytes,
        seed=seed,
        recipe=recipe.text,
        expert_bytes=sum(m.nbytes for m in planned if m.role != "base"),
        expert_bytes_planned=sum(read),
        accounting=account_for(
            references, models, tensors, is_sliced=recipe.is_sliced, unmerged=set(references) - set(recipe.models())
        ),
        notes=tuple(notes),
    )


def _config(
    recipe: Recipe, models: Mapping[str, Model], references: Sequence[str], tensors: tuple[PlannedTensor, ...]
) -> tuple[dict[str, Any], list[str]]:
    """`config.json` of the output, which is that of the base or of the first model, and notes on it."""
    leader = recipe.base_model or recipe.models()[0]
    checkpoints = {reference: models[reference].checkpoint for reference in recipe.models()}
    parents = [c.config for c in checkpoints.values()]
    own = checkpoints[leader].config
    if not own:
        return {}, []
    config = own if quantization(checkpoints[leader]) else without_quantization(own)
    config = describe_output(config, tensors, _written_dtype(recipe, tensors), parents)
    heads = {references[i] for t in tensors for i, name in t.inputs if _is_substituted(models[references[i]], name)}
    notes = [
        f"{models[reference].name} says that its head is its own (tie_word_embeddings: false) and holds none; its"
        " embeddings stand in for it"
        for reference, checkpoint in checkpoints.items()
        if reference in heads and says_untied(checkpoint.config)
    ]
    if says_untied(own) and not says_untied(config):
        notes.append(
            f"{models[leader].name} says that its head is its own (tie_word_embeddings: false), and no model holds one;"
            " the output says that its head is tied to its embeddings"
        )
    if not recipe.is_sliced:
        return config, notes
    layered = {r: LayeredConfig(models[r].name, c.config, layer_count(c.tensors)) for r, c in checkpoints.items()}
    return config, notes + follow_layers(config, leader, layered, layers_taken(recipe, models))


def _is_substituted(model: Model, name: str) -> bool:
    """Whether a model lacks a tensor, so that its embeddings stand in; see `Checkpoint.find`."""
    return name not in model.checkpoint.tensors and model.checkpoint.find(name) is not None


def _infos(
    tensor: PlannedTensor, references: Sequence[str], models: Mapping[str, Model]
) -> Iterator[tuple[int, TensorInfo]]:
    for i, name in tensor.inputs:
        info = models[references[i]].checkpoint.find(name)
        assert info is not None
        yield i, info


def _sources(tensor: TensorRecipe, models: Mapping[str, Model]) -> list[TensorInfo]:
    found = [models[i.model].checkpoint.find(name) for name, i in zip(tensor.sources, tensor.part.inputs, strict=True)]
    return [t for t in found if t is not None]


def _experts(recipe: Recipe, tensor: TensorRecipe) -> tuple[int, list[int]]:
    """Places of the base and of the experts among the inputs of a tensor."""
    names = [i.model for i in tensor.part.inputs]
    base = names.index(tensor.part.base_model or recipe.base_model or "")
    return base, [i for i in range(len(names)) if i != base]


def _resolve(recipe: Recipe, tensor: TensorRecipe, name: str, model: int | None = None) -> float | bool | None:
    parameter = next(p for p in recipe.method.parameters if p.name == name)
    who = "" if model is None else tensor.part.inputs[model].model
    of = tensor.name if model is None else tensor.sources[model]
    value: float | bool | None = resolve(parameter, tensor.settings(recipe, model), of, tensor.position, who)
    return value


def _number(recipe: Recipe, tensor: TensorRecipe, name: str, model: int | None = None) -> float:
    value = _resolve(recipe, tensor, name, model)
    assert value is not None
    return check_range(float(value), name, tensor.name)


def _numbers(recipe: Recipe, tensor: TensorRecipe, name: str, models: Sequence[int]) -> tuple[float, ...]:
    """A parameter of several models; those of which the recipe says the same are resolved once."""
    known: dict[tuple[Setting | None, str], float] = {}
    values = []
    for k in models:
        key = tensor.part.inputs[k].parameters.get(name), tensor.sources[k]
        if key not in known:
            known[key] = _number(recipe, tensor, name, k)
        values.append(known[key])
    return tuple(values)


def _trims(
    recipe: Recipe, tensor: TensorRecipe, sources: Sequence[TensorInfo]
) -> list[tuple[Trim | None, Trim | None]]:
    """The cut of each expert of a tensor, and that of its outliers; None where nothing or everything is trimmed."""
    if not _SPARSIFY.get(recipe.method.name, Sparsify.NONE).trims or not all(t.dtype.is_float for t in sources):
        return []
    base, experts = _experts(recipe, tensor)
    names, in_base, size = [i.model for i in tensor.part.inputs], sources[base].name, sources[base].count
    trims: list[tuple[Trim | None, Trim | None]] = []
    for k, (first, end) in zip(experts, _kept_ranks(recipe, tensor, experts, size), strict=True):
        if first == end or not size:
            trims.append((None, None))
            continue
        name = tensor.sources[k]
        if name != tensor.sources[base]:
            raise RecipeError(
                f"{recipe.method.name} cannot trim {name!r} of {names[k]} against {tensor.sources[base]!r}: give the"
                " base model the same layer_range"
            )
        if sources[k].name == in_base:
            name = in_base  # where both leave a tied head out, its delta is that of the embeddings
        outliers = Trim(names[k], names[base], name, first) if first else None
        trims.append((Trim(names[k], names[base], name, end), outliers))
    return trims


def _kept_ranks(recipe: Recipe, tensor: TensorRecipe, experts: Sequence[int], size: int) -> list[tuple[int, int]]:
    """By rank of magnitude, the first element of each expert that stays, and the end; equal where none is trimmed."""
    densities = _numbers(recipe, tensor, "density", experts)
    if _SPARSIFY[recipe.method.name] is not Sparsify.OUTLIERS:
        kept = {d: (0, kept_elements(d, size) if 0 < d < 1 else 0) for d in set(densities)}
        return [kept[d] for d in densities]
    gammas = _numbers(recipe, tensor, "gamma", experts)
    for gamma in gammas:
        if not 0 <= gamma <= 1:
            raise RecipeError(f"gamma: expected the share of each delta that goes as outliers, 0 to 1, not {gamma}")
    return [ranks_between(d, g, size) if 0 < d < 1 else (0, 0) for d, g in zip(densities, gammas, strict=True)]


def _plan_tensor(
    recipe: Recipe,
    tensor: TensorRecipe,
    place: Mapping[str, int],
    sources: Sequence[TensorInfo],
    cuts: Sequence[_Cuts],
    seed: int,
) -> PlannedTensor:
    inputs = [InputTensor(place[i.model], name) for name, i in zip(tensor.sources, tensor.part.inputs, strict=True)]
    operation: Operation
    if not all(t.dtype.is_float for t in sources):
        if len({t.dtype for t in sources}) > 1:
            raise UserError(f"tensor {tensor.name!r} is an integer tensor in one model and not in another")
        return PlannedTensor(
            tensor.name, sources[0].dtype, sources[0].shape, tuple(inputs), Copy(sources[0].dtype.bits)
        )
    dtype = recipe.out_dtype or recipe.dtype or reduce(promote, (t.dtype for t in sources))
    if recipe.method.name == "linear":
        weights = _numbers(recipe, tensor, "weight", range(len(inputs)))
        normalize = bool(_resolve(recipe, tensor, "normalize"))
        operation = WeightedSum(normalizable(weights, tensor.name) if normalize else weights, normalize)
    elif recipe.method.name == "passthrough":
        factor = _resolve(recipe, tensor, "scale", 0)
        if factor is None and dtype == sources[0].dtype:
            operation = Copy(dtype.bits)
        else:
            operation = WeightedSum((1.0 if factor is None else float(factor),), normalize=False)
    elif recipe.method.name == "slerp":
        base, (other,) = _experts(recipe, tensor)
        inputs = [inputs[base], inputs[other]]
        operation = Slerp(_number(recipe, tensor, "t"))
    else:
        base, experts = _experts(recipe, tensor)
        inputs = [inputs[base], *(inputs[k] for k in experts)]
        if recipe.method.name == "sce":
            operation = SelectedSum(len(experts), _number(recipe, tensor, "select_topk"))
        else:
            operation = _delta_sum(recipe, tensor, sources, experts, cuts, seed)
    return PlannedTensor(tensor.name, dtype, sources[0].shape, tuple(inputs), operation)


def _delta_sum(
    recipe: Recipe,
    tensor: TensorRecipe,
    sources: Sequence[TensorInfo],
    experts: list[int],
    cuts: Sequence[_Cuts],
    seed: int,
) -> DeltaSum:
    method = recipe.method.name
    weights, normalize = _numbers(recipe, tensor, "weight", experts), bool(_resolve(recipe, tensor, "normalize"))
    if normalize and method in _CONSENSUS:
        weights = rescaled(weights)
    elif normalize:
        check_sum(weights, tensor.name)
    operation = DeltaSum(
        weights=weights,
        densities=_numbers(recipe, tensor, "density", experts),
        sparsify=_SPARSIFY.get(method, Sparsify.NONE),
        rescale=bool(_resolve(recipe, tensor, "rescale")),
        consensus=method in _CONSENSUS,
        normalize=normalize,
        scale=_number(recipe, tensor, "lambda"),
    )
    if operation.sparsify.trims:
        size = sources[0].count
        operation = replace(operation, cuts=tuple(KEEP_ALL if size == 0 and c is None else c for c, _ in cuts))
        if operation.sparsify is Sparsify.OUTLIERS:
            operation = replace(
                operation,
                # Of a small tensor, a small share is nothing at all.
                densities=tuple(
                    0.0 if size and c is None and d < 1 else d
                    for d, (c, _) in zip(operation.densities, cuts, strict=True)
                ),
                gammas=_numbers(recipe, tensor, "gamma", experts),
                tops=tuple(top for _, top in cuts),
            )
    if operation.sparsify.draws:
        operation = replace(operation, keys=tuple(random_key(seed, k, tensor.name) for k in range(len(experts))))
    if operation.sparsify is Sparsify.RANKS:
        operation = replace(
            operation,
            epsilons=_epsilons(recipe, tensor, experts, operation.densities),
            row=_ranked_together(tensor.name, sources[0].shape) if operation.thins else 1,
        )
    return operation


def _epsilons(
    recipe: Recipe, tensor: TensorRecipe, experts: Sequence[int], densities: Sequence[float]
) -> tuple[float, ...]:
    epsilons = _numbers(recipe, tensor, "epsilon", experts)
    for density, epsilon in zip(densities, epsilons, strict=True):
        if 0 < density < 1 and not (0 <= epsilon < density and density + epsilon < 1):
            raise RecipeError(
                f"epsilon: chances run from density - epsilon to density + epsilon, {density:g} - {epsilon:g} to"
                f" {density:g} + {epsilon:g} at tensor {tensor.name!r}; both must be between 0 and 1"
            )
    return epsilons


def _ranked_together(name: str, shape: tuple[int, ...]) -> int:
    """Elements of a tensor that are ranked together: those of its last dimension, or all where it has no other."""
    row, count = shape[-1] if shape else 1, prod(shape)
    if count <= row:
        # All the same for what is ranked, and blocks of layers hold it whole.
        return min(1 << (count - 1).bit_length() if count else 1, LONGEST_ROW)
    row = min(row, LONGEST_ROW)
    if rows_block(row) > LARGEST_ROWS_BLOCK:
        raise RecipeError(
            f"the rows of tensor {name!r} cannot be ranked: {row:,} is so odd a number of elements that blocks of whole"
            " rows would be too large; set the density of this tensor to 1, or use another method"
        )
    return row


def _written_dtype(recipe: Recipe, tensors: tuple[PlannedTensor, ...]) -> str:
    """The element type `config.json` names: the one asked for, else the one that most of the output has."""
    if asked := recipe.out_dtype or recipe.dtype:
        return asked.torch_name
    sizes: dict[DType, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.count
    largest = max(sizes, key=lambda d: (d.is_float, sizes[d]), default=DTYPES["BF16"])
    return largest.torch_name
