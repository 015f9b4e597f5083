"""Capacity search, the cache of runs, and the upper bounds, against cases worked out by hand."""

import json

import pytest

from slos_sglang.measure.bound import attainment_bound, capacity_bound, erlang_loss
from slos_sglang.measure.cache import RunCache, source_digest
from slos_sglang.measure.capacity import GRID, LEAST_REQ_S, Capacity, find_capacity, highest
from slos_sglang.measure.result import Percentiles, RunResult
from slos_sglang.policy.batch_time import Piece
from slos_sglang.policy.cost_models import NamedCostModel
from slos_sglang.workloads.program import Program, Stage

NOTHING = Percentiles(p50=None, p90=None, p99=None)


def result(rate_req_s, attainment, mean_rule=0.0, seed=0):
    return RunResult(
        policy="p",
        scenario="s",
        rate_req_s=rate_req_s,
        seed=seed,
        offered=10,
        finished=10,
        declined=0,
        best_effort=0,
        attainment=attainment,
        attainment_mean_tpot=mean_rule,
        goodput_req_s=0.0,
        ttft_ms=NOTHING,
        tpot_ms=NOTHING,
        stage_attainment={},
        stage_attainment_mean_tpot={},
        tokens_per_s=0.0,
        wall_s=1.0,
        config={},
    )


@pytest.mark.parametrize("edge", [-40, -9, -8, -1, 0, 1, 7, 8, 9, 100])
@pytest.mark.parametrize("start", [-30, 0, 5])
def test_the_search_finds_the_edge_from_anywhere_in_few_looks(edge, start):
    asked = []

    def holds(step):
        asked.append(step)
        return step <= edge

    assert highest(holds, start) == edge
    assert len(asked) == len(set(asked))
    assert len(asked) <= 16


def test_the_search_ends_where_nothing_or_everything_holds():
    assert GRID ** highest(lambda step: False, 0) < LEAST_REQ_S
    assert highest(lambda step: True, 0) == pytest.approx(465, abs=2)
    found = find_capacity(lambda rate, seed: result(rate, 0.0), [0], hint_req_s=1.0)
    assert found.rate_req_s == 0.0


def test_capacity_is_the_mean_over_seeds_and_within_a_grid_step():
    edges = {0: 2.0, 1: 2.2, 2: 2.4}

    def run(rate_req_s, seed):
        return result(rate_req_s, 0.95 if rate_req_s <= edges[seed] else 0.85, mean_rule=0.95 * (rate_req_s < 1))

    found = find_capacity(run, [0, 1, 2], hint_req_s=9.0)
    for measured, edge in zip(found.by_seed_req_s, edges.values(), strict=True):
        assert edge / GRID < measured <= edge
    assert found.rate_req_s == pytest.approx(sum(found.by_seed_req_s) / 3)
    # t(2) = 4.303 times the standard error of the three.
    assert found.high_req_s - found.rate_req_s == pytest.approx(4.303 * 0.2 / 3**0.5, rel=0.1)
    assert found.rate_req_s - found.low_req_s == pytest.approx(found.high_req_s - found.rate_req_s)
    assert find_capacity(run, [0], hint_req_s=2.0, rule="mean").rate_req_s == pytest.approx(1.0, rel=0.02)
    assert find_capacity(run, [0], hint_req_s=2.0, target=0.85).rate_req_s > 100
    assert Capacity.of([2.0], target=0.9, rule="token").low_req_s is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"seeds": [0], "target": 0.0}, "target must be greater than 0 and at most 1, not 0.0"),
        ({"seeds": [0], "target": 1.1}, "not 1.1"),
        ({"seeds": []}, "at least one seed"),
    ],
)
def test_wrong_searches_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        find_capacity(lambda rate, seed: result(rate, 1.0), hint_req_s=1.0, **arguments)


def test_a_run_is_made_once_a_key(tmp_path):
    made = []

    def run():
        made.append(1)
        return result(1.0, 0.5)

    cache = RunCache(folder=tmp_path / "runs")
    first = cache.get({"rate": 1.0, "seed": 0}, run)
    assert cache.get({"seed": 0, "rate": 1.0}, run) == first
    assert len(made) == 1
    cache.get({"rate": 1.0, "seed": 1}, run)
    assert len(made) == 2
    (file, _) = sorted((tmp_path / "runs").iterdir())
    assert json.loads(file.read_text(encoding="utf-8"))["attainment"] == 0.5


def test_the_digest_of_sources_follows_imports():
    slo, attainment = source_digest("slos_sglang.slo"), source_digest("slos_sglang.measure.attainment")
    assert slo == source_digest("slos_sglang.slo")
    assert slo != attainment
    # attainment imports policy.request, which imports batch_time and slo: naming those adds nothing.
    assert attainment == source_digest("slos_sglang.measure.attainment", "slos_sglang.policy.batch_time")
    assert attainment != source_digest("slos_sglang.measure.attainment", "slos_sglang.policy.admission")


def offered(*stages):
    return Program(id="p", arrival_s=0.0, app="a", stages=stages)


def test_bounds_of_one_program_by_hand():
    """100 uncached tokens and 10 decodes at 1 ms, a constant of 5 ms, tightest pace 20 ms, 500 KV tokens.

    Own tokens: 110 ms, so 9.09 programs a second. Its decode steps hold 121, 122, .. 130 KV tokens: 1255 in all, which
    is 2.51 full steps of 5 ms: 122.55 ms, 8.16 a second. Steps of 20 ms leave three quarters of the time: 6.82.
    In the mean 125.5 tokens are held, so there are 3 places; of a load of 1.271 one in ten finds them taken.
    """
    stage = Stage(name="s", prompt_tokens=120, cached_tokens=20, output_tokens=11, tpot_ms=20)
    model = NamedCostModel(name="m", pieces=(Piece(tokens_ms=1, const_ms=5),), kv_tokens=500)
    bound = capacity_bound([offered(stage)], model)
    assert bound.fluid_req_s == pytest.approx(1000 / 110)
    assert bound.kv_req_s == pytest.approx(1000 / 122.55)
    assert bound.tier_req_s == pytest.approx(750 / 110)
    assert bound.loss_req_s == pytest.approx(1000 / 122.55 * 1.271 / 3, rel=1e-3)
    # Of a load of 2 two places turn away: (2^2 / 2) / (1 + 2 + 2^2 / 2).
    assert erlang_loss(2, 2.0) == pytest.approx(0.4)


def test_bounds_count_rows_and_context_and_the_dearest_piece():
    """2 stages of one prompt token and 2 outputs: 2 prefill rows and 2 decode rows, contexts 1, 2, 1, 2."""
    stage = Stage(name="s", prompt_tokens=1, output_tokens=2)
    pieces = (Piece(requests_ms=10, context_ms=1), Piece(const_ms=3))
    bound = capacity_bound([offered(stage, stage)], NamedCostModel(name="m", pieces=pieces, kv_tokens=1))
    assert bound.fluid_req_s == pytest.approx(1000 / 46)
    assert bound.tier_req_s == bound.fluid_req_s
    # The second piece: 2 decode steps hold 2 tokens each, where 1 fits: 4 steps of 3 ms.
    assert bound.kv_req_s == pytest.approx(1000 / 46)


def test_at_a_target_below_1_the_dearest_programs_are_given_up():
    cheap, dear = (Stage(name="s", prompt_tokens=n, output_tokens=1) for n in (10, 1000))
    model = NamedCostModel(name="m", pieces=(Piece(tokens_ms=1),), kv_tokens=2000)
    programs = [offered(cheap)] * 9 + [offered(dear)]
    assert capacity_bound(programs, model).fluid_req_s == pytest.approx(1000 * 10 / 90)
    assert capacity_bound(programs, model, target=1).fluid_req_s == pytest.approx(1000 * 10 / 1090)
    for wrong, says in (({"target": 0}, "target"), ({"programs": []}, "programs")):
        with pytest.raises(ValueError, match=says):
            capacity_bound(wrong.pop("programs", programs), model, **wrong)


@pytest.mark.parametrize(
    ("rate_req_s", "share"),
    [(10_000 / 1090, 1.0), (10_000 / 590, 0.95), (10_000 / 90, 0.9), (10_000 / 45, 0.45), (1.0, 1.0)],
)
def test_at_a_rate_the_cheapest_programs_fill_the_server(rate_req_s, share):
    """Nine of 10 ms and one of 1000, of which a part counts."""
    cheap, dear = (Stage(name="s", prompt_tokens=n, output_tokens=1) for n in (10, 1000))
    model = NamedCostModel(name="m", pieces=(Piece(tokens_ms=1),), kv_tokens=2000)
    programs = [offered(dear)] + [offered(cheap)] * 9
    assert attainment_bound(programs, model, rate_req_s=rate_req_s) == pytest.approx(share)


def test_attainment_is_bounded_by_memory_and_by_the_tightest_pace():
    """The program worked out above, in less memory, and by its pace: 110 ms of three quarters of the time."""
    stage = Stage(name="s", prompt_tokens=120, cached_tokens=20, output_tokens=11, tpot_ms=20)
    pieces, programs = (Piece(tokens_ms=1, const_ms=5),), [offered(stage)]
    short = NamedCostModel(name="m", pieces=pieces, kv_tokens=140)
    assert attainment_bound(programs, short, rate_req_s=10) == pytest.approx(100 / (110 + 1255 / 140 * 5))
    paced = NamedCostModel(name="m", pieces=pieces, kv_tokens=500)
    assert attainment_bound(programs, paced, rate_req_s=10) == pytest.approx(75 / 110)
    for wrong, says in ((0, "rate_req_s"), (-1, "rate_req_s")):
        with pytest.raises(ValueError, match=says):
            attainment_bound(programs, paced, rate_req_s=wrong)
    with pytest.raises(ValueError, match="programs"):
        attainment_bound([], paced, rate_req_s=1)


def test_a_change_of_admission_leaves_the_runs_of_others_standing():
    others = ("slos_sglang.sim.run", "slos_sglang.sim.baselines.vllm")
    assert source_digest(*others) != source_digest(*others, "slos_sglang.policy.admission")
    assert source_digest(*others) == source_digest(*others, "slos_sglang.policy.batches")
