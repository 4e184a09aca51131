"""What becomes of elements whose merge hangs on all experts at once, seen through samples of them."""

import math

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import kernel

SUM, ELECT, ELECT_AND_DIVIDE = 0, 1, 2
"""Rules by which values of several experts combine: their sum; the sum of those whose sign that sum has; the same,
divided by the weights of those."""


@kernel
def stretch_samples(
    samples: NDArray[np.float32],
    thresholds: NDArray[np.int64],
    equal_until: NDArray[np.int64],
    places: NDArray[np.int64],
    exact: NDArray[np.float64],
    each: NDArray[np.float64],
    limit: float,
    weights: NDArray[np.float64],
    alone: NDArray[np.float64],
    out: NDArray[np.float32],
    residual: NDArray[np.float64],
    factors: NDArray[np.float32],
) -> None:
    """Thin samples of the experts' deltas, and scale them so that each stands for its whole block.

    Args:
        samples: float32, [experts, blocks, samples].
        thresholds: int64, [experts]; bits of the least magnitude that stays.
        equal_until: int64, [experts]; flat index before which magnitudes equal to it stay.
        places: int64, [blocks, samples]; flat indices of the samples.
        exact: float64, [experts, blocks]; squares of the block's thinned delta.
        each: float64, [blocks]; elements that one sample stands for.
        limit: how much a sample may be scaled by, either way.
        weights: float64, [experts]; what each delta is multiplied by.
        alone: float64, [experts]; what its elements are multiplied by where nobody else has one.
        out: float32, [blocks, experts, samples]; set.
        residual: float64, [blocks, experts]; set to the squares that the scaled samples do not show.
        factors: float32, [blocks, experts]; set to what each sample that stays was multiplied by.
    """
    experts, blocks, count = samples.shape
    for e in range(experts):
        for b in range(blocks):
            row, target, bits = samples[e, b], out[b, e], samples[e, b].view(np.uint32)
            seen = 0.0
            for s in range(count):
                magnitude = np.int64(bits[s] & np.uint32(0x7FFFFFFF))
                stays = magnitude > thresholds[e] or (magnitude == thresholds[e] and places[b, s] < equal_until[e])
                target[s] = row[s] if stays else np.float32(0.0)
                seen += np.float64(target[s]) * target[s]
            seen *= each[b]
            stretch = min(limit, max(1.0 / limit, math.sqrt(exact[e, b] / seen))) if seen > 0.0 else 1.0
            factors[b, e] = factor = np.float32(stretch * math.sqrt(each[b]) * weights[e])
            for s in range(count):
                target[s] *= factor
            residual[b, e] = max(exact[e, b] - stretch * stretch * seen, 0.0) * alone[e] * alone[e]


@kernel
def elected_path(
    samples: NDArray[np.float32],
    residual: NDArray[np.float64],
    weights: NDArray[np.float32],
    rule: int,
    order: NDArray[np.int64],
    run: int,
    left: NDArray[np.float64],
) -> None:
    """What is left of the squared error, over all places, as experts join one after another.

    Args:
        samples: as `elected_loss` takes them, as are the next three.
        residual: see there.
        weights: see there.
        rule: see there.
        order: int64, [places / run, experts]; who joins when.
        run: how many places share an order.
        left: float64, [experts + 1]; set to the error before anyone joined, after the first, and so on.
    """
    places, experts, count = samples.shape
    sums = np.empty((4, count), np.float32)
    goal = np.empty(count, np.float32)
    left[:] = 0.0
    for p in range(places):
        sums[:] = np.float32(0.0)
        missing = 0.0
        for e in range(experts):
            join(samples[p, e], weights[e], sums)
            missing += residual[p, e]
        for s in range(count):
            goal[s] = elected(sums[0, s], sums[1, s], sums[2, s], sums[3, s], rule)
        sums[:] = np.float32(0.0)
        for rank in range(experts + 1):
            if rank > 0:
                e = order[p // run, rank - 1]
                join(samples[p, e], weights[e], sums)
                missing -= residual[p, e]
            error = 0.0
            for s in range(count):
                off = goal[s] - elected(sums[0, s], sums[1, s], sums[2, s], sums[3, s], rule)
                error += np.float64(off) * off
            left[rank] += error + max(missing, 0.0)


@kernel
def elected_loss(
    samples: NDArray[np.float32],
    residual: NDArray[np.float64],
    weights: NDArray[np.float32],
    rule: int,
    chosen: NDArray[np.bool_],
) -> float:
    """What is lost where some experts are not read, by merging a sample of elements.

    Args:
        samples: float32, [places, experts, samples]; weighted, thinned deltas.
        residual: float64, [places, experts]; squares that the samples do not show.
        weights: float32, [experts].
        rule: SUM, ELECT or ELECT_AND_DIVIDE.
        chosen: bool, [places, experts]; who is read.

    Returns:
        The squared error over all places.
    """
    places, experts, count = samples.shape
    sums = np.empty((4, count), np.float32)
    kept = np.empty((4, count), np.float32)
    total = 0.0
    for p in range(places):
        sums[:] = np.float32(0.0)
        kept[:] = np.float32(0.0)
        for e in range(experts):
            join(samples[p, e], weights[e], sums)
            if chosen[p, e]:
                join(samples[p, e], weights[e], kept)
            else:
                total += residual[p, e]
        for s in range(count):
            goal = np.float64(elected(sums[0, s], sums[1, s], sums[2, s], sums[3, s], rule))
            value = np.float64(elected(kept[0, s], kept[1, s], kept[2, s], kept[3, s], rule))
            total += (goal - value) ** 2
    return total


@kernel
def elected_layers_loss(
    told: NDArray[np.float32],
    owners: NDArray[np.int64],
    depths: NDArray[np.int8],
    weights: NDArray[np.float32],
    rule: int,
) -> float:
    """Squared error of what the samples show; see `Sampled.told_loss` for the arguments."""
    parts, experts, _, count = told.shape
    sums, kept = np.empty((4, count), np.float32), np.empty((4, count), np.float32)
    seen = np.empty(count, np.float32)
    total = 0.0
    for g in range(parts):
        sums[:] = np.float32(0.0)
        kept[:] = np.float32(0.0)
        for e in range(experts):
            join(told[g, e, told.shape[2] - 1], weights[e], sums)
            for s in range(count):
                seen[s] = told[g, e, depths[owners[g, s], e], s]
            join(seen, weights[e], kept)
        for s in range(count):
            goal = np.float64(elected(sums[0, s], sums[1, s], sums[2, s], sums[3, s], rule))
            value = np.float64(elected(kept[0, s], kept[1, s], kept[2, s], kept[3, s], rule))
            total += (goal - value) ** 2
    return total


@kernel
def join(values: NDArray[np.float32], weight: np.float32, sums: NDArray[np.float32]) -> None:
    """Let an expert take part: `sums` are positive values, their weights, negative values, their weights."""
    zero = np.float32(0.0)
    positive, for_positive, negative, for_negative = sums[0], sums[1], sums[2], sums[3]
    # Without branches, as many at a time as a vector holds.
    for s in range(len(values)):
        x = values[s]
        positive[s] += max(zero, x)
        for_positive[s] += weight if x > zero else zero
        negative[s] += min(zero, x)
        for_negative[s] += weight if x < zero else zero


@kernel
def elected(
    positive: np.float32, for_positive: np.float32, negative: np.float32, for_negative: np.float32, rule: int
) -> np.float32:
    """What comes out where such sums of both signs meet."""
    if rule == SUM:
        return positive + negative
    value, weight = (positive, for_positive) if positive + negative >= np.float32(0.0) else (negative, for_negative)
    if rule == ELECT_AND_DIVIDE and weight != np.float32(0.0):
        value = value / weight
    return value
