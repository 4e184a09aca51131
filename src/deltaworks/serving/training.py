"""Training a surrogate: two learned models from runs of the twin, then one small tree distilled from each.

Needs scikit-learn, an extra; using a surrogate does not.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.tree import DecisionTreeRegressor

from deltaworks.serving.arrays import F64
from deltaworks.serving.design import runs, unlabelled
from deltaworks.serving.estimate import FEATURES, MONOTONE
from deltaworks.serving.profile import Profile
from deltaworks.serving.surrogate import Surrogate
from deltaworks.serving.tree import Tree, merged

TRAINING, UNSEEN, DISTILLED, LEAVES = 16384, 2048, 16384, 64
_TRAINING_SEED, _UNSEEN_SEED, _DISTILLED_SEED = 1, 4, 3


def train(profile: Profile, folder: Path | None = None, progress: Callable[[int], None] | None = None) -> Surrogate:
    """Learn a profile's surrogate from runs of the twin, and distil it.

    Args:
        profile: It.
        folder: Where runs are kept, and looked for first.
        progress: Told how many more experiments are done, of `TRAINING` + `UNSEEN` + `DISTILLED`.
    """
    seen = runs(profile, _TRAINING_SEED, TRAINING, folder, progress)
    unseen = runs(profile, _UNSEEN_SEED, UNSEEN, folder, progress)
    slope = [-1 if name in MONOTONE else 0 for name in FEATURES]
    chosen: dict[str, Any] = {
        "max_iter": 1000,
        "learning_rate": 0.02,
        "max_leaf_nodes": 31,
        "min_samples_leaf": 5,
        "random_state": 0,
    }
    share = HistGradientBoostingRegressor(monotonic_cst=slope, **chosen).fit(seen.features, seen.share)
    verdict = HistGradientBoostingClassifier(monotonic_cst=[-s for s in slope], **chosen)
    verdict.fit(seen.features, seen.starved)
    more = unlabelled(profile, _DISTILLED_SEED, DISTILLED, progress)
    rows = np.concatenate([seen.features, more])

    def distilled(answers: F64) -> Tree:
        grown = DecisionTreeRegressor(max_leaf_nodes=LEAVES, min_samples_leaf=8, random_state=0).fit(rows, answers)
        return _tree(grown.tree_)

    throughput = distilled(np.clip(share.predict(rows), 0, 1))
    likely = distilled(verdict.predict_proba(rows)[:, 1])
    starvation = merged(_decided(likely))
    learned = np.clip(share.predict(unseen.features), 0, 1), verdict.predict(unseen.features)
    trees = throughput.predict_all(unseen.features), starvation.predict_all(unseen.features) > 0.5
    accuracy: dict[str, Any] = {
        "training_runs": TRAINING,
        "unseen_runs": UNSEEN,
        "unseen_starved": int(unseen.starved.sum()),
    }
    for name, (shares, starved) in (("learned", learned), ("trees", trees)):
        accuracy[name] = {
            "throughput_smape": round(_smape(shares * unseen.offered_tps, unseen.share * unseen.offered_tps), 3),
            "starvation_macro_f1": round(_macro_f1(starved, unseen.starved), 4),
        }
    accuracy["trees"] |= {"throughput_leaves": throughput.leaves, "starvation_leaves": starvation.leaves}
    return Surrogate(profile.name, profile.digest, throughput, starvation, accuracy)


def _tree(grown: Any) -> Tree:
    """A tree of scikit-learn's."""
    inner = grown.children_left >= 0
    return Tree(
        np.where(inner, grown.feature, -1).astype(np.int64), np.where(inner, grown.threshold, 0.0),
        grown.children_left.astype(np.int64), grown.children_right.astype(np.int64), grown.value[:, 0, 0].astype(float),
    )  # fmt: skip


def _decided(tree: Tree) -> Tree:
    """Leaves rounded to 0 or 1."""
    return Tree(tree.feature, tree.threshold, tree.left, tree.right, (tree.value >= 0.5).astype(np.float64))


def _smape(predicted: F64, true: F64) -> float:
    """``100 * mean(|a-b| / (|a|+|b|))``, as in the papers: about half of the relative error."""
    return float(100 * np.mean(np.abs(predicted - true) / np.maximum(np.abs(predicted) + np.abs(true), 1e-12)))


def _macro_f1(predicted: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    """The mean of both classes' F1."""
    scores = []
    for side in (True, False):
        hit = int(((predicted == side) & (true == side)).sum())
        wrong = int(((predicted == side) != (true == side)).sum())
        scores.append(2 * hit / max(2 * hit + wrong, 1))
    return float(np.mean(scores))
