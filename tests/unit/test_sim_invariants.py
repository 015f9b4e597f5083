"""What the simulator does not let pass: policies that break a rule each, and the fuzzer that looks for more."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from slos_sglang.policy.admission import Verdict
from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.batches import Batch, Memory
from slos_sglang.policy.request import Request
from slos_sglang.sim import Abort, simulate
from slos_sglang.sim.baselines import POLICIES
from slos_sglang.sim.baselines.sarathi import Sarathi
from slos_sglang.sim.baselines.vllm import VLLM
from slos_sglang.sim.fuzz import check, draw, main
from slos_sglang.sim.run import Lengths
from slos_sglang.slo import WireSLO
from slos_sglang.workloads.program import Program, Stage

COST = CostModel(Piece(tokens_ms=1.0, const_ms=10.0))
BASELINES = [name for name in POLICIES if name != "slos"]
Rewrite = Callable[[Batch, Sequence[Request], Sequence[Request]], Batch]


def program(name: str, *, at_s: float = 0.0, prompt_tokens: int = 20, output_tokens: int = 5) -> Program:
    stage = Stage(name="call", prompt_tokens=prompt_tokens, output_tokens=output_tokens, ttft_ms=100, tpot_ms=50)
    return Program(id=name, arrival_s=at_s, app="test", stages=(stage,))


class Broken(Sarathi):
    """Does as Sarathi does, until its batch is rewritten."""

    def __init__(self, rewrite: Rewrite) -> None:
        super().__init__(cost=COST)
        self.rewrite = rewrite

    def next_batch(
        self, now_s: float, decoding: Sequence[Request], waiting: Sequence[Request], memory: Memory
    ) -> Batch:
        return self.rewrite(super().next_batch(now_s, decoding, waiting, memory), decoding, waiting)


def twice(batch: Batch, decoding: Sequence[Request], waiting: Sequence[Request]) -> Batch:
    for request in decoding[:1]:
        batch.add(request, 1)
    return batch


def too_much_prompt(batch: Batch, decoding: Sequence[Request], waiting: Sequence[Request]) -> Batch:
    batch = Batch()
    for request in waiting[:1]:
        batch.add(request, request.uncached_tokens + 1)
    return batch


def decodes_a_prompt(batch: Batch, decoding: Sequence[Request], waiting: Sequence[Request]) -> Batch:
    return Batch(decode=[*decoding, *waiting])


def wrong_size(batch: Batch, decoding: Sequence[Request], waiting: Sequence[Request]) -> Batch:
    batch.size.tokens += 1
    return batch


def demotes(batch: Batch, decoding: Sequence[Request], waiting: Sequence[Request]) -> Batch:
    for request in decoding[1:]:
        request.standard = False
    return batch


def preempts_a_newcomer(batch: Batch, decoding: Sequence[Request], waiting: Sequence[Request]) -> Batch:
    return Batch(preempt=list(waiting))


def idles(batch: Batch, decoding: Sequence[Request], waiting: Sequence[Request]) -> Batch:
    return Batch()


def thrashes(batch: Batch, decoding: Sequence[Request], waiting: Sequence[Request]) -> Batch:
    if begun := [r for r in waiting if r.started]:
        return Batch(preempt=begun)
    batch = Batch()
    batch.add(waiting[0], 1)
    return batch


class Promising(Broken):
    """Admits everybody."""

    def admit(
        self,
        now_s: float,
        undecided: Sequence[Request],
        decoding: Sequence[Request],
        waiting: Sequence[Request],
        memory: Memory,
    ) -> list[tuple[Request, Verdict]]:
        for request in undecided:
            request.admit()
        return [(request, Verdict(admitted=True)) for request in undecided]


@pytest.mark.parametrize(
    ("rewrite", "complaint"),
    [
        (twice, "is in the batch twice"),
        (too_much_prompt, "has no 21 tokens of its prompt left"),
        (decodes_a_prompt, "does not decode here"),
        (wrong_size, "the batch is"),
        (demotes, "was admitted, then demoted"),
        (preempts_a_newcomer, "has nothing to lose"),
        (idles, "never ended: it is waiting"),
        (thrashes, "nobody gets anywhere"),
    ],
)
def test_a_policy_that_breaks_a_rule_is_caught(rewrite: Rewrite, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        simulate([program("A"), program("B")], [Promising(rewrite)], COST, memory_tokens=100)


def test_memory_over_capacity_is_caught() -> None:
    class Greedy(VLLM):
        def next_batch(
            self, now_s: float, decoding: Sequence[Request], waiting: Sequence[Request], memory: Memory
        ) -> Batch:
            plenty = Memory(capacity_tokens=1 << 20, free_tokens=1 << 20)
            return super().next_batch(now_s, decoding, waiting, plenty)

    with pytest.raises(AssertionError, match="KV over capacity"):
        simulate([program("A"), program("B")], [Greedy(cost=COST)], COST, memory_tokens=32)


def test_a_stage_that_can_never_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"program 'A', stage 'call' must fit into 16 KV tokens, not be 25"):
        simulate([program("A")], [VLLM(cost=COST)], COST, memory_tokens=24)


def test_a_rejected_call_ends_its_program() -> None:
    class Refusing(Promising):
        def admit(
            self,
            now_s: float,
            undecided: Sequence[Request],
            decoding: Sequence[Request],
            waiting: Sequence[Request],
            memory: Memory,
        ) -> list[tuple[Request, Verdict]]:
            for request in undecided:
                request.decline()
            return [(request, Verdict(admitted=False, reason="no")) for request in undecided]

    def wire(offered: Program, stage: Stage) -> WireSLO:
        return replace(stage.wire(offered.id), on_decline="reject")

    one = program("A")
    two = replace(one, stages=one.stages * 2)
    seen = simulate([two], [Refusing(lambda batch, *_: batch)], COST, memory_tokens=100, wire=wire)
    assert [c.outcome for c in seen.calls] == ["declined"]
    assert not seen.programs[0].completed
    assert seen.calls[0].verdicts[0][1].reason == "no"


def test_timing_and_tracing_change_nothing() -> None:
    load = [program(str(i), at_s=i / 30, prompt_tokens=10 + i, output_tokens=5 + i % 7) for i in range(40)]

    def seen(**asked: bool) -> object:
        return simulate(load, [VLLM(cost=COST)], COST, memory_tokens=200, noise=0.2, seed=3, **asked).programs

    assert seen() == seen(timed=True) == seen(trace=True)
    timed = simulate(load, [VLLM(cost=COST)], COST, memory_tokens=200, timed=True)
    assert len(timed.decision_s) >= timed.steps_run


def test_lengths_are_known_to_the_simulator_only_unless_it_is_told_to_tell() -> None:
    def left(output_tokens: int, lengths: Lengths) -> list[int]:
        seen = []

        def look(batch: Batch, decoding: Sequence[Request], waiting: Sequence[Request]) -> Batch:
            seen.extend(r.left_tokens for r in (*decoding, *waiting))
            return batch

        simulate(
            [program("A", output_tokens=output_tokens)],
            [Broken(look)],
            COST,
            memory_tokens=100,
            lengths=lengths,
            max_tokens=64,
        )
        return seen

    assert left(3, "oracle") == [3, 2, 1]
    assert left(4, 0.5) == [2, 1, 1, 1]
    assert left(3, "estimated") == left(30, "estimated")[:3] == [64, 63, 62]


def test_estimates_learn_from_the_calls_that_ended() -> None:
    load = [program(str(i), at_s=i * 1.0, output_tokens=12) for i in range(20)]
    told: list[int] = []

    def look(batch: Batch, decoding: Sequence[Request], waiting: Sequence[Request]) -> Batch:
        told.extend(r.left_tokens for r in waiting)
        return batch

    simulate(load, [Broken(look)], COST, memory_tokens=100, lengths="estimated", max_tokens=64)
    assert told[0] == 64 and told[-1] == 12


def test_noise_is_a_factor_on_what_a_step_costs() -> None:
    load = [program(str(i), at_s=i / 30) for i in range(40)]
    seen = simulate(load, [VLLM(cost=COST)], COST, memory_tokens=400, noise=0.1, trace=True)
    factors = [
        (step.end_s - step.start_s) * 1e3 / (10 + len(step.decode) + sum(tokens for _, tokens in step.prefill))
        for step in seen.steps
    ]
    assert 0.6 < min(factors) < 0.9 and 1.1 < max(factors) < 1.6


def test_noise_has_a_stream_of_its_own_for_each_replica() -> None:
    load = [program(str(i), at_s=i / 30) for i in range(20)]

    def times(load: list[Program], replicas: int) -> list[tuple[float, ...]]:
        policies = [VLLM(cost=COST) for _ in range(replicas)]
        run = simulate(load, policies, COST, memory_tokens=200, noise=0.3, seed=1)
        return [record.stages[0].token_s for record in run.programs]

    # What the second replica does changes nothing on the first.
    assert times(load, 2)[::2] == times(load[:-1], 2)[::2]


@pytest.mark.parametrize("policy", BASELINES)
def test_baselines_survive_random_loads(policy: str) -> None:
    for seed in range(5):
        check(draw(seed, (policy,)))


def test_draws_cover_what_can_happen() -> None:
    cases = [draw(seed) for seed in range(200)]
    assert {case.policy for case in cases} == set(POLICIES)
    assert any(case.aborts for case in cases)
    assert any(len(p.stages) > 1 for case in cases for p in case.programs)
    seen = [draw(seed, ("vllm",)).run() for seed in range(12)]
    assert any(run.preemptions for run in seen)
    assert any(run.evicted_tokens for run in seen)


def test_a_failure_names_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    main(["--seed", "2", "--runs", "2", "--policy", "vllm"], told.append)
    assert told == ["2 cases held"]
    monkeypatch.setitem(POLICIES, "vllm", lambda cost, **options: Broken(idles))
    with pytest.raises(AssertionError):
        main(["--seed", "4", "--runs", "3", "--policy", "vllm"], told.append)
    assert told[-1].startswith("seed 4 (vllm") and told[-1].endswith("--seed 4 --runs 1")


def test_an_abort_of_an_unknown_program_is_refused() -> None:
    with pytest.raises(ValueError, match="program 'B' of an abort"):
        simulate([program("A")], [VLLM(cost=COST)], COST, memory_tokens=100, aborts=[Abort(program="B", at_s=1.0)])
