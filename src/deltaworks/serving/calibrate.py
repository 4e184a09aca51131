"""Make a profile agree with whole runs of a server: Gauss-Newton through the twin.

Micro-benchmarks see one cost at a time; a server under load pays them together. Where runs were recorded, the costs
that they show best are moved until the twin's throughput, ITL and TTFT are theirs.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import lsq_linear

from deltaworks.serving.arrays import F64
from deltaworks.serving.profile import Profile
from deltaworks.serving.simulate import Configuration, simulate
from deltaworks.serving.workload import Requests, Workload, requests_of

SPREAD = {"throughput_tps": 0.02, "itl_ms": 0.03, "ttft_ms": 0.2}
"""Relative measurement noise of each quantity; residuals are divided by it."""

Known = dict[tuple[str, str], list[float]]
"""Residuals that were computed before, by what the twin reads of the profile and the key of the run."""

_OUTLYING, _DAMPING, _STEP, _FARTHEST, _KEPT = 3.0, 0.3, 0.15, 4.0, 300_000
_SLOPE_S = 900.0
"""Seconds of a run that the slopes are measured on; what is wrong with them, Broyden's updates correct."""

_SHORTER, _SHORTEST = 0.5, 0.1
"""A step that does not help is halved, and below a tenth of its first length the search ends."""


@dataclass(frozen=True)
class Run:
    """A recorded run of a server.

    Attributes:
        workload: What it was asked.
        configuration: How it was started.
        measured: Any of `SPREAD`'s quantities, means; only what should count.
        key: A text that no other run has; empty if what is computed of this run need not be remembered.
    """

    workload: Workload
    configuration: Configuration
    measured: dict[str, float]
    key: str = ""


def calibrate(
    profile: Profile,
    runs: Sequence[Run],
    scales: dict[str, float],
    rounds: int = 12,
    passes: int = 2,
    progress: Callable[[int], None] | None = None,
    known: Known | None = None,
) -> Profile:
    """A profile whose twin agrees better with recorded runs; costs stay at least 0.

    In every pass the slope of every residual is measured once, by moving one cost at a time in the first minutes of
    every run. Broyden's rank-one update ("A class of methods for solving nonlinear simultaneous equations", 1965) then
    keeps it in line with what each step really did, so that a further round takes one run of the twin for each recorded
    run.

    Args:
        profile: Where to start.
        runs: What to agree with.
        scales: The costs to move, like ``step.adapter``, and a typical step size for each cost, in its unit.
        rounds: Steps of a pass, at most; a pass ends where shorter steps gain nothing either. Damping keeps a cost that
            nothing determines.
        passes: How many times the slopes are measured.
        progress: Called with the number of further runs of the twin that are done.
        known: Residuals from earlier calibrations, by profile and run; filled with those of this one.
    """
    known = {} if known is None else known
    kept = [_requests(run, profile) for run in runs]
    names, start = list(scales), profile
    farthest = np.full(len(names), _FARTHEST)
    nearest = np.array([-cost_of(start, n) / scales[n] for n in names])
    with ThreadPoolExecutor() as pool:

        def residuals(at: Profile, longest_s: float = np.inf) -> F64:
            digest = f"{at.digest} {at.server.max_model_len} {longest_s}"

            def one(i: int) -> list[float]:
                where = (digest, runs[i].key)
                found = known.get(where) if runs[i].key else None
                if found is None:
                    found = _residuals(at, _shortened(runs[i], longest_s), None if longest_s < np.inf else kept[i])
                    if runs[i].key:
                        known[where] = found
                return found

            found = list(pool.map(one, range(len(runs))))
            if progress:
                progress(len(runs))
            return np.concatenate(found)

        def at(point: F64) -> Profile:
            return moved(start, {n: float(p) * scales[n] for n, p in zip(names, point, strict=True)})

        point = np.zeros(len(names))
        now = residuals(start)
        for _ in range(passes):
            brief = residuals(at(point), _SLOPE_S)
            steps = np.eye(len(names)) * _STEP
            slope = np.stack([(residuals(at(point + s), _SLOPE_S) - brief) / _STEP for s in steps], axis=1)
            length = 1.0
            for _ in range(rounds):
                # Gauss-Newton on the tamed residuals; damping pulls towards the start, of the whole way.
                tamed, gentle = _tamed(now), _taming(now)
                system = np.vstack([slope * gentle[:, None], _DAMPING * np.eye(len(names))])
                wanted = np.concatenate([-tamed, -_DAMPING * point])
                bounds = np.maximum(nearest - point, -_FARTHEST) - 1e-12, farthest
                step = length * lsq_linear(system, wanted, bounds).x
                there = residuals(at(point + step))
                slope += np.outer(there - now - slope @ step, step) / max(float(step @ step), 1e-12)
                if _cost(there, point + step) < _cost(now, point):
                    point, now, length = point + step, there, 1.0
                else:
                    length *= _SHORTER
                    if length < _SHORTEST:
                        break
    return at(point)


def cost_of(profile: Profile, name: str) -> float:
    """A cost by its name in the profile's file, like ``step.adapter``."""
    part, _, key = name.partition(".")
    return float(getattr(getattr(profile, part), key))


def moved(profile: Profile, by: dict[str, float]) -> Profile:
    """A profile with some costs moved, none below 0."""
    for name, change in by.items():
        part, _, key = name.partition(".")
        value = max(cost_of(profile, name) + change, 0.0)
        profile = replace(profile, **{part: replace(getattr(profile, part), **{key: value})})
    return profile


def _cost(residuals: F64, point: F64) -> float:
    """What calibration makes small: tamed squares, and the distance from the start."""
    tamed = _tamed(residuals)
    return float(tamed @ tamed + _DAMPING**2 * (point @ point))


def _tamed(residuals: F64) -> F64:
    """Residuals whose squares grow only linearly where they are large: a run that is not understood must not rule."""
    return np.asarray(np.sign(residuals) * _OUTLYING * np.sqrt(2 * (np.sqrt(1 + (residuals / _OUTLYING) ** 2) - 1)))


def _taming(residuals: F64) -> F64:
    """The derivative of `_tamed`: 1 at 0, less where residuals are large."""
    root = np.sqrt(1 + (residuals / _OUTLYING) ** 2)
    tamed = _OUTLYING * np.sqrt(2 * (root - 1))
    return np.where(tamed > 1e-9, np.abs(residuals) / np.maximum(root * tamed, 1e-300), 1.0)


def _shortened(run: Run, longest_s: float) -> Run:
    """A run of at most so many seconds."""
    if run.workload.duration_s <= longest_s or run.workload.trace is not None:
        return run
    return replace(run, workload=replace(run.workload, duration_s=longest_s))


def _requests(run: Run, profile: Profile) -> Requests | None:
    """A run's requests, if they are few enough to keep."""
    found = requests_of(run.workload, profile.output_share)
    return found if found.arrival_s.size <= _KEPT else None


def _residuals(profile: Profile, run: Run, requests: Requests | None) -> list[float]:
    answer = simulate(run.workload, profile, run.configuration, requests)
    found = []
    for quantity, measured in run.measured.items():
        # What a client measured is of completed requests.
        said = answer["ttft_completed_ms" if quantity == "ttft_ms" else quantity]
        value = said if quantity == "throughput_tps" else said["mean"]
        found.append(float(np.log(max(value or 0.0, 1e-9) / measured)) / SPREAD[quantity])
    return found
