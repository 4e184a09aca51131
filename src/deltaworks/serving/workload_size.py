"""Limits on workload size, checked before memory is allocated."""

from typing import TYPE_CHECKING

from deltaworks.errors import WorkloadError
from deltaworks.serving.traces import MAX_REQUESTS
from deltaworks.wording import counted

if TYPE_CHECKING:
    from deltaworks.serving.workload import Workload

MAX_DURATION_S = 366 * 86_400.0
"""Seconds of a workload, at most: a year."""
MIN_DURATION_S = 1e-3
"""Seconds of a workload, at least: less than any step of a server."""
MAX_ADAPTERS = 100_000
"""Adapters of a workload, at most."""
MAX_RATES = 10_000_000
"""Maximum number of adapters times the length of the longest rate schedule."""
MAX_TOKENS_OFFERED = 1e11
"""Tokens of a workload's requests, at most."""
MIN_BURSTINESS, MAX_BURSTINESS = 1e-3, 1e6


def check_size(workload: "Workload", where: str) -> None:
    """Refuse a workload of rates that would not end, or not fit into memory.

    Raises:
        WorkloadError: it has too many requests, tokens or pieces of rates.
    """
    pieces = max(len(a.rate) for a in workload.adapters)
    if pieces * len(workload.adapters) > MAX_RATES:
        raise WorkloadError(
            f"{where}: a rate with {pieces:,} pieces is too much for {counted(len(workload.adapters), 'adapter')};"
            f" adapters times pieces may be {MAX_RATES:,}"
        )
    requests = [a.expected(workload.duration_s) for a in workload.adapters]
    if sum(requests) > MAX_REQUESTS:
        raise WorkloadError(
            f"{where}: its rates make {sum(requests):.4g} requests in {workload.duration_s:g} s; at most"
            f" {MAX_REQUESTS:,} are simulated, so shorten the duration or lower the rates"
        )
    means: dict[int, float] = {}
    tokens = 0.0
    for adapter, count in zip(workload.adapters, requests, strict=True):
        lengths = adapter.lengths or workload.lengths
        assert lengths is not None
        if id(lengths) not in means:
            means[id(lengths)] = float(lengths.prompt.mean() + lengths.output.mean())
        tokens += count * means[id(lengths)]
    if tokens > MAX_TOKENS_OFFERED:
        raise WorkloadError(
            f"{where}: its requests have {tokens:.4g} tokens; at most {MAX_TOKENS_OFFERED:g} are simulated, so shorten"
            " the duration, the lengths or the rates"
        )
