"""How long prompts and outputs are: distributions of tokens, by their quantiles."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

from deltaworks.errors import WorkloadError, quoted
from deltaworks.serving.arrays import F64
from deltaworks.serving.schema import check_keys, number, text

SHAREGPT_PROMPT = (
    28974, 7737, 4105, 2763, 2289, 2053, 2053, 2132, 2211, 2289, 2526, 2447, 2289, 1974, 1816, 1500, 1342, 1342,
    1263, 1184, 1026, 947, 1026, 947, 868, 868, 947, 947, 868, 711,
)  # fmt: skip
SHAREGPT_OUTPUT = (
    32287, 8182, 6422, 6598, 6774, 5806, 4311, 2991, 2199, 1584, 1232, 1232, 968, 968, 880, 352, 88, 88, 88, 88, 0, 88,
    88, 0, 0, 0, 0, 0, 0, 0,
)  # fmt: skip
"""Conversations of ShareGPT V3 by prompt tokens (30 bins from 4 to 1,024) and by output tokens (30 bins from 4 to
2,018), of the Llama 2 tokenizer, as filtered by vLLM's benchmark. Source: the histograms published with arXiv
2508.08343."""

SHAREGPT_OPPOSED = 0.43
"""The share of those conversations in which a long prompt has a short answer and the other way round; in the others
they are independent. Found from the KV cache in use in real runs: 360 tokens a running request, where independent
lengths would need 435."""

DISTRIBUTIONS = ("sharegpt", "fixed", "lognormal", "trace")
_FINEST = 4096

MAX_TOKENS = 10_000_000
"""Tokens of a prompt, or of an output, at most: no model has so large a context."""
MAX_LENGTHS = 10_000
"""Different lengths of a workload's adapters, at most; each takes 64 kB."""


@dataclass(frozen=True)
class Lengths:
    """Prompt and output lengths of requests.

    Attributes:
        distribution: One of `DISTRIBUTIONS`.
        prompt: Tokens of prompts at evenly spaced quantiles, the middle of each of them first, (q,) float64.
        output: The same of outputs. What was asked for: a model may stop earlier (see `stops_early`).
        opposed: The share of requests whose prompt and output are at opposite quantiles; the others' are independent.
    """

    distribution: str
    prompt: F64
    output: F64
    opposed: float = 0.0

    @property
    def stops_early(self) -> bool:
        """Whether outputs are what a data set's reference answers hold, which a model need not reach."""
        return self.distribution == "sharegpt"


def _histogram(counts: tuple[int, ...], left: float, right: float, mean: float) -> F64:
    """Quantiles of a histogram, stretched to a mean."""
    shares = np.concatenate([[0.0], np.cumsum(counts)]) / sum(counts)
    edges = np.linspace(left, right, len(counts) + 1)
    return scaled(np.interp((np.arange(_FINEST) + 0.5) / _FINEST, shares, edges), mean)


def scaled(values: F64, mean: float) -> F64:
    """A distribution stretched so that its mean is ``mean``."""
    return np.asarray(values * (mean / values.mean()))


def _lognormal(mean: float, deviation: float) -> F64:
    """Quantiles of a lognormal distribution with a mean and a standard deviation."""
    sigma = math.sqrt(math.log1p((deviation / mean) ** 2))
    return scaled(np.exp(_normal_quantiles() * sigma), mean)


@cache
def _normal_quantiles() -> F64:
    """Quantiles of the standard normal distribution, (`_FINEST`,) float64."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / _FINEST) for i in range(_FINEST)])


def parse_lengths(raw: Any, where: str, from_trace: Any) -> Lengths:
    """Lengths as a workload writes them.

    Args:
        raw: ``{distribution: sharegpt, input_mean: 222.7, output_mean: 196.1}``, or ``fixed`` with the same keys, or
            ``lognormal`` with ``input_sd`` and ``output_sd`` as well, or ``{distribution: trace, path: FILE}``.
        where: What to call it in errors.
        from_trace: A function from a path and a format to the prompt and output tokens of a trace's requests.

    Raises:
        WorkloadError: it does not describe lengths.
    """
    known = ("distribution", "input_mean", "output_mean", "input_sd", "output_sd", "path", "format")
    given = check_keys(raw, known, where)
    kind = given.get("distribution", "sharegpt")
    if not isinstance(kind, str) or kind not in DISTRIBUTIONS:
        raise WorkloadError(f"{where}.distribution: {quoted(kind)} is not one of {', '.join(DISTRIBUTIONS)}")
    if kind == "trace":
        _only(given, ("distribution", "path", "format"), where, kind)
        prompt, output = from_trace(text(given.get("path"), f"{where}.path"), given.get("format"))
        return Lengths(kind, np.sort(prompt).astype(np.float64), np.sort(output).astype(np.float64))
    deviations = ("input_sd", "output_sd") if kind == "lognormal" else ()
    _only(given, ("distribution", "input_mean", "output_mean", *deviations), where, kind)
    means = [_length(given, key, where) for key in ("input_mean", "output_mean")]
    if kind == "fixed":
        return Lengths(kind, np.array([means[0]]), np.array([means[1]]))
    if kind == "lognormal":
        prompt, output = (_lognormal(m, _length(given, key, where)) for m, key in zip(means, deviations, strict=True))
        return Lengths(kind, prompt, output)
    return Lengths(
        kind,
        _histogram(SHAREGPT_PROMPT, 4, 1024, means[0]),
        _histogram(SHAREGPT_OUTPUT, 4, 2018, means[1]),
        SHAREGPT_OPPOSED,
    )


class KeptLengths:
    """The lengths of a workload's adapters, made once where they are written alike.

    Args:
        from_trace: As in `parse_lengths`.
    """

    def __init__(self, from_trace: Callable[[str, str | None], Any]) -> None:
        self._from_trace = from_trace
        self._made: dict[str, Lengths] = {}

    def parse(self, raw: Any, where: str) -> Lengths:
        """Lengths as `parse_lengths` reads them.

        Raises:
            WorkloadError: it does not describe lengths, or there are too many different ones.
        """
        plain = isinstance(raw, Mapping) and all(isinstance(value, str | int | float) for value in raw.values())
        key = json.dumps(list(raw.items())) if plain else ""
        if key not in self._made:
            if len(self._made) == MAX_LENGTHS:
                raise WorkloadError(f"{where}: the adapters have more than {MAX_LENGTHS:,} different lengths")
            self._made[key] = parse_lengths(raw, where, self._from_trace)
        return self._made[key]


def _length(given: Mapping[str, Any], key: str, where: str) -> float:
    if key not in given:
        raise WorkloadError(f"{where}: {key} is missing; give a number of tokens")
    least = 1.0 if key.endswith("mean") else 0.0
    return number(given[key], f"{where}.{key}", least, above=key.endswith("sd"), most=MAX_TOKENS)


def _only(given: Mapping[str, Any], known: tuple[str, ...], where: str, kind: str) -> None:
    for key in given:
        if key not in known:
            raise WorkloadError(f"{where}.{key}: not for the distribution {kind!r}, which takes {', '.join(known[1:])}")
