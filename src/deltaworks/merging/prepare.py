"""Prepare and make plans: models are registered, unchanged and compared, deltas analyzed, and trims placed."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from deltaworks.catalog.cuts import find_cuts
from deltaworks.catalog.histogram import KEEP_ALL, Cut, Interval
from deltaworks.catalog.models import Model
from deltaworks.catalog.register import check_unchanged, ensure_registered
from deltaworks.catalog.statistics import is_current
from deltaworks.catalog.storage import is_far, read_cost
from deltaworks.catalog.store import Catalog
from deltaworks.catalog.tables import DeltaTable, read_table
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.unread import unread_weights
from deltaworks.errors import (
    CatalogError,
    ChangedError,
    CheckpointError,
    DamagedError,
    NonFiniteError,
    RecipeError,
    quoted,
)
from deltaworks.layers.file import LayerIndex
from deltaworks.merging.accounting import plan_notes
from deltaworks.merging.budget import Budget, parse_budget
from deltaworks.merging.candidate import Knowledge
from deltaworks.merging.contributions import Overlaps
from deltaworks.merging.custom_code import settle_code
from deltaworks.merging.effects import effect_of
from deltaworks.merging.inputs import check_bases, check_stand_in, find_bases, find_models
from deltaworks.merging.parents import Parent, check_compatible, compare_configs, compare_tokens
from deltaworks.merging.plan import Plan, keep_plan
from deltaworks.merging.plan_schema import check_inputs
from deltaworks.merging.planner import DEFAULT_SHARD_BYTES, Trim, make_plan
from deltaworks.merging.recipe import Recipe
from deltaworks.merging.similarity import Comparison
from deltaworks.merging.tokenizers import choose_template, choose_tokenizer
from deltaworks.merging.weighing import Weighed
from deltaworks.progress import Progress, Silent, warn

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How to merge, beyond what the recipe says.

    Attributes:
        shard_bytes: largest amount of data in one output file.
        seed: what random methods start from.
        block_size: elements streamed at once, a power of two from 4 Ki to 4 Mi; None for what suits each tensor.
        threads: compute threads; None for all cores.
        allow_nonfinite: write NaN and infinity instead of failing.
        budget: the most that may be read from experts; None for what the recipe says, or no budget.
        base: reference of the model that blocks which are not read are taken from, where the recipe names no base
            model; None for what the recipe says, or the base that the experts are registered with.
        fair: weigh all experts alike, however small their deltas; None for what the recipe says.
        balanced: weigh all tensors alike, however small their deltas; None for what the recipe says.
        layers: read experts from the catalog's layers where it has them; None for only where there is a budget, which
            reaches further with them, or where their storage is slow: else they save bytes and cost processor time.
        trust_remote_code: copy custom code that the models' configurations name; it is never run. Otherwise the output
            does not name it.
        allow_mismatch: merge models of different architectures, or whose heads are arranged otherwise.
    """

    shard_bytes: int = DEFAULT_SHARD_BYTES
    seed: int = 0
    block_size: int | None = None
    threads: int | None = None
    allow_nonfinite: bool = False
    budget: Budget | None = None
    base: str | None = None
    fair: bool | None = None
    balanced: bool | None = None
    layers: bool | None = None
    trust_remote_code: bool = False
    allow_mismatch: bool = False


def prepare_plan(
    catalog: Catalog,
    recipe: Recipe,
    options: MergeOptions | None = None,
    *,
    relative_to: Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Register and analyze what `recipe` needs, and plan it.

    A delta that the catalog has statistics of is not read again.

    Raises:
        RecipeError, CheckpointError, CatalogError, ChangedError: something does not fit.
        NonFiniteError: an expert whose changes are to be weighed holds NaN or infinity.
    """
    options = options or MergeOptions()
    budget = options.budget or (parse_budget(recipe.budget) if recipe.budget is not None else None)
    prepared = Prepared(catalog, recipe, options, relative_to=relative_to, progress=progress, weighs=budget is not None)
    plan = prepared.plan(recipe, budget)
    if prepared.no_effect:
        raise RecipeError(prepared.no_effect)
    for note in plan.notes[len(prepared.notes) :]:
        if note not in prepared.layer_notes:
            (progress or Silent()).note(note)
    keep_plan(catalog, plan)
    return plan


class Prepared:
    """The models of a recipe, registered, unchanged and analyzed; plans for it and its variations cost milliseconds.

    Args:
        catalog: what is known, and where what is learned goes.
        recipe: names the models.
        options: how to merge.
        relative_to: a second folder in which paths are looked up.
        progress: told of the work.
        weighs: whether plans will have a budget, so that every expert must be analyzed.

    Attributes:
        models: the model behind every reference.
        notes: what the user should know of the models, whatever the plan; complete when there is a plan, and reported
            to `progress` already.
        no_effect: why the plan that was made last has no effect and should not be run; None where it has one.
        layer_notes: which layers are damaged and not used; likewise. Complete when there is a plan within a budget.

    Raises:
        As `prepare_plan`.
    """

    def __init__(
        self,
        catalog: Catalog,
        recipe: Recipe,
        options: MergeOptions,
        *,
        relative_to: Path | None = None,
        progress: Progress | None = None,
        weighs: bool,
    ) -> None:
        self._catalog, self._options, self._progress = catalog, options, progress or Silent()
        for warning in recipe.warnings:
            self._progress.note(warning)
        stand_in = options.base or recipe.stand_in
        if weighs:
            check_stand_in(catalog, recipe, stand_in, relative_to)
        self.notes: list[str] = []
        self.layer_notes: list[str] = []
        self.no_effect: str | None = None
        self.models, stand_in = find_models(catalog, recipe, stand_in, relative_to, self._progress)
        check_bases(catalog, recipe, self.models)
        self._compare_parents(recipe)
        gone = [m.name for m in self.models.values() if m.is_gone]
        if gone and options.layers is False:
            raise CheckpointError(f"the weight files of {gone[0]} are gone; it can be read from its layers only")
        far = [m for m in self.models.values() if options.layers is None and m.base and is_far(catalog, m)]
        adds = weighs or bool(options.layers or gone or far)
        self._bases = find_bases(catalog, recipe, self.models, stand_in, self._progress, weighs=weighs, adds=adds)
        self._fair = recipe.fair if options.fair is None else options.fair
        self._balanced = recipe.balanced if options.balanced is None else options.balanced
        self._statistics: dict[tuple[str, str], Path] = {}
        self._tables: dict[tuple[str, str], DeltaTable] = {}
        self._layers: dict[str, Future[LayerIndex | None]] = {}
        self._overlaps = Overlaps()
        self._weighed: tuple[Plan, Weighed] | None = None
        if weighs:
            for pair in self._bases.items():
                self._analyze(*pair)
            if options.layers is not False:
                # What is read here is not needed before everything else is planned.
                pool = ThreadPoolExecutor()
                self._layers = {pair[0]: pool.submit(self._find_layers, *pair) for pair in self._bases.items()}
                pool.shutdown(wait=False)
        self._weighs = weighs
        self._equal: tuple[frozenset[str], ...] | None = None
        self._sampled = ByteCounter()

    def _compare_parents(self, recipe: Recipe) -> None:
        """Note where configurations and tokenizers differ; refuse models whose weights are not comparable."""
        parents = {r: Parent(m.name, m.checkpoint.config, m.path) for r in recipe.models() if (m := self.models[r])}
        leader = recipe.base_model or recipe.models()[0]
        others = [p for r, p in parents.items() if r != leader]
        for reference in recipe.models():
            self._note_unread(self.models[reference])
        notes, incompatible = compare_configs(parents[leader], others, is_sliced=recipe.is_sliced)
        if recipe.tokenizer_source is None:  # where one is asked for, vocabularies must be equal
            notes += compare_tokens(parents[leader], others)
        for note in notes:
            self._note(note)
        if not self._options.allow_mismatch:
            check_compatible(incompatible)

    def _note_unread(self, model: Model) -> None:
        """Note weights beside those of a model that no loader looks for, and that may hold other values."""
        for first, *more in unread_weights(model.checkpoint):
            names = f"{quoted(first)} and {len(more)} more are" if more else f"{quoted(first)} is"
            self._note(
                f"{names} not read: {model.name} has weights of the same shapes in"
                f" {quoted(model.checkpoint.shards[0].name)}, which transformers loads"
            )

    def _compare_weights(self, recipe: Recipe) -> tuple[frozenset[str], ...]:
        """Note models that hold the same weights, or weights too far apart.

        Returns:
            References of the models that are known to hold the same weights, group by group.
        """
        if recipe.method.name == "passthrough":
            return ()
        leader = recipe.base_model or recipe.models()[0]
        merged = {reference: self.models[reference] for reference in recipe.models()}
        counter = None if self._weighs else self._sampled  # what a budget allows is for the merge alone
        comparison = Comparison(self._catalog, merged, leader, self._bases, self.models, counter=counter)
        for note in comparison.notes(has_base=recipe.base_model is not None):
            self._note(note)
        return comparison.groups

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self._progress.note(text)

    def plan(self, recipe: Recipe, budget: Budget | None) -> Plan:
        """The plan of `recipe`, which names the same models, within a budget or without."""
        options = self._options
        named = {reference: self.models[reference] for reference in recipe.models()}
        full = make_plan(
            recipe,
            self.models,
            self._cuts,
            bases=self._bases,
            tokenizer=choose_tokenizer(recipe, named),
            chat_template=choose_template(recipe, named),
            shard_bytes=options.shard_bytes,
            seed=options.seed,
        )
        if self._equal is None:
            # Only now is everything analyzed that the method needs, so that the least is sampled.
            self._equal = self._compare_weights(recipe)
        references = [m.reference for m in full.models]
        base = references.index(recipe.base_model) if recipe.base_model else None
        groups = [[k for k, r in enumerate(references) if r in group] for group in self._equal]
        effect = effect_of(full, base, groups)
        self.no_effect = effect.no_effect
        no_effect = [self.no_effect] if self.no_effect else []
        full = replace(
            full,
            notes=(*self.notes, *full.notes, *plan_notes(full), *effect.notes, *no_effect),
            sampled_bytes=self._sampled.value,
        )
        leader = references.index(recipe.base_model or recipe.models()[0])
        full = settle_code(full, [self.models[r] for r in references], leader, trust=options.trust_remote_code)
        return full if budget is None else self.within(full, budget)

    def within(self, full: Plan, budget: Budget) -> Plan:
        """A plan of this recipe, made to keep within a budget."""
        if self._weighed is None or self._weighed[0] is not full:
            self._weighed = (full, Weighed(full, self.knowledge(full), fair=self._fair, balanced=self._balanced))
        planned = self._weighed[1].within(budget.of(full.expert_bytes))
        return replace(planned, notes=(*planned.notes, *self.layer_notes))

    def knowledge(self, plan: Plan) -> Knowledge:
        """What the catalog knows of a plan's inputs."""
        place = {m.reference: i for i, m in enumerate(plan.models)}
        models = [self.models[m.reference] for m in plan.models]
        deltas = {(place[e], place[b]): self._table(e, b) for e, b in self._bases.items()}
        expert = next((m for m, p in zip(models, plan.models, strict=True) if p.role != "base"), models[0])
        found = {place[e]: reading.result() for e, reading in self._layers.items()}
        layers = {e: index for e, index in found.items() if index is not None}
        return Knowledge(models, deltas, read_cost(self._catalog, expert), self._overlaps, layers)

    def _analyze(self, expert: str, base: str, *, again: bool = False) -> None:
        """Have the catalog know a delta, and find its statistics; measure it `again` where they are damaged."""
        prints = self.models[expert].fingerprint, self.models[base].fingerprint
        known = self._catalog.find_analysis(*prints)
        is_old = known is not None and not is_current(known[2]) and not self.models[expert].is_gone
        if known is None or is_old or again:
            from deltaworks.catalog.analyze import analyze  # noqa: PLC0415  # slow to import, seldom needed

            analyze(
                self._catalog,
                self.models[expert],
                self.models[base],
                block_size=self._options.block_size,
                threads=self._options.threads,
                force=again,
                progress=self._progress,
                warns=False,  # the notes of plans say it, whenever the delta was analyzed
            )
            known = self._catalog.find_analysis(*prints)
            assert known is not None
        _, self._statistics[expert, base], summary = known
        if summary["nonfinite"]:
            raise NonFiniteError(
                f"{self.models[expert].name} has NaN or infinity in {len(summary['nonfinite'])} tensors"
                f" (first: {summary['nonfinite'][0]!r}), so its largest changes cannot be told;"
                " mend or leave out this expert"
            )

    def _table(self, expert: str, base: str) -> DeltaTable:
        """What the statistics say; the same object each time, by which cosines between experts are remembered."""
        pair = expert, base
        if pair not in self._tables:
            self._tables[pair] = self._mending(pair, lambda: read_table(self._statistics[pair]))
        return self._tables[pair]

    def _mending(self, pair: tuple[str, str], read: Callable[[], T]) -> T:
        """What reading the statistics of a delta gives; where they are damaged, they are made anew from its expert.

        Raises:
            DamagedError: they are damaged, and the expert's weight files are gone.
        """
        try:
            return read()
        except DamagedError as error:
            model = self.models[pair[0]]
            if model.is_gone:
                raise
            self._progress.note(f"{error}: measuring {model.name} again")
            self._analyze(*pair, again=True)
            return read()

    def _find_layers(self, expert: str, base: str) -> LayerIndex | None:
        file = self._catalog.layers_file(self.models[expert].fingerprint, self.models[base].fingerprint)
        if not file.is_file():
            return None
        try:
            index = LayerIndex(file)
            _ = index.residuals  # read here, beside those of other experts
        except CatalogError as error:
            if self._options.layers or self.models[expert].is_gone:
                raise
            self.layer_notes.append(f"the layers of {self.models[expert].name} are not used: {error}")
            warn(self._progress, self.layer_notes[-1])
            return None
        return index

    def _cuts(self, trims: Sequence[Trim]) -> list[Cut | Interval]:
        """Where trims fall."""
        by_delta: dict[tuple[str, str], list[int]] = {}
        for i, trim in enumerate(trims):
            by_delta.setdefault((trim.expert, trim.base), []).append(i)
        for pair in by_delta:
            if pair not in self._statistics:
                self._analyze(*pair)
        cuts: list[Cut | Interval] = [KEEP_ALL] * len(trims)
        for (expert, base), places in by_delta.items():
            wanted = [(trims[i].tensor, trims[i].keep) for i in places]
            known = self._table(expert, base).cuts
            find = partial(find_cuts, self._catalog, self.models[expert], self.models[base], wanted, known)
            found = self._mending((expert, base), find)
            for i, cut in zip(places, found, strict=True):
                cuts[i] = cut
        return cuts


def plan_inputs(catalog: Catalog, plan: Plan, progress: Progress | None = None) -> list[Model]:
    """The models a plan was made for, registered where this catalog does not know them.

    Raises:
        ChangedError: a model is not what it was when the plan was made.
        PlanError: the plan reads what its models do not hold.
    """
    found = []
    for planned in plan.models:
        known = catalog.find(planned.name)
        if known is not None and known.fingerprint == planned.fingerprint:
            model = check_unchanged(catalog, known, progress)
        else:
            model = ensure_registered(catalog, planned.reference, progress=progress)
        if model.fingerprint != planned.fingerprint:
            raise ChangedError(
                f"{model.path} changed since the plan was made (fingerprint {model.fingerprint[:12]},"
                f" planned {planned.fingerprint[:12]}); make the plan again"
            )
        found.append(model)
    check_inputs(plan.tensors, found)
    return found
