"""The guarantee: with an exact cost model and known lengths no admitted request misses a target, whatever the load.

`benchmarks/guarantee.py` asks the same of thousands of seeds.
"""

from dataclasses import replace

import numpy as np
import pytest

from slos_sglang.policy import plan
from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.batches import UNBOUNDED, Limits
from slos_sglang.policy.request import Request, table_of
from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.policy.state import rows_of, world_of
from slos_sglang.sim.promises import broken, draw_load, kept
from slos_sglang.sim.run import simulate
from slos_sglang.slo import WireSLO
from slos_sglang.workloads.program import Program, Stage

PROGRAMS = 30


@pytest.mark.parametrize("start", range(0, 40, 8))
def test_every_promise_is_kept(start: int) -> None:
    for seed in range(start, start + 8):
        load = draw_load(seed, programs=PROGRAMS)
        run = load.run(Scheduler(cost=load.model.cost()))
        late = [call.request.rid for call in broken(run)]
        assert not late, f"seed {seed} broke promises: {late}"


@pytest.mark.parametrize("seed", [754])
def test_promises_that_were_once_broken_are_kept(seed: int) -> None:
    """A cached prefix that was evicted before its prompt started."""
    load = draw_load(seed)
    assert not broken(load.run(Scheduler(cost=load.model.cost())))


def test_the_loads_are_a_test() -> None:
    """They are more than can be promised, some from the start, and whoever promises them all breaks his word."""
    judged = admitted = 0
    for seed in range(16):
        load = draw_load(seed, programs=PROGRAMS)
        seen = kept(load.run(Scheduler(cost=load.model.cost())))
        judged, admitted = judged + seen.judged, admitted + seen.admitted
    assert 0.5 * judged < admitted < 0.95 * judged


def test_a_belief_in_a_faster_server_is_noticed() -> None:
    """A cost model that is too good by a quarter makes promises that are broken, and `broken` says so."""
    misses = 0
    for seed in range(16):
        load = draw_load(seed, programs=PROGRAMS)
        belief = [
            replace(p, tokens_ms=p.tokens_ms * 0.8, context_ms=p.context_ms * 0.8, const_ms=p.const_ms * 0.8)
            for p in load.model.pieces
        ]
        misses += len(broken(load.run(Scheduler(cost=CostModel(*belief)))))
    assert misses


def test_a_cached_prefix_takes_memory_when_its_prompt_starts() -> None:
    """1,000 tokens of KV. `a` leaves 500 of them cached, `b`, best effort, grows into those: when `a` goes on from the
    rest, cached and held together fill the memory, and its new tokens need `b`'s. KV must not exceed the capacity (the
    simulator asserts it), and everybody ends.
    """
    turns = (
        Stage(name="t", prompt_tokens=490, output_tokens=10, tpot_ms=100.0, ttft_ms=1000.0, after_s=0.6),
        Stage(name="t", prompt_tokens=510, cached_tokens=500, output_tokens=5, tpot_ms=100.0, ttft_ms=1000.0),
    )
    programs = [
        Program(id="a", arrival_s=0.0, app="a", stages=turns),
        Program(id="b", arrival_s=0.3, app="b", stages=(Stage(name="b", prompt_tokens=490, output_tokens=200),)),
    ]
    cost = CostModel(Piece(tokens_ms=0.1, const_ms=10))
    run = simulate(programs, [Scheduler(cost=cost)], cost, memory_tokens=1000, block_tokens=1)
    assert [call.outcome for call in run.calls] == ["finished"] * 3 and not broken(run)


def test_a_step_that_costs_more_than_the_cap_still_runs() -> None:
    """Every step takes 70 ms, batches are to take 60: neither a promised prompt without a TTFT nor best effort waits
    for ever, and what the pace allows is promised.
    """
    program = Program(
        id="a",
        arrival_s=0.0,
        app="a",
        stages=(Stage(name="a", prompt_tokens=600, output_tokens=20, tpot_ms=100.0),),
    )
    cost = CostModel(Piece(tokens_ms=0.1, const_ms=70))
    run = simulate([program], [Scheduler(cost=cost)], cost, memory_tokens=1000)
    assert run.calls[0].admitted and not broken(run)


def test_whoever_is_late_anyway_is_not_followed_to_its_end() -> None:
    """One decoder of 4,000 tokens can not keep its pace, the other can: after the first late token that is clear."""
    cost = CostModel(Piece(const_ms=10))
    requests = []
    for seq, tpot_ms in enumerate((5.0, 50.0)):
        request = Request(rid=str(seq), seq=seq, arrival_s=0.0, slo=WireSLO(tpot_ms=tpot_ms), left_tokens=4000)
        request.set_targets(cost)
        request.token(0.0)
        requests.append(request)
    late = np.zeros(2, dtype=np.bool_)
    world = world_of(cost, Limits(), UNBOUNDED)
    code, _, when_s = plan.foresee(0.0, rows_of(table_of(requests)), world, np.ones_like(late), late)
    assert code == plan.KEPT and when_s < 0.1 and late.tolist() == [True, False]
