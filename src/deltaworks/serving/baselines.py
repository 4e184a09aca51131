"""What other ways of dealing adapters to GPUs would need: the comparison that `deltaworks place --compare` prints."""

from typing import Any

import numpy as np

from deltaworks.serving.judge import Judge
from deltaworks.serving.parts import Piece
from deltaworks.serving.placement import accepted, simple

FARTHEST = 2


def compare(judge: Judge, kind: int, ours: int) -> dict[str, dict[str, Any]]:
    """GPUs that the simple ways need, with slots as well chosen as ours, and what filling up by memory leads to.

    Args:
        judge: Of the demand.
        kind: The type of GPU.
        ours: GPUs of our placement; with fewer, all but the last way were tried for it already.

    Returns:
        By the way's name: ``gpus``, None if the twin accepts no number of them up to twice ours; ``starved`` and
        ``memory_errors``, GPUs of that number that the twin refuses.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, deal in simple(judge, kind).items():
        # One by one: with one GPU more, a way that deals in turn may put two hot adapters together.
        counts = range(ours, FARTHEST * ours + 1)
        enough = next((n for n in counts if accepted(judge, deal, [kind] * n, np.ones(n))), None)
        found[name] = {"gpus": enough, "starved": 0, "memory_errors": 0}
    return found | {"as many as fit in memory": _filled(judge, kind)}


def _filled(judge: Judge, kind: int) -> dict[str, Any]:
    """Adapters in order of their names, as many on a GPU as there is memory for slots, each with one of its own."""
    adapters, profile = len(judge.demand.workload.adapters), judge.profiles[kind]
    room = max(profile.most_slots(judge.rank_of(tuple(Piece(i) for i in range(adapters)))), 1)
    parts = [tuple(Piece(i) for i in range(start, min(start + room, adapters))) for start in range(0, adapters, room)]
    factor = 1.0 + judge.demand.headroom
    answers = list(judge.pool.map(lambda part: judge.ask(part, kind, len(part), factor), parts))
    memory = sum(answer["memory_error"] for answer in answers)
    starved = sum(not judge.accepts(answer) for answer in answers) - memory
    return {"gpus": len(parts), "starved": int(starved), "memory_errors": int(memory)}
