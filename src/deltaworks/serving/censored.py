"""Statistics of waits of which some are not over: the Kaplan-Meier estimate.

A request without its first token when time is up has waited for at least the time since its arrival. Leaving it out
flatters a server that shuts requests out; counting it at the time waited so far flatters it as well, and blames it for
requests that arrived a moment ago. Kaplan and Meier (JASA 1958) take it for what it is, a right-censored observation.
Its share is spread evenly over the longer waits (Efron, Berkeley Symposium 1967); where there are none, the longest
time seen stands for it, which makes the statistic a lower bound.
"""

import numpy as np

from deltaworks.serving.arrays import F64

_NOTHING: F64 = np.empty(0)
QUANTILES = {"p50": 0.5, "p99": 0.99}


def statistics(seconds: F64, waiting: F64 = _NOTHING) -> dict[str, float | None]:
    """Mean, median and 99th percentile in milliseconds; None where nothing was observed at all.

    Without anything that still waits these are the plain ones (quantiles linear between observations); with it they
    are never below those of all times taken as they are.

    Args:
        seconds: Times of what is over, (n,) float64.
        waiting: Times so far of what is not, (m,) float64.
    """
    if not seconds.size + waiting.size:
        return {"mean": None, **dict.fromkeys(QUANTILES)}
    if not waiting.size:
        found = np.percentile(seconds, [100 * q for q in QUANTILES.values()])
        return {
            "mean": 1000 * float(seconds.mean()),
            **{n: 1000 * float(v) for n, v in zip(QUANTILES, found, strict=True)},
        }
    times, weight = _weighted(seconds, waiting)
    total = float(seconds.size + waiting.size)
    ends = np.cumsum(weight)
    # As if each time were there as often as its weight says: it fills the places from `starts` to `ends - 1`.
    places = np.stack([ends - weight, ends - 1.0], 1).ravel()
    found = np.interp([q * (total - 1.0) for q in QUANTILES.values()], places, np.repeat(times, 2))
    mean = float((times * weight).sum() / total)
    return {"mean": 1000 * mean, **{n: 1000 * float(v) for n, v in zip(QUANTILES, found, strict=True)}}


def _weighted(seconds: F64, waiting: F64) -> tuple[F64, F64]:
    """Times in order, and how many observations each stands for, at least 1; the weights add up to all of them."""
    times = np.concatenate([seconds, waiting])
    # Of equal times, those that are over come first.
    order = np.argsort(times, kind="stable")
    over = order < seconds.size
    over[-1] = True
    after = np.arange(times.size - 1, -1, -1)
    passed_on = np.where(over, 1.0, (after + 1) / np.maximum(after, 1))
    weight = np.concatenate([[1.0], np.cumprod(passed_on)[:-1]])
    return times[order][over], weight[over]
