"""The surrogate: its features, its training, and the ones that come with the package."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_server import SMALL

from deltaworks.errors import ProfileError
from deltaworks.serving import design, training
from deltaworks.serving.estimate import FEATURES, NO_MEMORY, Traffic, estimate, traffic_of
from deltaworks.serving.profile import Profile, built_in_profiles, find_profile
from deltaworks.serving.simulate import simulate
from deltaworks.serving.surrogate import built_in_surrogates, find_surrogate, load_surrogate, save_surrogate
from deltaworks.serving.workload import parse_workload

NAMES = list(FEATURES)


def traffic(adapters: int, rate: float, rank: int = 8) -> Traffic:
    ones = np.ones(adapters)
    return Traffic(ones * rate, ones * rank, ones * 200, ones * 100, ones * 200, 3600.0)


def features(asked: Traffic, profile: Profile, slots: int, rank: int = 8) -> dict[str, float]:
    return dict(zip(NAMES, estimate(asked, profile, slots, rank).tolist(), strict=True))


@settings(max_examples=50)
@given(st.integers(1, 60), st.floats(0.001, 2.0), st.integers(1, 60), st.floats(1.1, 5))
def test_more_traffic_is_more_strain(adapters: int, rate: float, slots: int, factor: float) -> None:
    less = features(traffic(adapters, rate), SMALL, slots)
    more = features(traffic(adapters, rate * factor), SMALL, slots)
    assert less["utilisation"] <= more["utilisation"] * (1 + 1e-9)
    assert all(np.isfinite(list(less.values())))
    assert 0 <= less["kv_pressure"] <= 1.000001
    assert less["running"] <= 32.0001


def test_the_estimate_knows_memory_and_waits() -> None:
    assert features(traffic(10, 0.1), SMALL, 110)["utilisation"] == NO_MEMORY
    waiting, served = features(traffic(40, 1.0), SMALL, 2), features(traffic(40, 0.05), SMALL, 40)
    assert waiting["slot_wait"] > served["slot_wait"] == 0.0
    assert features(traffic(5, 0.0), SMALL, 2)["utilisation"] == 0.0


def test_traffic_is_that_of_the_workload() -> None:
    rows = [{"time": t, "adapter": "a", "prompt_tokens": 30, "output_tokens": 10 + t} for t in range(4)]
    found = traffic_of(
        parse_workload({"duration": 8, "requests": rows, "adapters": [{"name": "b", "rank": 32}]}, Path())
    )
    assert found.rate.tolist() == [0.5, 0.0]
    assert found.rank.tolist() == [16, 32]
    assert found.output.tolist() == [11.5, 1.0]
    shape = {"distribution": "fixed", "input_mean": 30, "output_mean": 10}
    content = {"duration": 8, "lengths": shape, "adapters": [{"name": "a", "rank": 8, "rate": [[0, 1], [4, 3]]}]}
    assert traffic_of(parse_workload(content, Path())).rate.tolist() == [2.0]


def test_training_is_resumed_and_repeats_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("TRAINING", 96), ("UNSEEN", 32), ("DISTILLED", 64)):
        monkeypatch.setattr(training, name, size)
    monkeypatch.setattr(design, "CHUNK", 32)
    done: list[int] = []
    first = training.train(SMALL, tmp_path, done.append)
    assert sum(done) == 96 + 32 + 64
    kept = sorted(tmp_path.glob("*.parquet"))
    assert len(kept) == 4
    kept[0].unlink()
    asked: list[int] = []

    def counted(*arguments: Any) -> Any:
        asked.append(1)
        return simulate(*arguments)

    monkeypatch.setattr(design, "simulate", counted)
    assert training.train(SMALL, tmp_path).to_json() == first.to_json()
    assert len(asked) == 32
    save_surrogate(first, tmp_path / f"{SMALL.digest}.json")
    found = find_surrogate(SMALL, tmp_path)
    assert found is not None
    assert found.to_json() == first.to_json()
    throughput, starved = found.predict(traffic(4, 0.1), SMALL, 4, 8)
    assert 0 <= throughput <= traffic(4, 0.1).offered_tps
    assert isinstance(starved, bool)


def test_experiments_do_not_hang_on_the_chunks() -> None:
    whole, part = design.experiments(SMALL, 5, 0, 64), design.experiments(SMALL, 5, 32, 32)
    assert [(e.slots, e.max_rank, e.workload.adapters) for e in whole[32:]] == [
        (e.slots, e.max_rank, e.workload.adapters) for e in part
    ]


@pytest.mark.parametrize("name", list(built_in_profiles()))
def test_every_built_in_profile_has_its_surrogate(name: str) -> None:
    profile = find_profile(name)
    found = load_surrogate(built_in_surrogates()[name])
    assert found.digest == profile.digest
    learned, trees = found.accuracy["learned"], found.accuracy["trees"]
    assert max(learned["throughput_smape"], trees["throughput_smape"]) <= 3
    assert trees["throughput_smape"] - learned["throughput_smape"] <= 1.5
    assert learned["starvation_macro_f1"] - trees["starvation_macro_f1"] <= 0.015
    assert max(found.throughput.leaves, found.starvation.leaves) <= 64


def test_nobody_knows_other_profiles(tmp_path: Path) -> None:
    assert find_surrogate(SMALL, tmp_path) is None
    (tmp_path / f"{SMALL.digest}.json").write_text(json.dumps({"schema": 1, "features": {"x": ""}}))
    with pytest.raises(ProfileError, match="another version"):
        find_surrogate(SMALL, tmp_path)
    (tmp_path / f"{SMALL.digest}.json").write_text("{")
    with pytest.raises(ProfileError, match="cannot be read"):
        find_surrogate(SMALL, tmp_path)
