"""The experiments that a surrogate learns from: servers and traffic spread over what may be asked, and the twin's word.

A seeded Sobol sequence chooses how many adapters there are, how skewed their rates, which ranks and how long requests;
how much of its time the GPU would need for the traffic (a fifth to twice what it has), and how many slots adapters
would like to hold for each that there is (0.15 to 3). What there is to learn lies around the edge, and nobody asks
about servers far beyond it. Runs are made in parallel and kept in chunks: a training that was stopped goes on where it
was.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import qmc

from deltaworks.serving.arrays import F64
from deltaworks.serving.estimate import FEATURES, Traffic, estimate, traffic_of
from deltaworks.serving.lengths import Lengths, parse_lengths
from deltaworks.serving.profile import RANKS, Profile, allowed_rank
from deltaworks.serving.simulate import Configuration, simulate
from deltaworks.serving.traces import zipf_shares
from deltaworks.serving.workload import Adapter, Workload

VERSION = 1
"""Of the design and of the twin: runs of another version are not used."""

CHUNK = 256
_DIMENSIONS = 11
_MIN_ADAPTERS, _MAX_ADAPTERS = 2, 1000
_MAX_REQUESTS = 60_000
_DURATIONS = (900.0, 1800.0, 3600.0)
_RANK_SETS = ((8,), (16,), (32,), (8, 16), (8, 32), (8, 16, 32), (16, 64), (8, 16, 32, 64))
_UTILISATION, _PRESSURE = (0.2, 2.0), (0.15, 3.0)
_NAMES = list(FEATURES)


@dataclass(frozen=True)
class Runs:
    """Runs of the twin.

    Attributes:
        features: (runs, features) float64, as `FEATURES`.
        share: Throughput, of the tokens offered, (runs,) float64.
        starved: (runs,) bool.
        offered_tps: (runs,) float64.
    """

    features: F64
    share: F64
    starved: np.ndarray[tuple[int], np.dtype[np.bool_]]
    offered_tps: F64


@dataclass(frozen=True)
class Experiment:
    """A workload and the server that it is given to."""

    workload: Workload
    slots: int
    max_rank: int


def experiments(profile: Profile, seed: int, start: int, count: int) -> list[Experiment]:
    """Some experiments of a design, from the ``start``-th on; each is the same whatever else is asked."""
    sequence = qmc.Sobol(_DIMENSIONS, rng=np.random.default_rng(seed))
    if start:
        sequence.fast_forward(start)
    return [_experiment(profile, point, seed + start + i) for i, point in enumerate(sequence.random(count))]


def _experiment(profile: Profile, at: F64, seed: int) -> Experiment:
    adapters = int(_between(at[0], _MIN_ADAPTERS, _MAX_ADAPTERS + 1))
    ranks = _RANK_SETS[int(at[1] * len(_RANK_SETS))]
    duration_s = _DURATIONS[int(at[2] * len(_DURATIONS))]
    lengths = _lengths(at[3], at[4], at[5])
    shares = zipf_shares(adapters, 1.6 * at[6]) if at[6] > 0.3 else _levels(adapters, at[6] / 0.3)
    order = np.random.default_rng(seed).permutation(adapters)
    burstiness = 1.0 if at[7] < 0.75 else 0.25 + 0.75 * (at[7] - 0.75) / 0.25
    max_rank = allowed_rank(max(ranks))
    if at[9] > 0.85:
        max_rank = RANKS[min(RANKS.index(max_rank) + 1, RANKS.index(64))]

    def workload(scale: float) -> Workload:
        listed = tuple(
            Adapter(f"a{i:04}", ranks[int(order[i]) % len(ranks)], ((0.0, float(shares[i] * scale)),), burstiness)
            for i in range(adapters)
        )
        return Workload(duration_s, seed, listed, lengths)

    one = traffic_of(workload(1.0), profile.output_share)
    most = max(min(adapters, profile.most_slots(max_rank)), 1)
    slots, utilisation, pressure = most, _between(at[8], *_UTILISATION), _between(at[10], *_PRESSURE)
    for _ in range(3):
        scale = _scaled_to(one, profile, slots, max_rank, utilisation)
        held = slots * estimate(one.scaled(scale), profile, slots, max_rank)[_NAMES.index("slot_pressure")]
        slots = min(max(round(held / pressure), 1), most)
    return Experiment(workload(min(scale, _MAX_REQUESTS / duration_s)), slots, max_rank)


def _scaled_to(traffic: Traffic, profile: Profile, slots: int, max_rank: int, utilisation: float) -> float:
    """How much traffic brings a server to a utilisation."""
    least, most = 1e-4, 1e4
    for _ in range(24):
        middle = float(np.sqrt(least * most))
        if estimate(traffic.scaled(middle), profile, slots, max_rank)[0] < utilisation:
            least = middle
        else:
            most = middle
    return most


def _between(at: float, low: float, high: float) -> float:
    """A place between two bounds, evenly in the logarithm."""
    return float(low * (high / low) ** at)


def _levels(adapters: int, at: float) -> F64:
    """Three rates dealt out in turn, as shares; equal ones at 0."""
    rates = np.array([1.0, (1 - at) * 0.9 + 0.1, ((1 - at) * 0.9 + 0.1) ** 2])[np.arange(adapters) % 3]
    return np.asarray(rates / rates.sum())


def _lengths(kind: float, prompt: float, output: float) -> Lengths:
    """Half the workloads are conversations; the others have prompts and outputs of 30 to 2,000 and 20 to 800 tokens."""
    if kind < 0.5:
        return parse_lengths({"distribution": "sharegpt", "input_mean": 120 + 200 * prompt,
                              "output_mean": 120 + 160 * output}, "lengths", None)  # fmt: skip
    means = {"input_mean": _between(prompt, 30, 2000), "output_mean": _between(output, 20, 800)}
    if kind < 0.7:
        return parse_lengths({"distribution": "fixed", **means}, "lengths", None)
    spread = {"input_sd": means["input_mean"], "output_sd": means["output_mean"]}
    return parse_lengths({"distribution": "lognormal", **means, **spread}, "lengths", None)


def runs(
    profile: Profile, seed: int, count: int, folder: Path | None = None, progress: Callable[[int], None] | None = None
) -> Runs:
    """The twin's runs of a design.

    Args:
        profile: Of the server.
        seed: Of the design.
        count: How many.
        folder: Where chunks are kept, and looked for first.
        progress: Told how many more are done.
    """
    tables = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            path = None if folder is None else folder / f"design-{VERSION}-{seed}-{start}-{size}.parquet"
            if (table := _kept(path)) is not None:
                tables.append(table)
                if progress:
                    progress(size)
                continue
            rows = []
            asked = experiments(profile, seed, start, size)
            for row in pool.map(lambda experiment: _row(profile, experiment), asked):
                rows.append(row)
                if progress:
                    progress(1)
            table = pa.table(
                {name: np.array(column) for name, column in zip(_COLUMNS, zip(*rows, strict=True), strict=True)}
            )
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(f".{os.getpid()}")
                pq.write_table(table, partial)
                partial.replace(path)
            tables.append(table)
    found = pa.concat_tables(tables)
    columns = {name: found[name].to_numpy() for name in _COLUMNS}
    return Runs(
        np.stack([columns[name] for name in FEATURES], 1), columns["share"], columns["starved"] > 0.5,
        columns["offered_tps"],
    )  # fmt: skip


def _kept(path: Path | None) -> pa.Table | None:
    """Runs that were kept, unless of other features."""
    if path is None or not path.is_file():
        return None
    table = pq.read_table(path)
    return table if tuple(table.column_names) == _COLUMNS else None


_COLUMNS = (*FEATURES, "share", "starved", "offered_tps")


def _row(profile: Profile, experiment: Experiment) -> tuple[float, ...]:
    traffic = traffic_of(experiment.workload, profile.output_share)
    # Surrogates know nothing of the model's length.
    unlimited = replace(profile, server=replace(profile.server, max_model_len=None))
    answer = simulate(experiment.workload, unlimited, Configuration(experiment.slots, experiment.max_rank))
    offered = float(answer["offered_tps"])
    share = float(answer["throughput_tps"]) / offered if offered else 1.0
    features = estimate(traffic, profile, experiment.slots, experiment.max_rank)
    return (*features.tolist(), min(share, 1.0), float(answer["starved_server"]), offered)


def unlabelled(profile: Profile, seed: int, count: int, progress: Callable[[int], None] | None = None) -> F64:
    """The features of a design's experiments, not run: (count, features) float64."""
    rows = []
    for start in range(0, count, CHUNK):
        for experiment in experiments(profile, seed, start, min(CHUNK, count - start)):
            traffic = traffic_of(experiment.workload, profile.output_share)
            rows.append(estimate(traffic, profile, experiment.slots, experiment.max_rank))
            if progress:
                progress(1)
    return np.stack(rows)
