"""The mixed load of the benchmark is what its docstring says."""

import importlib
from itertools import pairwise
from pathlib import Path
from statistics import mean, pstdev

import pytest


@pytest.fixture
def workload(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("workload")


@pytest.fixture
def make(workload):
    zero_load = workload.ZeroLoad(ttft_const_ms=10.0, ttft_token_ms=0.1, tpot_ms=6.0)

    def calls(programs=300, rate_req_s=8.0, seed=1, **more):
        return workload.mixed_calls(
            programs=programs, rate_req_s=rate_req_s, seed=seed, zero_load=zero_load, vocabulary=2048, **more
        )

    return calls


def test_lengths_are_around_230_and_30(make):
    calls = [call for seed in range(10) for call in make(seed=seed)]
    assert 210 < mean(len(call.prompt) for call in calls) < 250
    assert 26 < mean(call.output_tokens for call in calls) < 34


def test_every_tier_has_its_share_and_spans_the_run(make, workload):
    calls = make(programs=300, rate_req_s=10.0)
    for tier in workload.TIERS:
        arrivals = [call.arrival_s for call in calls if call.name == tier.name]
        assert len(arrivals) == round(300 * tier.share)
        assert 0 < min(arrivals) < max(arrivals) < 30
    assert [call.arrival_s for call in calls] == sorted(call.arrival_s for call in calls)


def test_the_tight_tier_is_bursty_and_the_others_are_not(make, workload):
    calls = make(programs=20_000)
    for tier in workload.TIERS:
        arrivals = [call.arrival_s for call in calls if call.name == tier.name]
        gaps = [b - a for a, b in pairwise(arrivals)]
        variation = pstdev(gaps) / mean(gaps)
        assert 3.5 < variation < 5.5 if tier.name == workload.TIGHT else 0.9 < variation < 1.1


def test_a_rate_only_stretches_time(make):
    slow, fast = make(rate_req_s=5.0), make(rate_req_s=10.0)
    assert [call.prompt for call in slow] == [call.prompt for call in fast]
    assert all(a.arrival_s == pytest.approx(2 * b.arrival_s) for a, b in zip(slow, fast, strict=True))


def test_same_seed_same_calls(make):
    assert make(seed=3) == make(seed=3)
    assert make(seed=3) != make(seed=4)


def test_no_two_prompts_share_a_prefix_worth_caching(make):
    starts = [call.prompt[:4] for call in make()]
    assert len(set(starts)) == len(starts)


def test_what_travels_is_what_is_judged(make):
    for call in make():
        assert call.slo["ttft_ms"] == call.targets.ttft_ms
        assert call.slo["tpot_ms"] == call.targets.tpot_ms
        slowdown = 3 if call.name == "summarizer" else 5
        assert call.targets.ttft_ms == pytest.approx(slowdown * (10 + 0.1 * len(call.prompt)), abs=0.06)


def test_hidden_lengths_look_alike(make, workload):
    assert {call.cap_tokens for call in make(hide_lengths=True)} == {workload.HIDDEN_CAP_TOKENS}
    assert {call.cap_tokens for call in make()} == {None}


def test_priority_follows_tightness(make, workload):
    calls = workload.with_priority(make())
    tight = {call.priority for call in calls if call.name == workload.TIGHT}
    assert tight == {2} and {call.priority for call in calls if call.name != workload.TIGHT} == {1}
