"""Random loads on which promises are put to the test: was any admitted request late?

One seed draws the server (several shapes of cost model, its memory), the load on it (from a third of what it could
carry at most to five times that, bursts, all presets mixed, tool chains, thinking, budgets, best effort) and the
programs. With an exact cost model and known lengths the answer must be no, whatever the seed: that is the guarantee.
With errors it is a share, and `kept_share` is the curve's ordinate.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from slos_sglang.measure.attainment import kept_mean_rule, kept_token_rule
from slos_sglang.measure.bound import capacity_bound
from slos_sglang.policy.batch_time import Piece
from slos_sglang.policy.cost_models import COST_MODELS, NamedCostModel
from slos_sglang.sim.replica import Call, Policy
from slos_sglang.sim.run import Lengths, Run, simulate
from slos_sglang.slo import SLO, WireSLO, presets
from slos_sglang.workloads.program import Program, Stage

# A third of the server to five times all of it.
LOADS = (0.3, 5.0)
_BUDGET = "budget"


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one seed draws; `times_capacity` is the offered rate over the upper bound on what the server can carry."""

    seed: int
    model: NamedCostModel
    block_tokens: int
    times_capacity: float
    programs: tuple[Program, ...]

    def run(self, policy: Policy, *, lengths: Lengths = "oracle", noise: float = 0.0, max_tokens: int = 1 << 30) -> Run:
        """Serve it by `policy` on one replica that costs what the model says, times a factor of sigma `noise`."""
        return simulate(
            self.programs,
            [policy],
            self.model.cost(),
            memory_tokens=self.model.kv_tokens,
            block_tokens=self.block_tokens,
            lengths=lengths,
            noise=noise,
            seed=self.seed,
            max_tokens=max_tokens,
            wire=_wire,
        )


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Admitted calls, and how many of them kept their targets: by the policy's own account and the token rule
    (`kept`), and by the mean rule besides (`kept_mean`). `judged` asked for a target at all.
    """

    judged: int
    admitted: int
    kept: int
    kept_mean: int


def draw_load(seed: int, *, programs: int = 60) -> Load:
    """The load of `seed`, of at most `programs` programs."""
    rng = random.Random(f"{seed}/promises")
    model = _model(rng)
    block_tokens = rng.choice((1, 16))
    longest = rng.choice((30, 120, 300)) if rng.random() < 0.98 else 6000
    made = [_program(rng, number, longest) for number in range(int(2 * (programs / 2) ** rng.random()))]
    largest = max(s.prompt_tokens + s.output_tokens for program in made for s in program.stages)
    # From memory that nobody ever fills down to what holds one request or two.
    kv_tokens = min(model.kv_tokens, int((largest + block_tokens) * rng.choice((1.0, 1.5, 3.0, 10.0, 100.0))))
    model = replace(model, kv_tokens=max(kv_tokens, largest + block_tokens))
    low, high = LOADS
    times_capacity = low * (high / low) ** rng.random()
    bound = capacity_bound(made, model, target=1.0)
    rate_req_s = times_capacity * min(bound.kv_req_s, max(bound.tier_req_s, 0.3 * bound.fluid_req_s))
    burst = rng.choice((0.0, 0.3, 0.8))
    now_s, arrived = 0.0, []
    for program in made:
        # In a burst several arrive at once, or within a step of each other.
        if rng.random() < burst:
            now_s += rng.choice((0.0, 0.005))
        else:
            now_s += rng.expovariate(rate_req_s * (1.0 - burst))
        arrived.append(replace(program, arrival_s=now_s))
    return Load(
        seed=seed,
        model=model,
        block_tokens=block_tokens,
        times_capacity=times_capacity,
        programs=tuple(arrived),
    )


def kept(run: Run) -> Kept:
    """How the promises of `run` were kept."""
    promised = [call for call in run.calls if call.admitted]
    return Kept(
        judged=sum(call.request.constrained for call in run.calls),
        admitted=len(promised),
        kept=len(promised) - len(broken(run)),
        kept_mean=sum(_by_rule(call, run, mean=True) for call in promised),
    )


def broken(run: Run) -> list[Call]:
    """The admitted calls that missed a target, by their own account or by the measure's token rule."""
    return [
        call
        for call in run.calls
        if call.admitted and not (call.request.kept and call.outcome == "finished" and _by_rule(call, run, mean=False))
    ]


def _by_rule(call: Call, run: Run, *, mean: bool) -> bool:
    record = next(p for p in run.programs if p.id == call.program.id).stages[call.number]
    rule = kept_mean_rule if mean else kept_token_rule
    return rule(record.targets, record.arrival_s, record.token_s, record.think_tokens)


def _model(rng: random.Random) -> NamedCostModel:
    if rng.random() < 0.5:
        return rng.choice(tuple(COST_MODELS.values()))
    piece = Piece(
        tokens_ms=rng.uniform(0.02, 0.1),
        requests_ms=rng.choice((0.0, 0.3)),
        context_ms=rng.choice((0.0, 1e-4, 1e-3)),
        const_ms=rng.uniform(2, 35),
    )
    roof = (Piece(tokens_ms=piece.tokens_ms / 4, const_ms=piece.const_ms * rng.uniform(1, 1.8)),)
    return NamedCostModel(name="drawn", pieces=(piece, *roof[: rng.randint(0, 1)]), kv_tokens=60_000)


def _program(rng: random.Random, number: int, longest: int) -> Program:
    kind = rng.choice(("summarizer", "coder", "chatbot", "tools", "reasoning", "absolute", _BUDGET, "best effort"))
    stages = tuple(_chain(rng, longest)) if kind == "tools" else (_single(rng, kind, longest),)
    return Program(id=f"p{number}", arrival_s=0.0, app=kind, stages=stages)


def _single(rng: random.Random, kind: str, longest: int) -> Stage:
    slo = {
        "summarizer": presets.SUMMARIZATION,
        "coder": presets.CODING,
        "chatbot": presets.CHATBOT,
        "reasoning": presets.REASONING,
        "absolute": rng.choice(_ABSOLUTE),
        _BUDGET: rng.choice((SLO(tpot_ms=100), SLO(ttft_ms=800))),
        "best effort": SLO(),
    }[kind]
    output = rng.randint(1, longest)
    return _stage(
        kind,
        slo,
        prompt_tokens=_prompt(rng),
        output_tokens=output,
        think_tokens=rng.randint(0, output) if kind == "reasoning" else 0,
    )


_ABSOLUTE = (
    SLO(ttft_ms=200, tpot_ms=40),
    SLO(ttft_ms=1000, tpot_ms=75),
    SLO(ttft_ms=2000),
    SLO(tpot_ms=60),
    SLO(ttft_slowdown=1.5, tpot_ms=200, value=3.0),
)


def _chain(rng: random.Random, longest: int) -> list[Stage]:
    context, stages = 0, []
    turns = rng.randint(1, 4)
    for turn in range(turns):
        prompt, output = context + rng.randint(16, 400), rng.randint(1, longest)
        slo = presets.TOOL_FINAL if turn == turns - 1 else presets.TOOL_LOOP
        gap_s = rng.choice((0.0, 0.1, 2.0))
        stages.append(
            replace(
                _stage("turn", slo, prompt_tokens=prompt, output_tokens=output), cached_tokens=context, after_s=gap_s
            )
        )
        context = prompt + output
    return stages


def _prompt(rng: random.Random) -> int:
    return min(max(int(rng.lognormvariate(5.5, 1.2)), 1), 4000)


def _stage(name: str, slo: SLO, *, prompt_tokens: int, output_tokens: int, think_tokens: int = 0) -> Stage:
    return Stage(
        name=name,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        think_tokens=think_tokens,
        ttft_ms=slo.ttft_ms,
        ttft_slowdown=slo.ttft_slowdown,
        tpot_ms=slo.tpot_ms,
        think_tpot_ms=slo.think_tpot_ms,
        value=slo.value,
    )


def _wire(program: Program, stage: Stage) -> WireSLO | None:
    slo = stage.wire(program.id)
    if stage.name == _BUDGET:
        # A tenth of a second a token of the answer, and two seconds for the rest.
        slo = replace(slo, budget_ms=2000.0 + 100.0 * stage.output_tokens)
    return slo if slo.constrained else None
