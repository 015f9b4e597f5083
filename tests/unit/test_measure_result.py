"""The result object: every offered program counts, whatever became of it."""

import json

import pytest

from slos_sglang.measure.attainment import Targets
from slos_sglang.measure.result import Percentiles, ProgramRecord, RunResult, StageRecord, summarize

TARGETS = Targets(ttft_ms=100, tpot_ms=50)
GOOD = (0.1, 0.15, 0.2)


def program(name: str, token_s: tuple[float, ...] = GOOD, completed: bool = True, **about) -> ProgramRecord:
    stage = StageRecord(name=name, targets=TARGETS, arrival_s=0.0, token_s=token_s, **about)
    return ProgramRecord(id=name, stages=(stage,), completed=completed)


def result_of(programs: list[ProgramRecord], wall_s: float = 10.0) -> RunResult:
    return summarize(programs, policy="p", scenario="s", rate_req_s=1.0, seed=1, wall_s=wall_s)


def test_every_offered_program_is_in_the_denominator():
    result = result_of(
        [
            program("good"),
            program("slow", (0.3, 0.35, 0.4)),
            program("refused", (), outcome="declined", declined=True),
            program("cut short", GOOD, outcome="declined", declined=True),
            program("broken", GOOD, outcome="failed"),
            program("left over", GOOD, declined=True, best_effort=True),
        ]
    )
    assert (result.offered, result.finished, result.declined, result.best_effort) == (6, 3, 3, 1)
    assert result.attainment == result.attainment_mean_tpot == 2 / 6
    assert result.goodput_req_s == pytest.approx(0.2)
    assert result.stage_attainment == {
        "broken": 0,
        "cut short": 0,
        "good": 1,
        "left over": 1,
        "refused": 0,
        "slow": 0,
    }
    assert result.tokens_per_s == pytest.approx(1.5)


def test_the_admitted_have_a_denominator_of_their_own():
    late, left_over = program("late", (0.3,)), program("left over", best_effort=True)
    assert result_of([program("good"), late, left_over]).attainment_admitted == 0.5
    assert result_of([left_over]).attainment_admitted is None


def test_all_stages_of_a_program_must_hold():
    act, late = program("act").stages[0], program("final", (0.3,)).stages[0]
    result = result_of(
        [ProgramRecord(id="a", stages=(act, late)), ProgramRecord(id="b", stages=(act,), completed=False)]
    )
    assert result.attainment == 0
    assert result.finished == 1
    assert result.stage_attainment == {"act": 1.0, "final": 0.0}


def test_the_two_rules_are_told_apart():
    paced_from_deadline = (0.01, 0.07, 0.14, 0.2)  # 63 ms a token, but ahead of every due time
    result = result_of([program("x", paced_from_deadline)])
    assert (result.attainment, result.attainment_mean_tpot) == (1.0, 0.0)
    assert (result.stage_attainment, result.stage_attainment_mean_tpot) == ({"x": 1.0}, {"x": 0.0})


def test_percentiles_are_values_of_the_sample():
    assert Percentiles.of([3.0, 1.0, 2.0]) == Percentiles(p50=2.0, p90=3.0, p99=3.0)
    assert Percentiles.of(list(range(1, 101))) == Percentiles(p50=50, p90=90, p99=99)
    assert Percentiles.of([]) == Percentiles(p50=None, p90=None, p99=None)


def test_ttft_and_tpot_are_taken_over_what_came():
    result = result_of([program("a"), program("b", (0.2,)), program("c", (), outcome="failed")])
    assert (result.ttft_ms.p50, result.ttft_ms.p99) == (pytest.approx(100), pytest.approx(200))
    assert result.tpot_ms.p99 == pytest.approx(50)


def test_it_goes_through_json():
    result = result_of([program("a")])
    assert RunResult(**json.loads(result.model_dump_json())) == result


def test_nothing_offered_and_no_time_are_errors():
    with pytest.raises(ValueError, match="at least one"):
        result_of([])
    with pytest.raises(ValueError, match="wall_s must be greater than 0, not 0"):
        result_of([program("a")], wall_s=0)
