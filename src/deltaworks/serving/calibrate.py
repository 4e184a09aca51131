"""Make a profile agree with whole runs of a server: Gauss-Newton through the twin.

Micro-benchmarks see one cost at a time; a server under load pays them together. Where runs were recorded, the costs
that they show best are moved until the twin's throughput, ITL and TTFT are theirs.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import lsq_linear

from deltaworks.serving.profile import Profile
from deltaworks.serving.server import F64
from deltaworks.serving.simulate import Configuration, simulate
from deltaworks.serving.workload import Requests, Workload, requests_of

SPREAD = {"throughput_tps": 0.02, "itl_ms": 0.03, "ttft_ms": 0.2}
"""Relative deviations that are alike: a run's throughput is known better than its TTFT."""

_OUTLYING, _DAMPING, _STEP, _FARTHEST, _WORTHWHILE, _KEPT = 3.0, 0.3, 0.15, 4.0, 0.02, 300_000


@dataclass(frozen=True)
class Run:
    """A recorded run of a server.

    Attributes:
        workload: What it was asked.
        configuration: How it was started.
        measured: Any of `SPREAD`'s quantities, means; only what should count.
    """

    workload: Workload
    configuration: Configuration
    measured: dict[str, float]


def calibrate(
    profile: Profile,
    runs: Sequence[Run],
    scales: dict[str, float],
    rounds: int = 4,
    progress: Callable[[int], None] | None = None,
) -> Profile:
    """A profile whose twin agrees better with recorded runs; costs stay at least 0.

    Args:
        profile: Where to start.
        runs: What to agree with.
        scales: The costs to move, like ``step.adapter``, and by how much one would naturally move them, in their unit.
        rounds: Gauss-Newton steps at most, each damped so that a cost which nothing determines stays; fewer where
            a step gains little.
        progress: Told how many more runs of the twin are done.
    """
    kept = [_requests(run, profile) for run in runs]
    names = list(scales)
    with ThreadPoolExecutor() as pool:

        def residuals(at: Profile) -> F64:
            found = list(pool.map(lambda i: _residuals(at, runs[i], kept[i]), range(len(runs))))
            if progress:
                progress(len(runs))
            return _tamed(np.concatenate(found))

        best, least_cost = profile, np.inf
        for turn in range(rounds + 1):
            now = residuals(profile)
            cost = float(now @ now)
            gained = cost < least_cost * (1 - _WORTHWHILE)
            if cost < least_cost:
                best, least_cost = profile, cost
            if not gained or turn == rounds:
                break
            slope = np.stack([(residuals(moved(profile, {n: _STEP * scales[n]})) - now) / _STEP for n in names], axis=1)
            bounds = np.array([-cost_of(profile, n) / scales[n] for n in names]) - 1e-12, np.full(len(names), _FARTHEST)
            system = np.vstack([slope, _DAMPING * np.eye(len(names))])
            step = lsq_linear(system, np.concatenate([-now, np.zeros(len(names))]), bounds).x
            profile = moved(profile, {n: s * scales[n] for n, s in zip(names, step, strict=True)})
    return best


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


def _tamed(residuals: F64) -> F64:
    """Residuals whose squares grow only linearly where they are large: a run that is not understood must not rule."""
    return np.asarray(np.sign(residuals) * _OUTLYING * np.sqrt(2 * (np.sqrt(1 + (residuals / _OUTLYING) ** 2) - 1)))


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
