"""Requests that vLLM rejects or truncates for `max_model_len`."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deltaworks.errors import WorkloadError, quoted
from deltaworks.serving.profile import Profile
from deltaworks.serving.workload import Requests, Workload
from deltaworks.wording import counted


def cut_to_length(requests: Requests, max_model_len: int | None) -> Requests:
    """Requests whose answers end where the model's length does, as vLLM ends them.

    Args:
        requests: As they are asked. Those with prompts of the model's length or more, which vLLM rejects, stay.
        max_model_len: Tokens of a prompt and its answer, at most; None for no limit.
    """
    if max_model_len is None:
        return requests
    room = np.where(requests.prompt < max_model_len, max_model_len - requests.prompt, requests.output)
    return requests if (requests.output <= room).all() else replace(requests, output=np.minimum(requests.output, room))


def is_beyond(requests: Requests, profile: Profile) -> NDArray[np.bool_]:
    """Which requests vLLM rejects, for their prompts leave no room for an answer in the model's length, (n,) bool."""
    longest = profile.server.max_model_len
    return np.zeros(requests.prompt.size, bool) if longest is None else np.asarray(requests.prompt >= longest)


def check_lengths(workload: Workload, profiles: Sequence[Profile]) -> None:
    """Check that every adapter has some request that some type of GPU does not reject for its length.

    Args:
        workload: What is asked.
        profiles: The types of GPU.

    Raises:
        WorkloadError: every prompt of an adapter is as long as the model's length, or longer.
    """
    limits = [profile.server.max_model_len for profile in profiles if profile.server.max_model_len is not None]
    if len(limits) < len(profiles) or not limits:
        return
    longest = max(limits)
    beyond = [(name, least) for name, least in _shortest_prompts(workload) if least >= longest]
    if beyond:
        name, least = beyond[0]
        others = f" (the same is true of {counted(len(beyond) - 1, 'other')})" if len(beyond) > 1 else ""
        raise WorkloadError(
            f"adapter {quoted(name)}: every prompt has {counted(least, 'token')} or more{others}, and vLLM rejects"
            f" prompts of {counted(longest, 'token')} or more, the length of the model (max_model_len); shorten the"
            " prompts, or raise max_model_len in the profile if the model takes more"
        )


def _shortest_prompts(workload: Workload) -> Iterable[tuple[str, int]]:
    """The tokens of the shortest prompt of every adapter that has requests, by its name."""
    trace = workload.trace
    if trace is None:
        for adapter in workload.adapters:
            lengths = adapter.lengths or workload.lengths
            assert lengths is not None
            if adapter.expected(workload.duration_s) > 0:
                yield adapter.name, round(float(lengths.prompt.min()))
        return
    assert trace.adapter is not None
    shortest: dict[str, int] = {}
    inside = trace.arrival_s < workload.duration_s
    for name, prompt, counts in zip(trace.adapter, trace.prompt.tolist(), inside.tolist(), strict=True):
        if name and counts:
            shortest[name] = min(prompt, shortest.get(name, prompt))
    yield from sorted(shortest.items())
