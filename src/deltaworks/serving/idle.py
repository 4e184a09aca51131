"""One request alone on an idle server: the fastest that a profile can be, in closed form.

The adapter is loaded already and nothing else runs, so a request takes its way through the front end, the steps that
its prompt needs, and a step for every further token. No placement is faster than that.
"""

from typing import NamedTuple

import numpy as np

from deltaworks.checkpoints.jit import kernel
from deltaworks.serving import twin
from deltaworks.serving.arrays import F64, I64
from deltaworks.serving.profile import Profile


class Alone(NamedTuple):
    """What requests take that are served one at a time.

    Attributes:
        first_s: Seconds to the first token, (n,) float64.
        decode_s: Seconds from there to the last token, (n,) float64.
        gap_s: Seconds of the shortest gap between two tokens, (n,) float64.
    """

    first_s: F64
    decode_s: F64
    gap_s: F64


def alone(profile: Profile, slots: int, max_rank: int, prompt: I64, output: I64) -> Alone:
    """What each request takes on a server where nothing else runs.

    Args:
        profile: Of the server.
        slots: `--max-loras`.
        max_rank: `--max-lora-rank`.
        prompt: Prompt tokens, (n,) int64.
        output: Tokens to generate, (n,) int64.
    """
    found = Alone(*(np.empty(prompt.size) for _ in Alone._fields))
    _alone(profile.costs(slots, max_rank), profile.server.max_num_batched_tokens, prompt, output, *found)
    return found


@kernel
def _alone(costs: F64, most: int, prompt: I64, output: I64, first_s: F64, decode_s: F64, gap_s: F64) -> None:
    chunk_s = twin.step_s(costs, 0, most, 0.0, 1, 0)
    for i in range(prompt.size):
        first_s[i] = costs[twin.REQUEST] + (prompt[i] // most) * chunk_s
        if prompt[i] % most > 0:
            first_s[i] += twin.step_s(costs, 0, prompt[i] % most, 0.0, 1, 0)
        gap_s[i] = twin.step_s(costs, 1, 0, float(prompt[i]), 1, 0)
        further = output[i] - 1
        # Each token makes the context longer by one.
        decode_s[i] = further * gap_s[i] + costs[twin.PER_CONTEXT] * further * (further - 1) / 2.0
