"""A profile: what was measured of one engine, model and GPU, as four fitted costs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from deltaworks.documents import load_json
from deltaworks.errors import ProfileError, WorkloadError, quoted
from deltaworks.serving import twin
from deltaworks.serving.arrays import F64
from deltaworks.serving.schema import MAX_NUMBER, check_keys, instead, mapping, number, text, whole

SCHEMA = 1
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank` that vLLM takes (and 1)."""
BLOCK_UNIT = 16
"""vLLM's attention kernels take blocks of a multiple of so many tokens."""


@dataclass(frozen=True)
class ServerFlags:
    """vLLM's limits, under the names of its flags.

    Attributes:
        max_num_seqs: Requests in a batch, at most.
        max_num_batched_tokens: Tokens in a step, at most.
        block_size: Tokens in a block of the KV cache.
        max_model_len: Tokens of a prompt and its answer, at most; None where it is not known.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    max_model_len: int | None = None


@dataclass(frozen=True)
class KvCache:
    """KV tokens left: ``tokens - slots * (per_slot + per_slot_rank * max_rank)``; start-up fails below ``least``."""

    tokens: float
    per_slot: float = 0.0
    per_slot_rank: float = 0.0
    least: int = 1


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of the model in one step.

    ``base + decode * D + prefill * P + context * C + decode_prefill * D * P``, and ``eager`` above ``graph_tokens``
    tokens; with any adapter in the batch also ``lora + (slot + slot_rank * R) * S + (adapter + adapter_rank * R) * A +
    (lora_decode + lora_decode_rank * R) * D + (lora_prefill + lora_prefill_rank * R) * P + (adapter_token * A +
    slot_token * S) * (D + P)``, and ``small_slot * S + small_adapter * A`` below ``small_tokens`` tokens. D is decoding
    requests, P prompt tokens, C tokens in the KV cache of the decoding requests, A distinct adapters in the batch, S
    slots, R the server's maximum rank. (vLLM 0.8.5 configures its LoRA kernels otherwise below 128 tokens.)

    ``decode_prefill`` is the extra cost of decoding in a step that computes prompts as well. It is inferred from whole
    runs; that one attention kernel, sized by the longest prompt, serves all requests of the batch is a hypothesis.
    """

    base: float
    decode: float = 0.0
    prefill: float = 0.0
    context: float = 0.0
    eager: float = 0.0
    graph_tokens: int = 1 << 30
    lora: float = 0.0
    slot: float = 0.0
    slot_rank: float = 0.0
    adapter: float = 0.0
    adapter_rank: float = 0.0
    lora_decode: float = 0.0
    lora_decode_rank: float = 0.0
    lora_prefill: float = 0.0
    lora_prefill_rank: float = 0.0
    adapter_token: float = 0.0
    slot_token: float = 0.0
    small_slot: float = 0.0
    small_adapter: float = 0.0
    small_tokens: int = 0
    decode_prefill: float = 0.0


@dataclass(frozen=True)
class SchedulerTime:
    """Milliseconds of the scheduler in one step: ``step + running * D + skipped * (waiting requests passed over)``."""

    step: float = 0.0
    running: float = 0.0
    skipped: float = 0.0


@dataclass(frozen=True)
class LoadTime:
    """Milliseconds to bring an adapter from host memory into a slot, and from disk into host memory, by its rank."""

    slot: float = 0.0
    slot_rank: float = 0.0
    disk: float = 0.0
    disk_rank: float = 0.0


@dataclass(frozen=True)
class FrontEnd:
    """The API server, in milliseconds.

    Attributes:
        request: From a request's arrival until the scheduler has it.
        first_request: The same for the first request of an adapter, whose tokenizer is looked for; others wait.
        label_set: Of a stall when metrics are read, for every set of adapters that was ever in a batch together:
            vLLM's ``lora_requests_info`` keeps a series for each.
        scrape_period_s: Seconds between readings of the metrics; 0 if nobody reads them.
        merge_batch: Up to this many running requests, tokens made in a stall reach the client as one piece.
    """

    request: float = 0.0
    first_request: float = 0.0
    label_set: float = 0.0
    scrape_period_s: float = 0.0
    merge_batch: int = 128


@dataclass(frozen=True)
class Profile:
    """One engine, model and GPU.

    Attributes:
        name: What it is called.
        engine: Such as ``vLLM 0.8.5 (V1)``.
        model: The base model.
        gpu: The GPU, or what else it ran on.
        server: Its limits.
        kv_cache: KV tokens left for slots and rank.
        step: The model's time.
        scheduler: The scheduler's time.
        loading: The time to load adapters.
        front_end: The API server's time.
        output_share: Tokens that the model generates of those that a data set's reference answers hold.
        residuals: How far measurements are from the fit, by cost.
        sources: Where the numbers of each cost come from.
        assumed: Costs that were not measured, such as ``step.context``, and why.
    """

    name: str
    engine: str
    model: str
    gpu: str
    kv_cache: KvCache
    step: StepTime
    server: ServerFlags = ServerFlags()
    scheduler: SchedulerTime = SchedulerTime()
    loading: LoadTime = LoadTime()
    front_end: FrontEnd = FrontEnd()
    output_share: float = 1.0
    residuals: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)

    def kv_tokens(self, slots: int, max_rank: int) -> int:
        """KV tokens left for so many slots of so large a rank; whole blocks, possibly less than none."""
        cache, size = self.kv_cache, self.server.block_size
        return int((cache.tokens - slots * (cache.per_slot + cache.per_slot_rank * max_rank)) // size) * size

    def starts(self, slots: int, max_rank: int) -> bool:
        """Whether there is memory enough for a server with so many slots of so large a rank.

        vLLM starts only if the KV cache holds one request of the model's full length.
        """
        least = max(self.kv_cache.least, 2 * self.server.block_size, self.server.max_model_len or 0)
        return self.kv_tokens(slots, max_rank) >= least

    def most_slots(self, max_rank: int, most: int = 1024) -> int:
        """The most slots of a rank for which there is memory, up to ``most``; 0 if there is not even for one."""
        if self.starts(most, max_rank):
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.starts(middle, max_rank) else (low, middle)
        return low

    def costs(self, slots: int, max_rank: int) -> F64:
        """The twin's vector of costs for a configuration, in seconds."""
        step, scheduler, front = self.step, self.scheduler, self.front_end
        costs = np.zeros(twin.COSTS)
        costs[twin.BASE], costs[twin.PER_DECODE], costs[twin.PER_PREFILL] = step.base, step.decode, step.prefill
        costs[twin.PER_CONTEXT], costs[twin.EAGER] = step.context, step.eager
        costs[twin.DECODE_PREFILL] = step.decode_prefill
        costs[twin.LORA] = step.lora + slots * (step.slot + step.slot_rank * max_rank)
        costs[twin.PER_ADAPTER] = step.adapter + step.adapter_rank * max_rank
        each = step.slot_token * slots
        costs[twin.LORA_DECODE] = step.lora_decode + step.lora_decode_rank * max_rank + each
        costs[twin.LORA_PREFILL] = step.lora_prefill + step.lora_prefill_rank * max_rank + each
        costs[twin.ADAPTER_TOKEN] = step.adapter_token
        costs[twin.SMALL], costs[twin.SMALL_ADAPTER] = step.small_slot * slots, step.small_adapter
        costs[twin.QUEUE], costs[twin.PER_RUNNING] = scheduler.step, scheduler.running
        costs[twin.PER_SKIPPED] = scheduler.skipped
        costs[twin.REQUEST], costs[twin.FIRST_REQUEST] = front.request, front.first_request
        costs[twin.PER_LABEL_SET] = front.label_set
        costs /= 1000.0
        costs[twin.GRAPH_TOKENS], costs[twin.SCRAPE_PERIOD] = step.graph_tokens, front.scrape_period_s
        costs[twin.SMALL_TOKENS], costs[twin.MERGE_BATCH] = step.small_tokens, front.merge_batch
        return costs

    def load_s(self, ranks: F64) -> tuple[F64, F64]:
        """Seconds to load adapters of these ranks, (adapters,) float64: into a slot, and from disk."""
        times = self.loading
        return (times.slot + times.slot_rank * ranks) / 1000.0, (times.disk + times.disk_rank * ranks) / 1000.0

    @property
    def digest(self) -> str:
        """A hash of everything that a surrogate's training depends on.

        The model's length is not among it: what a surrogate learns from are runs without that limit.
        """
        told = {name: value for name, value in asdict(self).items() if name in PARTS or name == "output_share"}
        # A cost that profiles have only lately is left out where it is 0: what was trained before stays valid.
        if not self.step.decode_prefill:
            del told["step"]["decode_prefill"]
        del told["server"]["max_model_len"]
        return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What a profile's file holds."""
        return {"schema": SCHEMA, **asdict(self)}


def with_flags(
    profile: Profile, *, kv_tokens: int | None = None, scrape_period_s: float | None = None, **flags: int | None
) -> Profile:
    """A profile of the same engine started with other flags, each None for the profile's own.

    Args:
        profile: It.
        kv_tokens: KV tokens, whatever the slots.
        scrape_period_s: Seconds between readings of its metrics; 0 for never.
        flags: Of `ServerFlags`.

    Raises:
        ProfileError: vLLM does not start with such flags.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        for name, value in given.items():
            whole(value, name, 1, _MAXIMA[name])
        if kv_tokens is not None:
            whole(kv_tokens, "kv_tokens", 1, _MAXIMA["tokens"])
        if scrape_period_s is not None:
            _check_period(number(scrape_period_s, "scrape_period_s"), "scrape_period_s")
    except WorkloadError as error:
        raise ProfileError(str(error)) from None
    server = replace(profile.server, **given)
    if fault := flags_fault(server):
        raise ProfileError(fault)
    known, asked = profile.server.max_model_len, flags.get("max_model_len")
    if known is not None and asked is not None and asked > known:
        raise ProfileError(
            f"max_model_len {asked:,} is more than the {known:,} of {profile.name}, and vLLM does not start with more"
            " than the model's length; if the model takes more, say so in the profile"
        )
    cache = profile.kv_cache if kv_tokens is None else KvCache(kv_tokens)
    if asked is not None:
        cache = replace(cache, least=min(cache.least, asked))
    elif kv_tokens is not None and known is not None and kv_tokens < known:
        # A server with so few KV tokens can only have been started with a shorter length, which was not given.
        server = replace(server, max_model_len=None)
    front = profile.front_end
    if scrape_period_s is not None:
        front = replace(front, scrape_period_s=scrape_period_s)
    return replace(profile, server=server, kv_cache=cache, front_end=front)


def flags_fault(server: ServerFlags) -> str:
    """Why vLLM does not start with such flags; empty if it does."""
    for name, value in asdict(server).items():
        if value is not None and value < 1:
            return f"{name} must be at least 1, not {value}"
    if server.max_num_seqs > server.max_num_batched_tokens:
        return (
            f"max_num_seqs {server.max_num_seqs} is more than max_num_batched_tokens {server.max_num_batched_tokens};"
            " vLLM takes at most max_num_batched_tokens"
        )
    if server.block_size % BLOCK_UNIT:
        return f"block_size {server.block_size} is not one that vLLM takes; give a multiple of {BLOCK_UNIT}"
    return ""


PARTS = {"server": ServerFlags, "kv_cache": KvCache, "step": StepTime, "scheduler": SchedulerTime,
          "loading": LoadTime, "front_end": FrontEnd}  # fmt: skip
"""The parts of a profile that hold numbers, by the key in its file."""
_MAXIMA = {"max_num_seqs": 1 << 17, "max_num_batched_tokens": 1 << 26, "block_size": 1 << 16, "max_model_len": 1 << 30,
         "tokens": 1e12}  # fmt: skip
"""Limits of numbers that memory, or the time of a simulation, grows with."""
_LEAST_PERIOD_S = 0.01
_MAX_SHARE = 100.0
"""The largest `output_share`: it multiplies numbers of tokens."""


def allowed_rank(rank: int) -> int:
    """The least `--max-lora-rank` that vLLM takes and that holds a rank.

    Raises:
        WorkloadError: there is none.
    """
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise WorkloadError(f"vLLM serves ranks up to {RANKS[-1]}, not {rank}")


def check_max_rank(max_rank: int) -> int:
    """Return a value of `--max-lora-rank` if vLLM takes it.

    Raises:
        WorkloadError: it does not; the next larger one that it takes is named.
    """
    if max_rank in (1, *RANKS):
        return max_rank
    listed = ", ".join(str(rank) for rank in (1, *RANKS))
    hint = f"; {allowed_rank(max_rank)} holds rank {max_rank}" if 1 < max_rank <= RANKS[-1] else ""
    raise WorkloadError(f"vLLM does not take a maximum rank of {max_rank}, only {listed}{hint}")


def built_in_profiles() -> dict[str, Path]:
    """The profiles that come with the package, by name."""
    folder = Path(str(files("deltaworks.serving") / "profiles"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find_profile(name: str) -> Profile:
    """A profile by the name of a built-in one, or from a file.

    Raises:
        ProfileError: there is none, or the file is malformed.
    """
    known = built_in_profiles()
    path = known.get(name, Path(name))
    try:
        is_file = path.is_file()
    except OSError:  # a name longer than file systems take
        is_file = False
    if not is_file:
        raise ProfileError(
            f"unknown profile {quoted(name)}; built-in profiles are {', '.join(known)}; create one with `deltaworks"
            " profile`"
        )
    return parse_profile(load_json(path, "a profile", ProfileError), str(path))


def parse_profile(content: Any, where: str) -> Profile:
    """A profile from what its file holds.

    Raises:
        ProfileError: a key is unknown or missing, a value is impossible, or it is of another version.
    """
    try:
        given = dict(check_keys(content, ["schema", *(f.name for f in fields(Profile))], where))
        if given.pop("schema", None) != SCHEMA:
            raise ProfileError(f"{where}: is not a profile of version {SCHEMA}; fit it again with `deltaworks profile`")
        parts = {name: _part(kind, given.get(name, {}), f"{where}: {name}") for name, kind in PARTS.items()}
        named: dict[str, Any] = {k: text(given.get(k), f"{where}: {k}") for k in ("name", "engine", "model", "gpu")}
        return Profile(
            **named,
            **parts,
            output_share=number(given.get("output_share", 1.0), f"{where}: output_share", above=True, most=_MAX_SHARE),
            residuals=_said(given.get("residuals", {}), f"{where}: residuals"),
            sources=_said(given.get("sources", {}), f"{where}: sources"),
            assumed=_said(given.get("assumed", {}), f"{where}: assumed"),
        )
    except WorkloadError as error:
        raise ProfileError(str(error)) from None


def _said(raw: Any, where: str) -> dict[str, Any]:
    """What a profile says of its numbers: any values, by text.

    Raises:
        WorkloadError: it is not a mapping with text as keys.
    """
    if not all(isinstance(key, str) for key in mapping(raw, where)):
        raise WorkloadError(f"{where}: expected keys and values, {instead(raw)}")
    return dict(raw)


def _part(kind: Any, raw: Any, where: str) -> Any:
    """One part of a profile; every value is a number of at least 0, or null where the default is None."""
    given: Mapping[str, Any] = check_keys(raw, [f.name for f in fields(kind)], where)
    values = {f.name: (whole if "int" in str(f.type) else number)(given[f.name], f"{where}.{f.name}",
              most=_MAXIMA.get(f.name, MAX_NUMBER)) for f in fields(kind)
              if f.name in given and (given[f.name], f.default) != (None, None)}  # fmt: skip
    missing = next((f.name for f in fields(kind) if f.name not in values and repr(f.default).startswith("<")), None)
    if missing:
        raise WorkloadError(f"{where}.{missing}: is missing")
    part = kind(**values)
    if kind is ServerFlags and (fault := flags_fault(part)):
        raise WorkloadError(f"{where}: {fault}")
    if kind is FrontEnd:
        _check_period(part.scrape_period_s, f"{where}.scrape_period_s")
    return part


def _check_period(period_s: float, where: str) -> None:
    """Refuse a period that would keep the twin reading metrics for ever."""
    if 0 < period_s < _LEAST_PERIOD_S:
        raise WorkloadError(f"{where}: expected 0 for never, or at least {_LEAST_PERIOD_S:g} s, not {period_s:g}")


def check_one_model(profiles: Sequence[Profile]) -> None:
    """Check that profiles are types of GPU for one base model: an adapter runs on no other than its own.

    Raises:
        ProfileError: they are of different base models; two of them are named.
    """
    for profile in profiles[1:]:
        if _model(profile) != _model(profiles[0]):
            raise ProfileError(
                f"{profiles[0].name} is a profile of {quoted(profiles[0].model)} and {profile.name} one of"
                f" {quoted(profile.model)}, and adapters of one base model cannot be served on another; give profiles"
                " of one model (if these are the same, write the same `model` in both files)"
            )


def _model(profile: Profile) -> str:
    """The base model, as it is compared: hub ids ignore case."""
    return profile.model.strip().rstrip("/").casefold()
