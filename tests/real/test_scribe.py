"""The larger real family, where a checkout has it beside it."""

from pathlib import Path

import numpy as np
import pytest
from families import SHARED
from merges import merge

from deltaworks.catalog.store import Catalog
from deltaworks.reports.demo import family_recipe
from deltaworks.reports.loss import load_weights, mean_loss

SCRIBE = SHARED / "families" / "scribe"
DOMAINS = ("c", "javascript", "manpages", "markdown", "perl", "python")
WINDOWS = 48


def mean(path: Path) -> float:
    config, weights = load_weights(path)
    texts = [np.load(SCRIBE / "eval" / f"{d}.dev.npy") for d in DOMAINS]
    return sum(mean_loss(config, weights, t, WINDOWS) for t in texts) / len(texts)


@pytest.mark.skipif(not (SCRIBE / "base").is_dir(), reason="the scribe family is not beside this checkout")
def test_a_sixth_of_every_expert_beats_the_base(catalog: Catalog, tmp_path: Path) -> None:
    text = family_recipe(SCRIBE, list(DOMAINS), "task_arithmetic", f"weight: {1 / 6}")
    merge(catalog, text, tmp_path / "out")
    base, merged = mean(SCRIBE / "base"), mean(tmp_path / "out")
    assert merged < base
    assert base == pytest.approx(3.931, abs=2e-3)
    assert merged == pytest.approx(3.928, abs=2e-3)
