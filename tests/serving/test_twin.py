"""The twin against the plain reference: the same schedule, tokens and times on random small workloads."""

import math
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_twin import Costs, Limits, Request, Twin

from deltaworks.serving import server, twin
from deltaworks.serving.simulate import check_conservation
from deltaworks.serving.starvation import tokens_made

PLACES = (
    twin.BASE, twin.PER_DECODE, twin.PER_PREFILL, twin.PER_CONTEXT, twin.DECODE_PREFILL, twin.EAGER, twin.GRAPH_TOKENS,
    twin.LORA, twin.PER_ADAPTER, twin.LORA_DECODE, twin.LORA_PREFILL, twin.ADAPTER_TOKEN, twin.SMALL,
    twin.SMALL_ADAPTER, twin.SMALL_TOKENS, twin.QUEUE, twin.PER_RUNNING, twin.PER_SKIPPED, twin.REQUEST,
    twin.FIRST_REQUEST, twin.PER_LABEL_SET, twin.SCRAPE_PERIOD, twin.MERGE_BATCH,
)  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Twin:
    adapters = draw(st.integers(1, 6))
    block = draw(st.sampled_from([1, 2, 4, 16]))
    longest = draw(st.integers(2, 40))
    blocks = draw(st.integers(-(-2 * longest // block), 12 * longest // block + 4))
    max_seqs = draw(st.integers(1, 12))
    limits = Limits(
        max_seqs, max_seqs + draw(st.integers(0, 40)), block, blocks, draw(st.integers(1, adapters + 1)), 0,
        draw(st.sampled_from([3, 10, 10**6])),
    )  # fmt: skip
    limits.cpu_adapters = limits.slots + draw(st.integers(0, adapters))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 60))
    spread = draw(st.sampled_from([0.0, 0.05, 0.5, 5.0]))
    arrivals = np.sort(rng.random(count) * spread * count * 0.1)
    requests = [
        Request(i, float(arrivals[i]), int(rng.integers(adapters + 1)), int(p), int(o))
        for i, (p, o) in enumerate(rng.integers(1, longest + 1, (count, 2)))
    ]
    some = st.sampled_from([0.0, 1.0])

    def cost(scale: float) -> float:
        return float(draw(some) * rng.random() * scale)

    costs = Costs(
        base=0.005 + 0.01 * rng.random(), decode=cost(1e-3), prefill=cost(1e-3), context=cost(1e-4),
        decode_prefill=cost(1e-4), eager=cost(5e-3), graph_tokens=float(draw(st.sampled_from([4, 16, 10**6]))),
        lora=cost(5e-3), adapter=cost(3e-3),
        lora_decode=cost(1e-3), lora_prefill=cost(1e-3), adapter_token=cost(1e-4), small=cost(1e-3),
        small_adapter=cost(1e-3),
        small_tokens=float(draw(st.sampled_from([0, 5, 20]))), queue=cost(1e-3),
        running=cost(1e-4), skipped=cost(1e-4), request=cost(1e-2), first_request=cost(0.1), label_set=cost(0.02),
        scrape_period=cost(0.5), merge_batch=float(draw(st.sampled_from([0, 3, 128]))),
    )  # fmt: skip
    loads = [float(x) for x in rng.random(adapters) * draw(st.sampled_from([0.0, 0.02]))]
    disks = [float(x) for x in rng.random(adapters) * draw(st.sampled_from([0.0, 0.1]))]
    duration = float(draw(st.sampled_from([0.5, 3.0, 1000.0])))
    return Twin(requests, adapters, loads, disks, costs, limits, duration)


def arrays(case: Twin) -> tuple[server.Server, int, Any, Any, Any, Any]:
    limit = np.array(astuple(case.limits), np.int64)
    vector = np.zeros(twin.COSTS)
    vector[list(PLACES)] = astuple(case.costs)

    def column(name: str) -> Any:
        return np.array([getattr(r, name) for r in case.requests])

    n = len(case.requests)
    state = server.empty_server(
        column("adapter"), column("prompt"), column("output"), case.base_model, limit, 1 << 10
    )  # fmt: skip
    first, finish, gaps, sums = np.full(n, np.nan), np.full(n, np.nan), np.zeros(twin.BINS), np.zeros(twin.SUMS)
    arrived = twin.run(
        state, column("arrival_s").astype(float), np.array(case.load_s), np.array(case.disk_s), vector,
        case.duration_s, first, finish, gaps, sums,
    )  # fmt: skip
    return state, arrived, first, finish, gaps, sums


STATES = {"never": server.NEVER, "completed": server.COMPLETED, "running": server.RUNNING, "waiting": server.WAITING,
          "rejected": server.REJECTED}  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(cases())
def test_the_twin_is_the_reference(case: Twin) -> None:
    state, arrived, first, finish, gaps, sums = arrays(case)
    case.turn = server.turns(case.base_model).tolist()
    case.run()
    check_conservation(state, arrived)
    assert state.state.tolist() == [STATES[r.state] for r in case.requests]
    assert np.allclose(first, [r.first_token_s for r in case.requests], rtol=1e-9, atol=1e-9, equal_nan=True)
    preempted = [r.preempted_s for r in case.requests]
    assert np.allclose(state.preempted_s, preempted, rtol=1e-9, atol=1e-9, equal_nan=True)
    made = tokens_made(state, case.duration_s)
    assert [int(made[r.index]) for r in case.requests] == [r.generated for r in case.requests]
    assert np.allclose(finish, [r.finish_s for r in case.requests], rtol=1e-9, atol=1e-9, equal_nan=True)
    total = state.total
    assert total[server.PREEMPTIONS] == case.preemptions
    assert total[server.LOADS] == case.loads
    assert total[server.DISK_LOADS] == case.disk_loads
    assert total[server.STEPS] == case.steps
    assert total[server.MOST_DISTINCT] == case.most_adapters
    assert total[server.LABEL_SETS] == len(case.labels)
    assert sums[twin.RUNNING_S] == pytest.approx(case.running_s)
    area, moment = case.late()
    assert sums[twin.LATE] == pytest.approx(area, rel=1e-6, abs=1e-9)
    assert sums[twin.LATE_SLOPE] == pytest.approx(moment, rel=1e-6, abs=1e-6 * max(1.0, area) * case.duration_s)
    assert sums[twin.MERGED] == pytest.approx(case.merged, rel=1e-6)
    assert gaps.sum() == pytest.approx(sum(n for _, n in case.gaps))
    mean = (gaps * twin.SHORTEST_GAP_S * 2 ** ((np.arange(twin.BINS) + 0.5) / twin.BINS_PER_DOUBLING)).sum()
    assert mean == pytest.approx(sum(s * n for s, n in case.gaps), rel=0.04)


@given(st.floats(1e-4, 1), st.sampled_from([0.0, 1e-9, 1e-5, 0.1]), st.floats(-1, 1000), st.integers(1, 5000))
def test_steps_until_a_time(first: float, growth: float, wanted: float, most: int) -> None:
    steps = twin.steps_until(first, growth, wanted, most)
    lasting = [n * first + growth * n * (n - 1) / 2 for n in (steps, steps - 1)]
    assert 1 <= steps <= most
    assert steps == most or lasting[0] >= wanted * (1 - 1e-12)
    assert steps == 1 or lasting[1] < wanted * (1 + 1e-12)


def test_a_jump_is_many_steps() -> None:
    requests = [Request(0, 0.0, 0, 10, 2000)]
    case = Twin(requests, 1, [0.0], [0.0], Costs(), Limits(8, 64, 16, 1000, 1, 1, 10), 1e6)
    state, *_, finish, _, _ = arrays(case)
    assert state.total[server.STEPS] == 2000
    assert state.total[server.JUMPS] <= 3
    assert math.isclose(finish[0], 20.0)
