"""Streams of requests: when they come, from a seed, the same on every machine.

Every adapter has a stream of its own, seeded by its name: moving an adapter to another server, or adding one, changes
no other's requests.
"""

import math

import numpy as np

from deltaworks.checkpoints.jit import kernel
from deltaworks.serving.arrays import F64, I64, U64


@kernel
def _next(state: U64) -> np.uint64:
    """Splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    mixed = state[0]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.uint64(mixed ^ (mixed >> np.uint64(31)))


@kernel
def uniform(state: U64) -> float:
    """A number in (0, 1) from a generator's state, (1,) uint64, which moves on."""
    return (np.float64(_next(state) >> np.uint64(11)) + 0.5) * (1.0 / 9007199254740992.0)


@kernel
def _gamma(state: U64, shape: float) -> float:
    """A gamma variate of scale 1 (Marsaglia and Tsang, ACM TOMS 2000; below shape 1 with their boost)."""
    boost = 1.0
    if shape < 1.0:
        boost = uniform(state) ** (1.0 / shape)
        shape += 1.0
    d = shape - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        normal = math.sqrt(-2.0 * math.log(uniform(state))) * math.cos(2.0 * math.pi * uniform(state))
        v = (1.0 + c * normal) ** 3
        if v > 0.0 and math.log(uniform(state)) < 0.5 * normal * normal + d - d * v + d * math.log(v):
            return boost * d * v


@kernel
def poisson_counts(seeds: U64, expected: F64) -> I64:
    """Requests of each adapter: what is expected of it, rounded up or down at random.

    Args:
        seeds: Of the adapters' streams, (adapters,) uint64.
        expected: Requests expected of each, (adapters,) float64.
    """
    counts = np.empty(expected.size, np.int64)
    state = np.empty(1, np.uint64)
    for i in range(expected.size):
        state[0] = seeds[i]
        counts[i] = math.floor(expected[i] + uniform(state))
    return counts


@kernel
def poisson(seeds: U64, counts: I64, bounds_s: F64, mass: F64, times: F64) -> None:
    """Fill in the times of Poisson streams, given how many requests each has: then they are uniform in the mass.

    Args:
        seeds: Of the adapters' streams, (adapters,) uint64.
        counts: Requests of each, (adapters,) int64.
        bounds_s: Where rates change, with the ends, (adapters, pieces + 1) float64.
        mass: Requests expected before each of them, (adapters, pieces + 1) float64.
        times: Out: adapter after adapter, (sum of counts,) float64, in seconds.
    """
    state = np.empty(1, np.uint64)
    at = 0
    for i in range(counts.size):
        state[0] = seeds[i] ^ np.uint64(0xA5A5A5A5A5A5A5A5)
        total = mass[i, mass.shape[1] - 1]
        for _ in range(counts[i]):
            wanted = uniform(state) * total
            piece = 0
            while mass[i, piece + 1] < wanted:
                piece += 1
            share = (wanted - mass[i, piece]) / (mass[i, piece + 1] - mass[i, piece])
            times[at] = bounds_s[i, piece] + share * (bounds_s[i, piece + 1] - bounds_s[i, piece])
            at += 1


@kernel
def renewal(seed: np.uint64, shape: float, bounds_s: F64, mass: F64, times: F64) -> int:
    """Fill in the times of a stream whose gaps, in expected requests, are gamma distributed; returns how many.

    Args:
        seed: Of the stream.
        shape: Of the gamma distribution: 1 is Poisson, less is burstier; the gaps' squared variation is 1 / shape.
        bounds_s: Where the rate changes, with the ends, (pieces + 1,) float64.
        mass: Requests expected before each of them, (pieces + 1,) float64.
        times: Out: (room,) float64, in seconds; the stream ends where the room does.
    """
    state = np.empty(1, np.uint64)
    state[0] = seed ^ np.uint64(0xA5A5A5A5A5A5A5A5)
    # In equilibrium the time since the last request is a uniform share of a gap chosen by its length.
    wanted = uniform(state) * _gamma(state, shape + 1.0) / shape
    piece, found = 0, 0
    while wanted < mass[mass.size - 1] and found < times.size:
        while mass[piece + 1] <= wanted:
            piece += 1
        share = (wanted - mass[piece]) / (mass[piece + 1] - mass[piece])
        times[found] = bounds_s[piece] + share * (bounds_s[piece + 1] - bounds_s[piece])
        found += 1
        wanted += _gamma(state, shape) / shape
    return found


_FULL = 4096
"""Requests of one bucket beyond which a merge sort is quicker than insertion."""


@kernel
def in_order(times: F64, adapter: I64, prompt: I64, output: I64, duration_s: float) -> tuple[F64, I64, I64, I64]:
    """Requests sorted by time, equal ones by their place: buckets, then insertion within them.

    Where requests crowd into a small part of the duration, buckets are too full for insertion, and a merge sort, which
    gives the same order, is quicker.

    Args:
        times: (n,) float64, in [0, duration].
        adapter: (n,) int64; sorted along, as the next two.
        prompt: (n,) int64.
        output: (n,) int64.
        duration_s: No time is later.
    """
    n = times.size
    buckets = max(n // 4, 1)
    scale = buckets / max(duration_s, 1e-300)
    starts = np.zeros(buckets + 1, np.int64)
    for i in range(n):
        starts[min(int(times[i] * scale), buckets - 1) + 1] += 1
    if starts.max() > _FULL:
        order = np.argsort(times, kind="mergesort")
        return times[order], adapter[order], prompt[order], output[order]
    for b in range(buckets):
        starts[b + 1] += starts[b]
    at, who, asked, given = np.empty(n), np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    for i in range(n):
        bucket = min(int(times[i] * scale), buckets - 1)
        place = starts[bucket]
        starts[bucket] += 1
        at[place], who[place], asked[place], given[place] = times[i], adapter[i], prompt[i], output[i]
    for i in range(1, n):
        time, a, p, o, j = at[i], who[i], asked[i], given[i], i
        while j > 0 and at[j - 1] > time:
            at[j], who[j], asked[j], given[j] = at[j - 1], who[j - 1], asked[j - 1], given[j - 1]
            j -= 1
        at[j], who[j], asked[j], given[j] = time, a, p, o
    return at, who, asked, given


STRATA = 64


@kernel
def quantiles(seeds: U64, counts: I64, salt: np.uint64, out: F64) -> None:
    """Fill in a number in (0, 1) for each request, evenly spread within every 64 requests of an adapter.

    A mean over few requests is then close to the distribution's: one run says what many would.

    Args:
        seeds: Of the adapters' streams, (adapters,) uint64.
        counts: Requests of each, (adapters,) int64.
        salt: What the numbers are for.
        out: Out: adapter after adapter, (sum of counts,) float64.
    """
    state = np.empty(1, np.uint64)
    strata = np.empty(STRATA, np.int64)
    at = 0
    for i in range(counts.size):
        state[0] = seeds[i] ^ salt
        for j in range(counts[i]):
            turn = j % STRATA
            if turn == 0:
                size = min(STRATA, counts[i] - j)
                for k in range(size):
                    strata[k] = k
                for k in range(size - 1, 0, -1):
                    other = int(uniform(state) * (k + 1))
                    strata[k], strata[other] = strata[other], strata[k]
            out[at] = (strata[turn] + uniform(state)) / size
            at += 1


@kernel
def _quantile(values: F64, chosen: float) -> float:
    """A value of a distribution at a quantile in (0, 1), linear between those known."""
    place = min(max(chosen * values.size - 0.5, 0.0), values.size - 1.0)
    below = int(place)
    above = min(below + 1, values.size - 1)
    return float(values[below] + (place - below) * (values[above] - values[below]))


@kernel
def tokens(prompts: F64, outputs: F64, opposed: float, chosen: F64, prompt: I64, output: I64) -> None:
    """Fill in prompt and output tokens, at least 1 each, from numbers in (0, 1).

    Args:
        prompts: The distribution of prompts at the quantiles (i + 1/2) / q, (q,) float64.
        outputs: The same of outputs.
        opposed: The share of requests whose output is at the quantile opposite to the prompt's.
        chosen: For the prompt, for the output, and for all else, (3, n) float64.
        prompt: Out: (n,) int64.
        output: Out: (n,) int64.
    """
    for i in range(prompt.size):
        other = chosen[1, i] if chosen[2, i] >= opposed else 1.0 - chosen[0, i]
        # A fraction of a token is rounded up as often as it says, so that means stay.
        up = (chosen[2, i] * 7919.0) % 1.0
        prompt[i] = max(1, int(_quantile(prompts, chosen[0, i]) + up))
        output[i] = max(1, int(_quantile(outputs, other) + up))
