"""The policy on a simulated server: invariants are asserted inside `simulate`, promises here."""

import random
from itertools import pairwise

import pytest

from slos_sglang.policy.batch_time import CostModel, OnlineCostModel, Piece
from slos_sglang.policy.batches import Limits
from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.sim import Run, simulate
from slos_sglang.slo import WireSLO
from slos_sglang.workloads.program import Program, Stage

COST = CostModel(Piece(tokens_ms=0.095, requests_ms=0.36, context_ms=0.0015, const_ms=6.5))
MEMORY_TOKENS = 100_000
KINDS = (
    WireSLO(ttft_ms=150, tpot_ms=30),
    WireSLO(ttft_slowdown=5, tpot_ms=100),
    WireSLO(ttft_slowdown=3, think_tpot_ms=50, tpot_ms=100),
    WireSLO(budget_ms=4000),
    None,
)


def call(name: str, arrival_s: float, prompt_tokens: int, output_tokens: int, *, cached_tokens: int = 0) -> Program:
    stage = Stage(
        name="call",
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        cached_tokens=min(cached_tokens, prompt_tokens - 1),
    )
    return Program(id=name, arrival_s=arrival_s, app="test", stages=(stage,))


def load(seed: int, *, rate_req_s: float, calls: int) -> tuple[list[Program], dict[str, WireSLO | None]]:
    rng = random.Random(seed)
    now_s, programs, slos = 0.0, [], {}
    for number in range(calls):
        # Bursts: half of the calls come at once with the one before.
        now_s += rng.expovariate(rate_req_s) * 2 if rng.random() < 0.5 else 0.0
        prompt = rng.randint(1, 900)
        cached = rng.choice((0, prompt // 2))
        programs.append(call(str(number), now_s, prompt, rng.randint(1, 60), cached_tokens=cached))
        slos[str(number)] = rng.choice(KINDS)
    return programs, slos


def serve(seed: int, rate_req_s: float, *, noise: float = 0.1) -> Run:
    programs, slos = load(seed, rate_req_s=rate_req_s, calls=120)
    return simulate(
        programs,
        [Scheduler(cost=OnlineCostModel())],
        COST,
        memory_tokens=MEMORY_TOKENS,
        lengths="estimated",
        noise=noise,
        seed=seed,
        max_tokens=64,
        wire=lambda program, stage: slos[program.id],
    )


@pytest.mark.parametrize("seed", range(12))
def test_everybody_ends_at_any_load(seed: int) -> None:
    for rate in (2, 8, 40):
        run = serve(seed, rate)
        assert all(c.outcome == "finished" and len(c.token_s) == c.stage.output_tokens for c in run.calls)
        assert all(c.token_s == sorted(c.token_s) for c in run.calls)


@pytest.mark.parametrize("seed", range(4))
def test_the_same_seed_gives_the_same_run(seed: int) -> None:
    assert serve(seed, 10).programs == serve(seed, 10).programs


def test_promises_are_kept_below_and_far_above_capacity() -> None:
    for rate in (3, 30):
        promised = [c.request for seed in range(8) for c in serve(seed, rate).calls if c.request.standard]
        assert len(promised) > 100
        assert sum(request.kept for request in promised) / len(promised) > 0.9


def test_what_a_receipt_says_is_what_a_client_sees() -> None:
    run = serve(3, 12)
    for one, record in zip(run.calls, (program.stages[0] for program in run.programs), strict=True):
        slo = one.request.slo
        if slo is None or slo.think_tpot_ms is not None:
            continue
        # The receipt gives a budget no tolerance.
        in_budget = slo.budget_ms is None or one.token_s[-1] - record.arrival_s <= slo.budget_ms / 1e3
        assert one.request.kept == (record.attained and in_budget)


def test_best_effort_never_starves() -> None:
    """Promised work alone could fill the server for 20 s; the oldest best effort has its turn all the same."""
    rng = random.Random(0)
    tight = WireSLO(ttft_ms=400, tpot_ms=40)
    calls = [call(f"s{i}", i / 25, rng.randint(50, 400), 30) for i in range(500)]
    calls += [call(f"b{i}", 1.0, 200, 10) for i in range(3)]
    run = simulate(
        calls,
        [Scheduler(cost=OnlineCostModel(), limits=Limits(best_effort_max_wait_s=0.5))],
        COST,
        memory_tokens=MEMORY_TOKENS,
        lengths="estimated",
        noise=0.05,
        wire=lambda program, stage: tight if program.id.startswith("s") else None,
        trace=True,
    )
    standard = {one.request.rid for one in run.calls if one.request.standard}
    ran = [(step.start_s, {*step.decode, *(rid for rid, _ in step.prefill)}) for step in run.steps]
    served_s = [at_s for at_s, who in ran if not who <= standard]
    assert len(served_s) > 20 and max(b - a for a, b in pairwise(served_s)) < 2
