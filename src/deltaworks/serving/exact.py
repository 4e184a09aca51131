"""The fewest GPUs of small cases, proven: CP-SAT proposes, the twin refuses, and nothing refused is proposed again.

Adapters of like rank, rate and lengths are interchangeable, so a GPU is a number of adapters of each class. A GPU that
the twin refuses with every number of slots rules out all GPUs with at least as many of each class (logic-based Benders
cuts; Hooker and Ottosson, Mathematical Programming 2003). The proof rests on that: more adapters never help a GPU that
starves. Adapters are whole here; a placement that splits hot ones may need fewer GPUs than this.

Needs OR-Tools, an extra.
"""

import numpy as np
from ortools.sat.python import cp_model

from deltaworks.errors import PlacementError
from deltaworks.serving.arrays import I64
from deltaworks.serving.judge import SLOTS, Judge
from deltaworks.serving.parts import Part, Piece

CLASSES, ROUNDS = 12, 400


def fewest_gpus(judge: Judge, kind: int, at_most: int) -> int | None:
    """The least number of GPUs on which whole adapters can be served, up to ``at_most``; None if more are needed.

    Args:
        judge: Of the demand.
        kind: The type of GPU.
        at_most: A number that is known to do, or the largest worth knowing.

    Raises:
        PlacementError: the case is not small: too many kinds of adapters, or too many refusals.
    """
    classes = classes_of(judge, kind)
    sizes = np.bincount(classes)
    if sizes.size > CLASSES:
        raise PlacementError(f"--exact is for up to {CLASSES} kinds of adapters (rank and rate), not {sizes.size}")
    refused: list[I64] = []
    known: dict[tuple[int, ...], bool] = {}
    rounds = 0
    for count in range(1, at_most + 1):
        while (proposal := _propose(sizes, count, refused)) is not None:
            rounds += 1
            if rounds > ROUNDS:
                raise PlacementError(f"--exact gave up after {ROUNDS} proposals; it is for small cases")
            bad = [row for row in proposal if not _serves(judge, kind, classes, row, known)]
            if not bad:
                return count
            refused += [np.array(row) for row in bad]
    return None


def classes_of(judge: Judge, kind: int) -> I64:
    """Which adapters are alike, (adapters,) int64: numbers of classes."""
    traffic, adapters = judge.traffic[kind], judge.demand.workload.adapters
    rows = [
        (traffic.rank[i], a.rate or traffic.rate[i], a.burstiness, traffic.prompt[i], traffic.output[i])
        for i, a in enumerate(adapters)
    ]
    numbers = {row: n for n, row in enumerate(sorted(set(rows), key=repr))}
    return np.array([numbers[row] for row in rows], np.int64)


def _propose(sizes: I64, gpus: int, refused: list[I64]) -> list[tuple[int, ...]] | None:
    """Numbers of adapters of each class on each GPU, none of them at least a refused one; None if there are none."""
    model = cp_model.CpModel()
    count = [[model.new_int_var(0, int(size), f"{g}/{c}") for c, size in enumerate(sizes)] for g in range(gpus)]
    for c, wanted in enumerate(sizes):
        model.add(sum(count[g][c] for g in range(gpus)) == int(wanted))
    for g in range(gpus):
        for row in refused:
            less = []
            for c in np.flatnonzero(row).tolist():
                literal = model.new_bool_var("")
                model.add(count[g][c] < int(row[c])).only_enforce_if(literal)
                less.append(literal)
            model.add_bool_or(less)
    # GPUs are alike: the first class falls from GPU to GPU. Even proposals are the likeliest to be accepted.
    for g in range(gpus - 1):
        model.add(count[g][0] >= count[g + 1][0])
    spread = model.new_int_var(0, int(sizes.sum()), "most")
    for g in range(gpus):
        model.add(sum(count[g]) <= spread)
    model.minimize(spread)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    return [tuple(int(solver.value(variable)) for variable in row) for row in count]


def _serves(judge: Judge, kind: int, classes: I64, row: tuple[int, ...], known: dict[tuple[int, ...], bool]) -> bool:
    """Whether the twin accepts so many adapters of each class with any number of slots."""
    if row not in known:
        part: Part = tuple(Piece(int(i)) for c, wanted in enumerate(row) for i in np.flatnonzero(classes == c)[:wanted])
        part = tuple(sorted(part))
        known[row] = not part or judge.fits(part, kind, tries=len(SLOTS)) is not None
    return known[row]
