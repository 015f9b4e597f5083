"""Drafting tokens: what it costs, how many are drafted, what they bring; small schedules worked out on paper.

In those a step costs 10 ms, 1 ms a new token and 2 ms a step of the draft model; times are in ms.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_sglang.measure.bound import capacity_bound
from slos_sglang.policy import plan
from slos_sglang.policy.batch_time import MAX_DRAFTS, BatchSize, CostModel, Piece, tokens_a_step
from slos_sglang.policy.batches import Batch, Limits, Memory
from slos_sglang.policy.cost_models import COST_MODELS, NamedCostModel
from slos_sglang.policy.request import Request, table_of
from slos_sglang.policy.state import Rows, World, rows_of, world_of
from slos_sglang.sim import Run, simulate
from slos_sglang.sim.baselines import POLICIES
from slos_sglang.sim.experiment import Experiment
from slos_sglang.slo import WireSLO
from slos_sglang.workloads.program import Program, Stage

PIECE = Piece(tokens_ms=1.0, spec_steps_ms=2.0, const_ms=10.0)
ALWAYS, NEVER = 1 - 1e-12, 1e-12
OPT = COST_MODELS["opt-13b-a100-tp2"]


def call(name: str, at_ms: float, prompt_tokens: int, output_tokens: int, **targets: float) -> Program:
    stage = Stage(name="call", prompt_tokens=prompt_tokens, output_tokens=output_tokens, **targets)
    return Program(id=name, arrival_s=at_ms / 1e3, app="test", stages=(stage,))


def run(
    policy: str,
    programs: list[Program],
    acceptance: float,
    *,
    pieces: tuple[Piece, ...] = (PIECE,),
    memory_tokens: int = 1000,
    seed: int = 0,
    **options: object,
) -> Run:
    cost = CostModel(*pieces, acceptance=acceptance)
    replica = POLICIES[policy](cost=cost, **options)
    return simulate(programs, [replica], cost, memory_tokens=memory_tokens, block_tokens=1, seed=seed, trace=True)


def token_ms(seen: Run, name: str = "A") -> list[int]:
    return [round(at_s * 1e3) for c in seen.calls if c.program.id == name for at_s in c.token_s]


def test_a_step_brings_one_token_and_those_accepted_in_a_row() -> None:
    assert tokens_a_step(0, 0.7) == 1
    assert tokens_a_step(3, 0.7) == pytest.approx(1 + 0.7 + 0.49 + 0.343)


def test_drafts_cost_their_steps_and_their_tokens() -> None:
    cost = CostModel(PIECE, acceptance=0.5)
    assert cost.batch_ms(BatchSize(tokens=3, requests=1, draft_steps=2)) == 10 + 3 + 4
    # Beside a decoder with two drafts 13 ms of 30 are left.
    assert cost.chunk_tokens(BatchSize(3, 1, 0, 2), prefix_tokens=0, within_ms=30) == 13
    # One draft: 1.5 tokens in 14 ms; none: one in 11; two: 1.75 in 17.
    assert cost.token_ms(0) == pytest.approx(14 / 1.5)
    assert CostModel(PIECE).token_ms(0) == 11


def test_all_drafts_are_accepted() -> None:
    # 30 ms of prefill bring the first token; then 10 + 3 + 2 * 2 ms bring three.
    seen = run("vllm", [call("A", 0, 20, 7)], ALWAYS, drafts=2)
    assert token_ms(seen) == [30, *[47] * 3, *[64] * 3]
    # What is drafted beyond the end is not output.
    assert token_ms(run("vllm", [call("A", 0, 20, 6)], ALWAYS, drafts=2)) == [30, *[47] * 3, *[64] * 2]


def test_no_draft_is_accepted_and_none_is_made_where_memory_is_short() -> None:
    # Of 27 tokens of memory the prompt takes 20. A step takes three more and gives two back; before the last one 25 are
    # held, so it drafts nothing: 11 ms.
    seen = run("vllm", [call("A", 0, 20, 7)], NEVER, memory_tokens=27, drafts=2)
    assert token_ms(seen) == [30, 47, 64, 81, 98, 115, 126]


def test_sarathi_counts_drafts_in_its_budget() -> None:
    # A decodes with two drafts: 3 of the 13 tokens; 10 are left for B's prompt.
    load = [call("A", 0, 13, 4), call("B", 5, 20, 1)]
    seen = run("sarathi", load, ALWAYS, budget_tokens=13, drafts=2)
    # A13: 23 ms. A and B10: 10 + 13 + 4 = 27 ms, to 50, and A has all four. B10 alone: 20 ms.
    assert token_ms(seen) == [23, 50, 50, 50]
    assert token_ms(seen, "B") == [70]


def test_slos_drafts_what_brings_the_most_tokens_in_the_time() -> None:
    # Alone and always accepted: as many as there may be, 7 tokens in 10 + 7 + 12 ms. Never: none, 11 ms a token.
    load = [call("A", 0, 20, 15, ttft_ms=100, tpot_ms=50)]
    assert token_ms(run("slos", load, ALWAYS)) == [30, *[59] * 7, *[88] * 7]
    assert token_ms(run("slos", load, NEVER))[:3] == [30, 41, 52]
    # A draft model that takes longer than the model itself is of no use.
    dear = Piece(tokens_ms=1.0, spec_steps_ms=20.0, const_ms=10.0)
    assert token_ms(run("slos", load, 0.9, pieces=(dear,)))[:3] == [30, 41, 52]


def test_slos_drafts_nothing_where_memory_is_short() -> None:
    # Of 30 tokens of memory the prompt takes 20 and the first step 7. One token is left to come, and there is no room
    # for what would be drafted after it: 11 ms.
    load = [call("A", 0, 20, 9, ttft_ms=100, tpot_ms=50)]
    seen = run("slos", load, ALWAYS, memory_tokens=30)
    assert token_ms(seen) == [30, *[59] * 7, 70]
    assert seen.preemptions == 0


def world_and_rows(
    slack_ms: list[float], *, acceptance: float, prompts: int = 0, tpot_ms: float = 50.0
) -> tuple[World, Rows]:
    requests = []
    for seq in range(len(slack_ms) + prompts):
        slo = WireSLO(ttft_ms=1000.0, tpot_ms=tpot_ms)
        request = Request(rid=f"r{seq}", seq=seq, arrival_s=0.0, slo=slo, uncached_tokens=500, left_tokens=50)
        request.set_targets(CostModel(*OPT.pieces))
        request.admit()
        if seq < len(slack_ms):
            request.context_tokens, request.uncached_tokens, request.started = 500, 0, True
            request.token(slack_ms[seq] / 1e3 - request.pace_s)
        requests.append(request)
    cost = CostModel(*OPT.pieces, acceptance=acceptance)
    return world_of(cost, Limits(), Memory()), rows_of(table_of(requests))


def test_prompts_wait_for_batches_that_drafts_make_longer() -> None:
    # Without drafts a batch may last 50 ms, of which a step's constant takes 32.
    world, rows = world_and_rows([500.0] * 4, acceptance=0.7)
    drafts = plan.drafts_for(500.0, True, rows, world)
    assert drafts > 0
    few = world._replace(acceptance=0.2)
    assert plan.drafts_for(500.0, True, rows, few) < drafts
    assert plan.drafts_for(500.0, True, rows, world._replace(acceptance=0.0)) == 0


def test_drafts_end_where_somebody_would_be_late() -> None:
    # A step takes 31.73 ms and 0.07 a token, a draft 3.34 and a token more: two take 38.6 ms, three 42.0.
    for slack_ms, most in ((31.0, MAX_DRAFTS), (33.0, 0), (35.5, 1), (40.0, 2), (500.0, MAX_DRAFTS)):
        world, rows = world_and_rows([slack_ms], acceptance=0.95)
        assert plan.drafts_for(slack_ms, False, rows, world) == most


@given(
    slack_ms=st.lists(st.floats(20, 120), min_size=1, max_size=20),
    acceptance=st.floats(0.01, 0.99),
    prompts=st.integers(0, 2),
)
def test_nobody_is_late_for_the_drafts(slack_ms: list[float], acceptance: float, prompts: int) -> None:
    world, rows = world_and_rows(slack_ms, acceptance=acceptance, prompts=prompts)
    tightest_ms, count = min(slack_ms), len(slack_ms)
    drafts = plan.drafts_for(tightest_ms, prompts > 0, rows, world)
    assert 0 <= drafts <= MAX_DRAFTS
    context = 501 * count
    without_ms = plan.batch_ms(count, count, context, 0, world)
    with_ms = plan.batch_ms(count * (1 + drafts), count, context + count * drafts, drafts, world)
    assert with_ms <= max(tightest_ms, 0) or drafts == 0 or without_ms > tightest_ms
    # Compiled and uncompiled are the same.
    take, plain = np.zeros(count + prompts, dtype=np.int64), np.zeros(count + prompts, dtype=np.int64)
    waiting = np.arange(count, count + prompts)
    assert plan.choose(0.0, rows, waiting, world, take) == plan.choose.py_func(0.0, rows, waiting, world, plain)
    assert (take == plain).all()


def test_a_batch_that_drafts_nothing_after_all_costs_nothing_of_it() -> None:
    decoder = Request(rid="d", seq=0, arrival_s=0.0, context_tokens=100)
    batch = Batch(drafts=3)
    batch.add(decoder, 1)
    assert batch.size == BatchSize(4, 1, 104, 3)
    batch.draft_nothing()
    assert batch.size == BatchSize(1, 1, 101, 0)
    batch.remove(decoder, 1)
    assert batch.size == BatchSize()


def busy(count: int, gap_ms: float) -> list[Program]:
    return [call(f"p{n}", n * gap_ms, 600 + n * 37 % 500, 40, ttft_slowdown=5.0, tpot_ms=50.0) for n in range(count)]


def test_with_a_draft_model_more_is_promised_and_nearly_all_of_it_is_kept() -> None:
    kept = {}
    for acceptance in (0.0, 0.7):
        seen = run("slos", busy(300, 90.0), acceptance, pieces=OPT.pieces, memory_tokens=OPT.kv_tokens)
        stages = [stage for record in seen.programs for stage in record.stages]
        promised = [stage for stage in stages if not stage.best_effort]
        kept[acceptance] = sum(stage.attained for stage in stages)
        assert sum(stage.attained for stage in promised) >= 0.98 * len(promised)
    assert kept[0.7] > 1.2 * kept[0.0]


def test_luck_is_drawn_from_the_seed_and_is_what_was_said() -> None:
    # 400 steps of 4 drafts: 1 + .5 + .25 + .125 + .0625 tokens each in the mean.
    load = [call("A", 0, 20, 2000)]
    seen = [run("vllm", load, 0.5, memory_tokens=3000, seed=seed, drafts=4) for seed in (1, 1, 2)]
    assert token_ms(seen[0]) == token_ms(seen[1]) != token_ms(seen[2])
    assert 2000 / (seen[0].steps_run - 1) == pytest.approx(tokens_a_step(4, 0.5), rel=0.06)


def test_bounds_with_drafts_by_hand() -> None:
    """100 uncached tokens, 10 decodes; a step 5 ms, 0.5 ms a draft, nearly all accepted: 6 drafts are best, 7 tokens a
    step of 8 ms. Own tokens: 110 ms. Its decode steps hold 1255 KV tokens of 500 in all: 2.51 / 7 steps of 8 ms. At a
    pace of 20 ms a token 140 ms pass from step to step.
    """
    stage = Stage(name="s", prompt_tokens=120, cached_tokens=20, output_tokens=11, tpot_ms=20)
    piece = Piece(tokens_ms=1, const_ms=5, spec_steps_ms=0.5)
    model = NamedCostModel(name="m", pieces=(piece,), kv_tokens=500)
    program = Program(id="p", arrival_s=0.0, app="a", stages=(stage,))
    bound = capacity_bound([program], model, acceptance=ALWAYS)
    assert bound.kv_req_s == pytest.approx(1000 / (110 + 2.51 / 7 * 8))
    assert bound.tier_req_s == pytest.approx((1 - 8 / 140) * 1000 / 110)
    assert capacity_bound([program], model) == capacity_bound([program], model, acceptance=NEVER)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"acceptance": 1.0}, "acceptance must be at least 0 and less than 1, not 1.0"),
        ({"acceptance": -0.1}, "acceptance must be at least 0 and less than 1, not -0.1"),
        ({"acceptance": 0.7, "model": COST_MODELS["toolllama-7b-a100"]}, "which has no draft model"),
        ({"policy": "vllm", "options": {"drafts": 2}}, "drafts must be 0 on a server without a draft model, not 2"),
        ({"policy": "vllm", "options": {"drafts": -1}, "acceptance": 0.7}, "drafts must be at least 0, not -1"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Experiment(**{"policy": "slos", "scenario": "chatbot", "model": OPT, **changes})  # type: ignore[arg-type]
