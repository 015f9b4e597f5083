"""Experiments: the same everywhere, named by everything that matters, explained."""

from dataclasses import replace

import pytest

from slos_sglang.measure.cache import RunCache
from slos_sglang.policy.batch_time import Piece
from slos_sglang.policy.cost_models import COST_MODELS, NamedCostModel
from slos_sglang.sim.experiment import KNOWN, Experiment
from slos_sglang.sim.explain import explain, lines
from slos_sglang.workloads.program import Program, Stage
from slos_sglang.workloads.scenarios import Draw

TOOLS = Experiment(
    policy="vllm",
    scenario="toolllm",
    model=COST_MODELS["toolllama-7b-a100"],
    draw=Draw(programs=12),
    lengths="oracle",
)
# A token of prompt or output takes 1 ms, a batch 10 ms more.
PLAIN = NamedCostModel(name="plain", pieces=(Piece(tokens_ms=1, const_ms=10),), kv_tokens=1000)


def one_stage(id, at_s, prompt_tokens, **targets):
    stage = Stage(name="s", prompt_tokens=prompt_tokens, output_tokens=11, **targets)
    return Program(id=id, arrival_s=at_s, app="a", stages=(stage,))


def given(*programs, **changes):
    return Experiment(**{"policy": "vllm", "scenario": "given", "model": PLAIN, "programs": programs, **changes})


@pytest.mark.parametrize("policy", [name for name in KNOWN if name != "distserve"])
def test_the_same_experiment_gives_the_same_result(policy):
    experiment = replace(TOOLS, policy=policy)
    first = experiment.result(1.0, 3)
    assert first == experiment.result(1.0, 3)
    assert (first.policy, first.scenario, first.offered, first.seed) == (policy, "toolllm", 12, 3)
    assert first.decisions > 0 and first.decision_us.p50 is None
    assert experiment.result(1.0, 4) != first
    assert replace(experiment, noise=0.1).result(1.0, 3).ttft_ms != first.ttft_ms


def test_a_key_names_everything_a_run_depends_on():
    key = TOOLS.key(1.0, 0)
    assert key == replace(TOOLS).key(1.0, 0)
    others = [
        replace(TOOLS, policy="edf"),
        replace(TOOLS, options={"max_batch_tokens": 4096}),
        replace(TOOLS, model=COST_MODELS["opt-13b-a100-tp2"]),
        replace(TOOLS, model=replace(TOOLS.model, kv_tokens=40_000)),
        replace(TOOLS, draw=Draw(programs=13)),
        replace(TOOLS, draw=Draw(programs=12, prefix_cache=False)),
        replace(TOOLS, replicas=2),
        replace(TOOLS, lengths="estimated"),
        replace(TOOLS, lengths=2.0),
        replace(TOOLS, noise=0.1),
        replace(TOOLS, rejects=True),
    ]
    keys = [key, TOOLS.key(1.1, 0), TOOLS.key(1.0, 1), *(other.key(1.0, 0) for other in others)]
    assert all(a != b for n, a in enumerate(keys) for b in keys[:n])


def test_kept_runs_are_used(tmp_path, monkeypatch):
    cache = RunCache(folder=tmp_path)
    first = TOOLS.result(1.0, 0, cache)
    monkeypatch.setattr(Experiment, "simulate", None)
    assert TOOLS.result(1.0, 0, cache) == first


def test_capacity_lies_under_the_bound_and_runs_are_told():
    told = []
    found = TOOLS.capacity([0], progress=told.append)
    assert [found.rate_req_s] == [max(r.rate_req_s for r in told if r.attainment >= 0.9)]
    assert replace(TOOLS, replicas=2).bound().kv_req_s == pytest.approx(2 * TOOLS.bound().kv_req_s)


def test_given_programs_keep_their_arrivals_or_are_stretched():
    experiment = given(one_stage("a", 1.0, 5), one_stage("b", 4.0, 5))
    assert [p.arrival_s for p in experiment.workload(None, 0)] == [1.0, 4.0]
    assert [p.arrival_s for p in experiment.workload(1.0, 0)] == [0.5, 2.0]
    assert experiment.summary(experiment.simulate(None), None, 0).rate_req_s == 0.5


def test_two_replicas_share_the_programs():
    """Two prompts at once: one replica computes both in one batch, of two each computes its own in half the time."""
    programs = (one_stage("a", 0.0, 100), one_stage("b", 0.0, 100))
    together, apart = (given(*programs, replicas=n).result(1.0, 0) for n in (1, 2))
    assert together.ttft_ms.p50 == pytest.approx(210)
    assert apart.ttft_ms.p50 == pytest.approx(110)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"policy": "fcfs"}, "policy must be one of slos, .*'fcfs'"),
        ({"options": {"budget": 3}}, "options of policy 'vllm'.*budget"),
        ({"policy": "distserve"}, r"replicas must be a multiple of distserve's 1 \+ 1, not 1"),
        ({"replicas": 0}, "replicas must be at least 1, not 0"),
        ({"noise": -0.1}, "noise must be at least 0 and less than 1, not -0.1"),
        ({"lengths": 0.0}, "lengths must be scaled by more than 0, not 0.0"),
    ],
)
def test_wrong_experiments_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        replace(TOOLS, **changes)


def test_distserve_runs_in_groups():
    assert replace(TOOLS, policy="distserve", replicas=2).result(0.5, 0).offered == 12


def test_a_program_is_explained():
    """Alone: 100 prompt tokens take 110 ms, each token after the first 11 ms.

    TTFT target 2 x 110 ms, so by the rule token 1 is due by 231 ms, token 10 at 220 + 9 x 20 x 1.05 = 409 ms, the last
    at 220 + 10 x 21 = 430 ms; they come at 110, 209 and 220 ms.
    """
    experiment = given(one_stage("a", 0.0, 100, ttft_slowdown=2, tpot_ms=20))
    run = experiment.simulate(None, trace=True)
    (stage,) = explain(run, "a")
    assert (stage["stage"], stage["outcome"], stage["attained"]) == ("s", "finished", True)
    due = [(d["token"], pytest.approx(d["at_s"]), pytest.approx(d["latest_s"])) for d in stage["deadlines"]]
    assert due == [(1, 0.110, 0.231), (10, 0.209, 0.409), (11, 0.220, 0.430)]
    text = "\n".join(lines([stage]))
    assert "token 1, 121 ms before its deadline" in text
    assert "finished as best effort, attained (mean-TPOT rule: kept)" in text
    with pytest.raises(ValueError, match=r"\('a', \.\.\.\), not 'b'"):
        explain(run, "b")


def test_why_a_program_was_declined_is_shown():
    """Two prompts of 200 and 110 ms alone, due within 1.1 and 1.5 times that: together they take 300 ms."""
    programs = (one_stage("a", 0.0, 190, ttft_slowdown=1.1, tpot_ms=50), one_stage("b", 0.0, 100, ttft_slowdown=1.5))
    experiment = given(*programs, policy="slos", lengths="oracle")
    first, second = (explain(experiment.simulate(None, trace=True), id)[0] for id in "ab")
    declined = first if second["verdicts"][0]["admitted"] else second
    assert not declined["verdicts"][0]["admitted"]
    assert declined["verdicts"][0]["reason"]
    assert "declined: " in "\n".join(lines([declined]))


def test_late_tokens_are_shown_as_late():
    programs = (one_stage("a", 0.0, 100, ttft_ms=50, tpot_ms=5),)
    (stage,) = explain(given(*programs).simulate(None, trace=True), "a")
    assert not stage["attained"]
    assert "token 11, 58 ms after its deadline" in "\n".join(lines([stage]))


def test_thinking_has_deadlines_of_its_own():
    """Thinking paces tokens 1 to 6, the answer the rest: token 6 is due at 110 + 5 x 21, token 11 5 x 42 later."""
    stage = Stage(name="s", prompt_tokens=100, output_tokens=11, think_tokens=6, think_tpot_ms=20, tpot_ms=40)
    program = Program(id="a", arrival_s=0.0, app="a", stages=(stage,))
    (told,) = explain(given(program).simulate(None, trace=True), "a")
    assert [d["latest_s"] for d in told["deadlines"]] == [
        None,
        pytest.approx(0.110 + 5 * 0.021 + 4 * 0.042),
        pytest.approx(0.110 + 5 * 0.021 + 5 * 0.042),
    ]


def test_ablations_take_one_idea_away():
    programs = tuple(one_stage(f"p{n}", 0.0, 300, ttft_slowdown=1.5, tpot_ms=500) for n in range(3))
    full, admits_all, rejects = (
        given(*programs, policy=policy, rejects=rejects, lengths="oracle")
        for policy, rejects in (("slos", False), ("slos_admits_all", False), ("slos", True))
    )
    results = [experiment.result(1.0, 0) for experiment in (full, admits_all, rejects)]
    assert [r.declined for r in results] == [2, 0, 2]
    assert [r.finished for r in results] == [3, 3, 1]
    fixed = given(*programs, policy="slos_fixed_batch", options={"budget_tokens": 40}, lengths="oracle")
    steps = fixed.simulate(None, trace=True).steps
    assert max(sum(tokens for _, tokens in s.prefill) + len(s.decode) for s in steps) == 40


def test_a_learned_cost_keeps_its_promises_where_steps_vary():
    programs = tuple(one_stage(f"p{n:03}", n / 8, 40, ttft_slowdown=2, tpot_ms=16) for n in range(400))
    told, learned = (
        given(*programs, policy=policy, lengths="oracle", noise=0.3).result(8.0, 0)
        for policy in ("slos", "slos_learns_cost")
    )
    assert told.attainment_admitted < 0.9 and learned.attainment_admitted > 0.97
    with pytest.raises(ValueError, match="one piece"):
        replace(TOOLS, policy="slos_learns_cost", model=COST_MODELS["opt-6.7b-a100"])
