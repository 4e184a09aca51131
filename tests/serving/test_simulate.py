"""Answers about whole workloads: what they must hold, whatever the workload."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaworks.errors import WorkloadError
from deltaworks.serving.profile import FrontEnd, KvCache, LoadTime, Profile, ServerFlags, StepTime
from deltaworks.serving.simulate import Configuration, simulate
from deltaworks.serving.workload import parse_workload

PROFILE = Profile(
    "p", "vLLM", "m", "g", KvCache(6000, 10, 5, 1000),
    StepTime(5, 0.02, 0.03, 5e-5, lora=1, adapter=0.4, lora_decode=0.01, lora_prefill=0.02),
    ServerFlags(32, 512, 16), loading=LoadTime(5, 0.1, 40, 2), front_end=FrontEnd(4, 20, 0.02, 2, 32),
)  # fmt: skip


def ask(content: dict[str, Any], slots: int = 4, **changed: Any) -> dict[str, Any]:
    usual = {"duration": 60, "lengths": {"distribution": "fixed", "input_mean": 100, "output_mean": 50}}
    return simulate(parse_workload(usual | content, Path()), PROFILE, Configuration(slots, **changed))


groups = st.lists(
    st.fixed_dictionaries({
        "count": st.integers(1, 8), "rank": st.sampled_from([8, 16, 32]), "rate": st.sampled_from([0.0, 0.1, 1.0, 9.0]),
        "burstiness": st.sampled_from([0.3, 1.0]),
    }),
    min_size=1, max_size=3,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(groups, st.integers(1, 24), st.sampled_from([None, 20]), st.integers(0, 3))
def test_nothing_is_lost(adapters: list[dict[str, Any]], slots: int, outstanding: int | None, seed: int) -> None:
    content = {"adapters": adapters, "seed": seed}
    answer = ask(content, slots, client_max_outstanding=outstanding)
    again = ask(content, slots, client_max_outstanding=outstanding)
    assert {k: v for k, v in answer.items() if k != "wall_s"} == {k: v for k, v in again.items() if k != "wall_s"}
    requests = answer["requests"]
    assert requests["arrived"] == sum(requests[k] for k in ("completed", "running", "waiting", "rejected"))
    assert requests["arrived"] == sum(a["arrived"] for a in answer["adapters"].values())
    completed = sum(a["arrived"] * a["completed_share"] for a in answer["adapters"].values())
    assert completed == pytest.approx(requests["completed"], abs=0.001 * requests["arrived"])
    assert answer["throughput_tps"] <= answer["offered_tps"] * (1 + 1e-9)
    assert outstanding is None or requests["running"] + requests["waiting"] <= outstanding
    if answer["offered_tps"]:
        assert answer["starved_server"] == (1 - answer["throughput_tps"] / answer["offered_tps"] >= 0.1)
    if not answer["memory_error"]:
        assert answer["running_mean"] <= 32
        if requests["completed"]:
            assert answer["ttft_penalised_ms"] >= answer["ttft_completed_ms"]["mean"] * 0.999


def test_nobody_asks() -> None:
    answer = ask({"adapters": [{"name": "a", "rank": 8, "rate": 0}]})
    assert answer["requests"]["arrived"] == 0
    assert answer["ttft_ms"]["mean"] is None
    assert not answer["starved"]


def test_what_never_fits_is_rejected() -> None:
    sizes = ((0, 50), (1, 9000), (2, 50))
    rows = [{"time": t, "adapter": "a", "prompt_tokens": p, "output_tokens": 5} for t, p in sizes]
    workload = parse_workload({"duration": 60, "requests": rows}, Path())
    answer = simulate(workload, PROFILE, Configuration(1))
    assert answer["requests"] == {"arrived": 3, "completed": 2, "running": 0, "waiting": 0, "rejected": 1}


def test_too_many_slots_need_too_much_memory() -> None:
    assert not ask({"adapters": [{"name": "a", "rank": 8, "rate": 1}]}, 90)["memory_error"]
    answer = ask({"adapters": [{"name": "a", "rank": 8, "rate": 1}]}, 110)
    assert answer["memory_error"]
    assert answer["starved"]
    assert answer["requests"]["rejected"] == answer["requests"]["arrived"] == 60


def test_slots_and_ranks_cost_what_the_profile_says() -> None:
    few = ask({"adapters": [{"count": 12, "rank": 8, "rate": 0.5}]}, 2)
    enough = ask({"adapters": [{"count": 12, "rank": 8, "rate": 0.5}]}, 12)
    assert few["adapter_loads"] > 100
    assert enough["adapter_loads"] == 12
    assert few["ttft_ms"]["mean"] > 2 * enough["ttft_ms"]["mean"]
    assert few["kv_tokens"] > enough["kv_tokens"]


@pytest.mark.parametrize(("slots", "changed", "said"), [
    (0, {}, "slots: expected at least 1"),
    (4, {"max_rank": 8}, "rank 16, more than the maximum rank 8"),
])  # fmt: skip
def test_mistakes_are_named(slots: int, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        ask({"adapters": [{"name": "a", "rank": 16, "rate": 1}]}, slots, **changed)
