"""Random loads against every policy: `python -m slos_sglang.sim.fuzz --seed N --runs M`.

One seed draws everything: the server, its memory, what the policy believes of it, arrivals, lengths and what is known
of them, targets, tool chains, clients that hang up. `simulate` asserts the invariants at every step and that everything
drains once arrivals stop; here it is checked besides that every program is accounted for and that the same case gives
the same run. A failure prints its seed.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from slos_sglang.policy.batch_time import CostModel, OnlineCostModel, Piece
from slos_sglang.sim.baselines import POLICIES
from slos_sglang.sim.run import Abort, Lengths, Run, simulate
from slos_sglang.slo import WireSLO
from slos_sglang.workloads.program import Program, Stage


@dataclass(frozen=True, kw_only=True)
class Case:
    """One draw. `belief` scales the policy's cost model against the true one; None: a model that corrects itself.
    `drafts` is what a baseline drafts, on a server with a draft model.
    """

    seed: int
    policy: str
    replicas: int
    pieces: tuple[Piece, ...]
    belief: float | None
    memory_tokens: int
    block_tokens: int
    noise: float
    acceptance: float
    drafts: int
    lengths: Lengths
    programs: tuple[Program, ...]
    aborts: tuple[Abort, ...]

    def run(self) -> Run:
        """Simulate it; raises `AssertionError` where an invariant does not hold."""
        belief = self.belief

        def believed() -> CostModel:
            if belief is None:
                return OnlineCostModel()
            return CostModel(*(_scaled(piece, belief) for piece in self.pieces), acceptance=self.acceptance)

        drafts = self.policy != "slos" and believed().acceptance
        options = {"drafts": self.drafts} if drafts else {}
        return simulate(
            self.programs,
            [POLICIES[self.policy](cost=believed(), **options) for _ in range(self.replicas)],
            CostModel(*self.pieces, acceptance=self.acceptance),
            memory_tokens=self.memory_tokens,
            block_tokens=self.block_tokens,
            lengths=self.lengths,
            noise=self.noise,
            seed=self.seed,
            aborts=self.aborts,
            wire=_wire,
        )


def draw(seed: int, policies: Sequence[str] = tuple(POLICIES)) -> Case:
    """The case of `seed`."""
    rng = random.Random(f"{seed}/case")
    policy = rng.choice(policies)
    programs = _programs(random.Random(f"{seed}/load"), rng.randint(1, 60))
    block_tokens = rng.choice((1, 16))
    drafting = random.Random(f"{seed}/drafts")
    largest = max(s.prompt_tokens + s.output_tokens for program in programs for s in program.stages)
    return Case(
        seed=seed,
        policy=policy,
        replicas=rng.choice((2, 3)) if policy == "distserve" else rng.choice((1, 1, 1, 2, 3)),
        pieces=_pieces(rng, drafting),
        belief=rng.choice((1.0, 1.0, 0.8, 1.25, None)),
        memory_tokens=int((largest + block_tokens) * rng.choice((1.0, 1.3, 3, 30))),
        block_tokens=block_tokens,
        noise=rng.choice((0.0, 0.1, 0.5)),
        acceptance=drafting.choice((0.0, 0.0, 0.7, drafting.uniform(0.05, 0.95))),
        drafts=drafting.choice((0, 1, 4)),
        lengths=rng.choice(("oracle", "estimated", 0.5, 2.0)),
        programs=programs,
        aborts=_aborts(random.Random(f"{seed}/aborts"), programs),
    )


def check(case: Case) -> None:
    """Run `case` twice. Raises `AssertionError` where something does not hold."""
    run = case.run()
    gone = {abort.program for abort in case.aborts}
    for program, record in zip(case.programs, run.programs, strict=True):
        assert record.id == program.id
        assert record.finished or record.id in gone or any(stage.outcome == "declined" for stage in record.stages), (
            f"program {program.id} neither finished nor was told why"
        )
        for stage, seen in zip(program.stages, record.stages, strict=False):
            assert seen.outcome != "finished" or len(seen.token_s) == stage.output_tokens
            assert list(seen.token_s) == sorted(seen.token_s)
            assert not seen.token_s or seen.token_s[0] > seen.arrival_s
    again = case.run()
    assert again.programs == run.programs and again.steps_run == run.steps_run, "the same case gave another run"


def _scaled(piece: Piece, factor: float) -> Piece:
    return replace(
        piece,
        tokens_ms=piece.tokens_ms * factor,
        requests_ms=piece.requests_ms * factor,
        context_ms=piece.context_ms * factor,
        spec_steps_ms=piece.spec_steps_ms * factor,
        const_ms=piece.const_ms * factor,
    )


def _pieces(rng: random.Random, drafting: random.Random) -> tuple[Piece, ...]:
    piece = Piece(
        tokens_ms=rng.uniform(0.02, 0.1),
        requests_ms=rng.choice((0.0, 0.3)),
        context_ms=rng.choice((0.0, 1e-3)),
        spec_steps_ms=drafting.uniform(0.1, 5),
        const_ms=rng.uniform(5, 35),
    )
    return (piece, Piece(const_ms=rng.uniform(5, 50))) if rng.random() < 0.3 else (piece,)


def _programs(rng: random.Random, count: int) -> tuple[Program, ...]:
    rate_req_s = 10 ** rng.uniform(-0.5, 1.5)
    now_s, programs = 0.0, []
    for number in range(count):
        # Bursts: some arrive at once with the one before.
        now_s += rng.expovariate(rate_req_s) if rng.random() < 0.7 else 0.0
        programs.append(Program(id=f"p{number}", arrival_s=now_s, app="fuzz", stages=_stages(rng)))
    return tuple(programs)


def _stages(rng: random.Random) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    context = 0
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        prompt = context + rng.randint(1, rng.choice((20, 200, 900)))
        output = rng.randint(1, rng.choice((4, 60, 300)))
        thinking = rng.random() < 0.2
        name, target = rng.choice(tuple(_TARGETS.items()))
        stages.append(
            Stage(
                name=name,
                prompt_tokens=prompt,
                cached_tokens=context,
                output_tokens=output,
                think_tokens=rng.randint(0, output) if thinking else 0,
                think_tpot_ms=50.0 if thinking and target is not _NONE else None,
                after_s=rng.choice((0.0, 0.3, 5.0)),
                **target,
            )
        )
        context = prompt + output
    return tuple(stages)


_NONE: dict[str, float] = {}
_TARGETS: dict[str, dict[str, float]] = {
    "none": _NONE,
    "tight": {"ttft_ms": 150.0, "tpot_ms": 30.0},
    "chat": {"ttft_slowdown": 5.0, "tpot_ms": 100.0},
    "code": {"ttft_slowdown": 5.0, "tpot_ms": 50.0},
    "reject": {"ttft_slowdown": 3.0, "tpot_ms": 100.0},
    "budget": {"tpot_ms": 200.0},
}


def _wire(program: Program, stage: Stage) -> WireSLO | None:
    slo = stage.wire(program.id)
    if stage.name == "reject":
        slo = replace(slo, on_decline="reject")
    if stage.name == "budget":
        slo = replace(slo, budget_ms=4000.0)
    return slo if slo.constrained else None


def _aborts(rng: random.Random, programs: Sequence[Program]) -> tuple[Abort, ...]:
    share = rng.choice((0.0, 0.0, 0.2))
    return tuple(
        Abort(program=program.id, at_s=program.arrival_s + rng.choice((0.0, rng.expovariate(1.0))))
        for program in programs
        if rng.random() < share
    )


def main(arguments: Sequence[str] | None = None, tell: Callable[[str], None] = print) -> None:
    """Check the cases of `--runs` seeds from `--seed` on; a failure names its seed and leaves with a traceback."""
    parser = argparse.ArgumentParser(prog="python -m slos_sglang.sim.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--policy", choices=tuple(POLICIES), action="append")
    given = parser.parse_args(arguments)
    for seed in range(given.seed, given.seed + given.runs):
        case = draw(seed, given.policy or tuple(POLICIES))
        held = False
        try:
            check(case)
            held = True
        finally:
            if not held:
                tell(f"seed {seed} ({case.policy}, {len(case.programs)} programs) failed: --seed {seed} --runs 1")
    tell(f"{given.runs} cases held")


if __name__ == "__main__":
    main(sys.argv[1:])
