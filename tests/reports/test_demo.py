import json
from pathlib import Path

import numpy as np
import pytest
from families import CONFIG, MICRO, random_tensors, shapes, write_model

from deltaworks.errors import CheckpointError, UserError
from deltaworks.progress import Silent
from deltaworks.reports.demo import MERGES, DemoRow, family_folder, run_demo
from deltaworks.reports.loss import forward, load_weights, mean_loss

needs_micro = pytest.mark.skipif(not (MICRO / "base").is_dir(), reason="the micro family is not in this checkout")


def test_an_untrained_model_knows_nothing(tmp_path: Path) -> None:
    tensors = {n: np.zeros_like(t) if "norm" not in n else t for n, t in random_tensors(0, shapes()).items()}
    write_model(tmp_path / "m", tensors, config=CONFIG | {"hidden_act": "silu"})
    config, weights = load_weights(tmp_path / "m")
    tokens = np.random.default_rng(0).integers(0, 131, 600)
    assert mean_loss(config, weights, tokens, 9) == pytest.approx(np.log(131), rel=1e-6)


def test_the_future_is_not_seen(tmp_path: Path) -> None:
    write_model(tmp_path / "m", random_tensors(0, shapes()), config=CONFIG | {"hidden_act": "silu"})
    config, weights = load_weights(tmp_path / "m")
    tokens = np.random.default_rng(0).integers(0, 131, (1, 20))
    changed = tokens.copy()
    changed[0, 12:] = 5
    one, other = forward(config, weights, tokens), forward(config, weights, changed)
    np.testing.assert_allclose(one[0, :12], other[0, :12], rtol=1e-5)
    assert np.abs(one[0, 12:] - other[0, 12:]).max() > 1e-3


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m", random_tensors(0, shapes()), config=CONFIG | {"model_type": "mamba"})
    with pytest.raises(CheckpointError, match="not a plain Llama"):
        load_weights(tmp_path / "m")


def test_a_folder_that_holds_no_family(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no family"):
        run_demo(tmp_path, None, 1, Silent(), lambda _: None)


@needs_micro
def test_the_losses_are_those_measured_at_training() -> None:
    """`losses.json` was written by PyTorch; half a percent is left for its float32 weights against our bf16."""
    recorded = json.loads((MICRO / "losses.json").read_text())
    for name in ("base", "c"):
        config, weights = load_weights(MICRO / name)
        for domain in ("c", "licences"):
            tokens = np.load(MICRO / "eval" / f"{domain}.npy")
            assert mean_loss(config, weights, tokens, 64) == pytest.approx(recorded[name][domain], rel=5e-3)


@needs_micro
def test_merges_of_the_micro_family_work(tmp_path: Path) -> None:
    """Every expert is best at its own domain, and merging beats the base and every expert on the mean."""
    seen: list[DemoRow] = []
    rows = run_demo(family_folder(), tmp_path / "kept", 12, Silent(), seen.append)
    assert rows == seen
    base, experts, merges = rows[0], [r for r in rows if r.kind == "expert"], [r for r in rows if r.kind == "merge"]
    assert len(experts) >= 5
    for expert in experts:
        assert expert.losses[expert.name] == min(r.losses[expert.name] for r in [base, *experts])
    assert {m.name for m in merges} == set(MERGES)
    better = [m for m in merges if m.mean < min(r.mean for r in [base, *experts])]
    assert len(better) >= 2
    assert (tmp_path / "kept" / "ties" / "deltaworks.json").is_file()


@needs_micro
def test_the_micro_family_is_small() -> None:
    assert sum(p.stat().st_size for p in MICRO.rglob("*") if p.is_file()) <= 8_000_000
