"""The policy on a simulated server: invariants are asserted inside `simulate`, promises here."""

import random
from itertools import pairwise

import pytest

from slos_sglang.measure.attainment import Targets, kept_token_rule
from slos_sglang.policy.batch_time import CostModel, OnlineCostModel, Piece
from slos_sglang.policy.batches import Limits
from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.sim.replica import Served, SimCall, simulate
from slos_sglang.slo import WireSLO

COST = CostModel(Piece(tokens_ms=0.095, requests_ms=0.36, context_ms=0.0015, const_ms=6.5))
KINDS = (
    WireSLO(ttft_ms=150, tpot_ms=30),
    WireSLO(ttft_slowdown=5, tpot_ms=100),
    WireSLO(ttft_slowdown=3, think_tpot_ms=50, tpot_ms=100),
    WireSLO(budget_ms=4000),
    None,
)


def load(seed: int, *, rate_req_s: float, calls: int) -> list[SimCall]:
    rng = random.Random(seed)
    now_s, result = 0.0, []
    for number in range(calls):
        # Bursts: half of the calls come at once with the one before.
        now_s += rng.expovariate(rate_req_s) * 2 if rng.random() < 0.5 else 0.0
        prompt = rng.randint(1, 900)
        result.append(
            SimCall(
                id=str(number),
                arrival_s=now_s,
                prompt_tokens=prompt,
                cached_tokens=rng.choice((0, prompt // 2)),
                output_tokens=rng.randint(1, 60),
                max_tokens=64,
                slo=rng.choice(KINDS),
            )
        )
    return result


def serve(seed: int, rate_req_s: float, *, noise: float = 0.1) -> list[Served]:
    policy = Scheduler(cost=OnlineCostModel())
    return simulate(load(seed, rate_req_s=rate_req_s, calls=120), policy, COST, noise=noise, seed=seed)


@pytest.mark.parametrize("seed", range(12))
def test_everybody_ends_at_any_load(seed: int) -> None:
    for rate in (2, 8, 40):
        served = serve(seed, rate)
        assert all(one.token_s == sorted(one.token_s) for one in served)


@pytest.mark.parametrize("seed", range(4))
def test_the_same_seed_gives_the_same_run(seed: int) -> None:
    assert [one.token_s for one in serve(seed, 10)] == [one.token_s for one in serve(seed, 10)]


def test_promises_are_kept_below_and_far_above_capacity() -> None:
    for rate in (3, 30):
        promised = [one for seed in range(8) for one in serve(seed, rate) if one.request.standard]
        kept = sum(one.request.kept for one in promised)
        assert len(promised) > 100
        assert kept / len(promised) > 0.9


def test_what_a_receipt_says_is_what_a_client_sees() -> None:
    for one in serve(3, 12):
        slo = one.call.slo
        if slo is None or slo.think_tpot_ms is not None:
            continue
        ttft_ms = None if one.request.ttft_s == float("inf") else one.request.ttft_s * 1e3
        client = kept_token_rule(Targets(ttft_ms=ttft_ms, tpot_ms=slo.tpot_ms), one.call.arrival_s, one.token_s)
        in_budget = slo.budget_ms is None or one.token_s[-1] - one.call.arrival_s <= slo.budget_ms / 1e3
        assert one.request.kept == (client and in_budget)


def test_best_effort_never_starves() -> None:
    """Promised work alone fills the server for 20 s; the few best-effort calls still move on by the ageing bound."""
    rng = random.Random(0)
    tight = WireSLO(ttft_ms=400, tpot_ms=40)
    calls = [
        SimCall(id=f"s{i}", arrival_s=i / 25, prompt_tokens=rng.randint(50, 400), output_tokens=30, slo=tight)
        for i in range(500)
    ] + [SimCall(id=f"b{i}", arrival_s=1.0, prompt_tokens=200, output_tokens=10) for i in range(3)]
    limits = Limits(best_effort_max_wait_s=0.5)
    served = simulate(
        sorted(calls, key=lambda c: c.arrival_s), Scheduler(cost=OnlineCostModel(), limits=limits), COST, noise=0.05
    )
    for one in served:
        if one.call.id.startswith("b"):
            times = [one.call.arrival_s, *one.token_s]
            assert max(b - a for a, b in pairwise(times)) < 4
