"""Which adapters a simulated server starves: what was asked of each, what it got, and how long the rest waits.

An adapter starves when a tenth of the tokens asked of it are refused, or belong to requests that wait in the queue when
time is up while the oldest of them has waited for more than a tenth of the run. A queue that holds a share s of what
came in a run of T seconds began to form about s * T seconds ago, so in a plain overload both conditions say the same.
It starves as well when it is let in so seldom that a tenth of what it asks in the second half of the run waits for a
first token for more than a tenth of the run, even if its queue happens to be empty when time is up; the crowd of
requests at the start of a run does not mean that. Requests that are being served when time is up count against nobody,
however long their answers are.

An adapter that comes late with several requests is judged on the time since its first one: a tenth of that is a long
wait for it, provided that it is far longer than the waits of those that are served.

An adapter of which every request waits, but none for that long, cannot be judged: the run ends too soon after them.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.serving import server
from deltaworks.serving.arrays import F64, I64

STARVED_DEFICIT = 0.1
"""The share of the offered tokens that must be missing: of a server in the published definition (arXiv 2508.08343), of
an adapter in ours."""

STARVED_WAIT = 0.1
"""The share of the duration for which requests of a starving adapter wait at least."""


_SEVERAL = 5
"""With fewer requests an adapter that came late cannot be judged on the time since then."""

_USUAL = 2.0
"""A wait is not long for an adapter that came late unless it is this many times the 99th percentile of those served."""


class Service(NamedTuple):
    """What each adapter asked for and got; the last entry of every array is the base model itself.

    Attributes:
        arrived: Requests, (adapters + 1,) int64.
        completed: Of these, the completed ones, (adapters + 1,) int64.
        waiting: Those in the queue when time is up, never started or preempted, (adapters + 1,) int64.
        rejected: Those refused by the client or too long for the KV cache, (adapters + 1,) int64.
        oldest_wait_s: How long the oldest waiting request has waited, (adapters + 1,) float64; 0 where none waits.
        served_share: Tokens processed and generated, of those asked for, (adapters + 1,) float64; 1 where none were.
        starved: Whether the adapter starves, (adapters + 1,) bool.
        unjudged: Whether the run says nothing of the adapter: it was asked and does not starve, but no token of any of
            its requests was processed, (adapters + 1,) bool.
    """

    arrived: I64
    completed: I64
    waiting: I64
    rejected: I64
    oldest_wait_s: F64
    served_share: F64
    starved: NDArray[np.bool_]
    unjudged: NDArray[np.bool_]


class Refused(NamedTuple):
    """Requests that are too long for the KV cache and never reach a server.

    Attributes:
        adapter: Of each, (refused,) int64.
        tokens: Of its prompt and answer, (refused,) int64.
    """

    adapter: I64
    tokens: I64


def tokens_made(state: server.Server, duration_s: float) -> I64:
    """Tokens that each request of a finished run had generated when time was up, (n,) int64."""
    made = state.generated.copy()
    completed = state.state == server.COMPLETED
    made[completed] = state.output[completed]
    decoding = (state.state == server.RUNNING) & (np.arange(state.state.size) != state.total[server.PARTIAL])
    # A decoding request holds its prompt and all its tokens but the newest in the KV cache, and in a step that did not
    # end in time also room for the token that the step would have made.
    held = state.offset[decoding] + state.total[server.STEP]
    made[decoding] = held - state.prompt[decoding] + (state.clock[0] <= duration_s)
    return made


def service(
    state: server.Server, arrival_s: F64, first_token_s: F64, arrived: int, refused: Refused, duration_s: float
) -> Service:
    """Judge every adapter of a finished run.

    Args:
        state: The server when time was up.
        arrival_s: When its requests arrived, (n,) float64.
        first_token_s: When the client got their first tokens, (n,) float64, NaN where it did not.
        arrived: How many of them arrived.
        refused: Requests that never reached the server.
        duration_s: Seconds simulated.
    """
    groups = state.running_of.size
    adapter, tokens = state.adapter[:arrived], (state.prompt + state.output)[:arrived]

    def total(chosen: NDArray[np.bool_] | slice, weights: I64 | None = None) -> I64:
        own = None if weights is None else weights[chosen].astype(np.float64)
        return np.bincount(adapter[chosen], own, groups).astype(np.int64)

    of = state.state[:arrived]
    waiting, rejected = waiting_requests(state)[:arrived], of == server.REJECTED
    # A preempted request waits since then, if it has its first token already; else since it arrived.
    silent = np.isnan(first_token_s[:arrived])
    since = np.where(silent, arrival_s[:arrived], state.preempted_s[:arrived])
    oldest_wait_s = np.zeros(groups)
    np.maximum.at(oldest_wait_s, adapter[waiting], duration_s - since[waiting])
    made = tokens_made(state, duration_s)[:arrived] + np.where(silent, 0, state.prompt[:arrived])
    refused_of = np.bincount(refused.adapter, minlength=groups)
    missing_of = np.bincount(refused.adapter, refused.tokens.astype(np.float64), groups).astype(np.int64)
    offered = total(slice(None), tokens) + missing_of
    unserved = total(rejected, tokens) + missing_of
    first_s = np.where(silent, duration_s, first_token_s[:arrived]) - arrival_s[:arrived]
    long_s = _long_wait_s(adapter, arrival_s[:arrived], first_s[~silent], groups, duration_s)
    queued = np.where(oldest_wait_s > long_s, total(waiting, tokens), 0)
    late = arrival_s[:arrived] >= duration_s / 2
    slow, recent = total(late & (first_s > long_s[adapter]) & ~rejected, tokens), total(late, tokens)
    starved = (unserved + queued >= STARVED_DEFICIT * np.maximum(offered, 1)) | (
        slow >= STARVED_DEFICIT * np.maximum(recent, 1)
    )
    asked, served, waits = total(slice(None)) + refused_of, total(slice(None), made), total(waiting)
    return Service(
        arrived=asked,
        completed=total(of == server.COMPLETED),
        waiting=waits,
        rejected=total(rejected) + refused_of,
        oldest_wait_s=oldest_wait_s,
        served_share=np.where(offered > 0, served / np.maximum(offered, 1), 1.0),
        starved=starved,
        unjudged=~starved & (waits > 0) & (served == 0) & (total(of == server.RUNNING) == 0),
    )


def _long_wait_s(adapter: I64, arrival_s: F64, served_s: F64, groups: int, duration_s: float) -> F64:
    """The wait beyond which an adapter may starve, (groups,) float64 seconds.

    Args:
        adapter: Of each request that arrived, (n,) int64.
        arrival_s: When it did, (n,) float64.
        served_s: Waits for the first token of the requests that got it, (m,) float64.
        groups: How many adapters there are, the base model included.
        duration_s: Seconds simulated.
    """
    first_s = np.full(groups, duration_s)
    np.minimum.at(first_s, adapter, arrival_s)
    first_s[np.bincount(adapter, minlength=groups) < _SEVERAL] = 0.0
    usual_s = _USUAL * float(np.percentile(served_s, 99)) if served_s.size else duration_s
    least_s = max(usual_s, STARVED_WAIT**2 * duration_s)
    return np.minimum(np.maximum(STARVED_WAIT * (duration_s - first_s), least_s), STARVED_WAIT * duration_s)


def waiting_requests(state: server.Server) -> NDArray[np.bool_]:
    """Which requests wait when time is up, in the queue or before the front end, (n,) bool."""
    return np.asarray((state.state == server.WAITING) | (state.state == server.NEVER))
