"""What vLLM refuses of flags, ranks, prompts and models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_server import SMALL, judge, workload

from deltaworks.errors import ImpossibleError, ProfileError, UserError, WorkloadError
from deltaworks.serving.model_length import check_lengths, cut_to_length
from deltaworks.serving.placement import place
from deltaworks.serving.profile import Profile, check_max_rank, check_one_model, with_flags
from deltaworks.serving.simulate import Configuration, simulate
from deltaworks.serving.workload import Requests, Workload, parse_workload, requests_of


def limited(length: int | None) -> Profile:
    """The small server with a model of some length, whose KV cache holds more than that."""
    return replace(SMALL, server=replace(SMALL.server, max_model_len=length))


def asked(*adapters: tuple[str, int, int]) -> Workload:
    """One request every two seconds of each adapter with its own prompt and output tokens."""
    listed = [
        {"name": name, "rank": 8, "rate": 0.5,
         "lengths": {"distribution": "fixed", "input_mean": prompt, "output_mean": output}}
        for name, prompt, output in adapters
    ]  # fmt: skip
    return parse_workload({"duration": 120, "adapters": listed}, Path())


def traced(*prompts: tuple[str, int]) -> Workload:
    rows = [
        {"time": i, "adapter": name, "prompt_tokens": prompt, "output_tokens": 5}
        for i, (name, prompt) in enumerate(prompts)
    ]
    return parse_workload({"requests": rows, "duration": 100}, Path())


def test_answers_end_where_the_length_does() -> None:
    one = np.ones(4)
    requests = Requests(one, one.astype(np.int64), np.array([50, 90, 100, 200]), np.array([50, 50, 50, 50]))
    assert cut_to_length(requests, None) is requests
    assert cut_to_length(requests, 1000) is requests
    # The last two are rejected for their prompts, and stay as they are asked.
    assert cut_to_length(requests, 100).output.tolist() == [50, 10, 50, 50]


def test_the_twin_rejects_long_prompts_and_cuts_long_answers() -> None:
    answer = simulate(asked(("fits", 100, 50), ("long", 100, 200), ("beyond", 300, 5)), limited(200), Configuration(3))
    assert answer["requests"]["rejected"] == answer["adapters"]["beyond"]["arrived"] == 60
    assert answer["requests"]["completed"] + answer["requests"]["running"] == 120
    assert answer["adapters"]["beyond"]["completed_share"] == 0
    short = simulate(asked(("fits", 100, 50), ("long", 100, 100)), SMALL, Configuration(3, None, 3))
    assert answer["output_throughput_tps"] == pytest.approx(short["output_throughput_tps"])
    assert answer["offered_tps"] == pytest.approx(60 * (150 + 200 + 305) / 120)


def test_lengths_that_are_never_reached_change_nothing() -> None:
    usual = asked(("a", 100, 50), ("b", 180, 15))
    without, within = (simulate(usual, limited(length), Configuration(2)) for length in (None, 200))
    assert without | {"wall_s": 0} == within | {"wall_s": 0}
    assert requests_of(usual).output.max() == 50


@pytest.mark.parametrize("prompt", [199, 200, 201])
def test_the_door_is_shut_where_every_prompt_is_too_long(prompt: int) -> None:
    for given in (asked(("a", 10, 10), ("b", prompt, 10)), traced(("a", 10), ("b", prompt), ("b", prompt + 1))):
        if prompt < 200:
            check_lengths(given, [limited(200)])
            continue
        check_lengths(given, [limited(200), limited(5000)])  # one type of GPU takes it
        check_lengths(given, [limited(200), limited(None)])
        with pytest.raises(WorkloadError, match=f"adapter 'b': every prompt has {prompt} tokens or more"):
            check_lengths(given, [limited(200), limited(100)])
        with pytest.raises(WorkloadError, match=r"adapter 'b'.*rejects prompts of 200 tokens or more"):
            place(judge(given, 0.1, (), limited(200)))


def test_no_search_is_begun_where_most_tokens_are_in_prompts_that_are_too_long() -> None:
    half = traced(*[("a", 20), ("a", 300)] * 20)
    with pytest.raises(
        ImpossibleError, match=r"a: 9\d% of its tokens .* small holds prompts and answers of up to 200 "
    ):
        place(judge(half, 0.1, (), limited(200)))
    # Answers beyond the length are cut, and no reason to refuse.
    assert len(place(judge(asked(("a", 100, 90_000)), 0.1, (), limited(200))).gpus) == 1


def test_the_door_is_open_where_some_prompts_are_short_or_nobody_asks() -> None:
    check_lengths(traced(("a", 500), ("a", 20), ("", 900)), [limited(200)])
    silent = parse_workload(
        {"duration": 9, "lengths": {"distribution": "fixed", "input_mean": 900, "output_mean": 9},
         "adapters": [{"name": "a", "rank": 8, "rate": 0}]}, Path(),
    )  # fmt: skip
    check_lengths(silent, [limited(200)])
    with pytest.raises(WorkloadError, match=r"every prompt has 900 tokens or more \(the same is true of 1 other\)"):
        check_lengths(asked(("a", 900, 9), ("b", 950, 9)), [limited(200)])


@pytest.mark.parametrize("rank", [1, 8, 16, 32, 64, 128, 256, 320, 512])
def test_ranks_that_vllm_takes(rank: int) -> None:
    assert check_max_rank(rank) == rank


@pytest.mark.parametrize(("rank", "hint"), [(0, "512$"), (2, "; 8 holds rank 2"), (24, "; 32 holds rank 24"),
                                            (257, "; 320 holds rank 257"), (513, "512$")])  # fmt: skip
def test_ranks_that_vllm_refuses(rank: int, hint: str) -> None:
    with pytest.raises(WorkloadError, match=f"vLLM does not take a maximum rank of {rank}, only 1, 8, 16, .*{hint}"):
        check_max_rank(rank)


@pytest.mark.parametrize(("configuration", "said"), [
    (Configuration(4, 24), "does not take a maximum rank of 24"),
    (Configuration(4, 8), None),
    (Configuration(4, None, 3), "at least as many adapters in host memory .* give 4 or more, not 3"),
    (Configuration(4, None, 4), None),
    (Configuration(4), None),
    (Configuration(0), "slots: expected at least 1"),
    (Configuration(4, client_max_outstanding=0), "client_max_outstanding: expected at least 1, not 0"),
    (Configuration(4, served=0), "served: expected at least 1, not 0"),
    (Configuration(4, client_max_outstanding=9), None),
])  # fmt: skip
def test_configurations_that_vllm_refuses(configuration: Configuration, said: str | None) -> None:
    given = workload([{"name": "a", "count": 2, "rank": 8, "rate": 0.1}])
    if said is None:
        assert simulate(given, SMALL, configuration)["throughput_tps"] > 0
        return
    with pytest.raises(WorkloadError, match=said):
        simulate(given, SMALL, configuration)


def test_an_adapter_of_another_rank_is_rounded_up() -> None:
    given = workload([{"name": "a", "rank": 24, "rate": 0.1}])
    assert simulate(given, SMALL, Configuration(1))["kv_tokens"] == SMALL.kv_tokens(1, 32)


@pytest.mark.parametrize(("flags", "said"), [
    ({"max_num_seqs": 0}, "max_num_seqs: expected a number of at least 1"),
    ({"max_num_seqs": 513}, "max_num_seqs 513 is more than max_num_batched_tokens 512"),
    ({"max_num_batched_tokens": 31}, "max_num_seqs 32 is more than max_num_batched_tokens 31"),
    ({"block_size": 24}, "block_size 24 is not one that vLLM takes; give a multiple of 16"),
    ({"block_size": 8}, "give a multiple of 16"),
    ({"max_model_len": 0}, "max_model_len: expected a number of at least 1"),
    ({"max_model_len": 4001}, "max_model_len 4,001 is more than the 4,000 of small"),
])  # fmt: skip
def test_flags_that_vllm_refuses(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        with_flags(limited(4000), **flags)


def test_a_server_starts_if_its_cache_holds_one_request_of_full_length() -> None:
    assert SMALL.kv_tokens(2, 8) == 5888
    assert limited(5888).starts(2, 8)
    assert not limited(5889).starts(2, 8)
    assert limited(5900).most_slots(8) == 1
    # A shorter length leaves room for more slots.
    assert with_flags(limited(4000), max_model_len=500).most_slots(8) == 109 > limited(4000).most_slots(8) == 40
    assert with_flags(replace(SMALL, kv_cache=replace(SMALL.kv_cache, least=5000)), max_model_len=500).starts(60, 8)
    # Who knows the KV tokens has seen the server start.
    assert with_flags(limited(4000), kv_tokens=800).starts(1, 8)
    assert with_flags(limited(4000), kv_tokens=800).server.max_model_len is None
    assert with_flags(limited(4000), kv_tokens=8000).server.max_model_len == 4000
    assert not with_flags(limited(4000), kv_tokens=800, max_model_len=4000).starts(1, 8)


def test_types_of_gpu_are_for_one_model() -> None:
    other = replace(SMALL, name="other", model="org/another")
    check_one_model([])
    check_one_model([SMALL, replace(SMALL, name="b", model="Org/Model/")])
    for attempt in (
        lambda: check_one_model([SMALL, SMALL, other]),
        lambda: judge(asked(("a", 9, 9)), 0.1, (), SMALL, other),
    ):
        with pytest.raises(UserError, match="small is a profile of 'org/model' and other one of 'org/another'"):
            attempt()
