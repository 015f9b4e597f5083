"""The most that any scheduler could do: upper bounds on capacity and on attainment, to hold what was measured against.

A server has 1000 ms a second. Whatever the schedule, an attained program costs at least the time of its own tokens, and
every step costs its constant. At a target below 1 the programs given up may be the dearest ones. From this follow

    fluid    batches of unlimited size: nothing but the programs' own tokens
    kv       as well, every step holds the KV of the rows it advances, so that much output needs that many steps
    tier     as `fluid`, with one step each tightest TPOT: what holding that pace without break leaves of the server

`fluid` and `kv` are bounds for a load without end (a short run may exceed them by what it serves after the last
arrival); `tier` can be beaten where nobody of the tightest tier decodes for a while. Beside them stands what is no
bound, but shows how much of the distance to one is chance:

    loss    as `kv`, with arrivals at random and whoever finds room taken, long or short: a share of them finds none
            though the memory is seldom full (Erlang's loss formula, with as many places as requests of mean size fit)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from slos_sglang.policy.batch_time import MAX_DRAFTS, Piece, tokens_a_step
from slos_sglang.policy.cost_models import NamedCostModel
from slos_sglang.workloads.program import Program, Stage

# What each program costs, ms of the server, by the bounds `fluid`, `kv` and `tier`.
_Costs = tuple[list[float], list[float], list[float]]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Upper bounds on the programs a second that one server can be offered while it attains the target share, and
    `loss_req_s`: what it can be offered if it takes whoever finds room in KV memory.
    """

    fluid_req_s: float
    kv_req_s: float
    tier_req_s: float
    loss_req_s: float


def capacity_bound(
    programs: Sequence[Program], model: NamedCostModel, *, target: float = 0.9, acceptance: float = 0.0
) -> Bound:
    """The bounds for programs like these, with as many tokens drafted a step as are best for each.

    acceptance  probability that a token of the model's draft model is accepted; 0: nothing is drafted

    Raises `ValueError` unless 0 < `target` <= 1 and there is a program.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target must be greater than 0 and at most 1, not {target!r}")
    ways = _ways(programs, model, acceptance)
    fluid, kv, tier = _most(ways, partial(_rate_req_s, target=target))
    _, full, _ = _most(ways, partial(_rate_req_s, target=1.0))
    places = _places([_totals(stage) for program in programs for stage in program.stages], model.kv_tokens)
    loss = full * _load(places, 1.0 - target) / places
    return Bound(fluid_req_s=fluid, kv_req_s=kv, tier_req_s=tier, loss_req_s=loss)


def attainment_bound(
    programs: Sequence[Program], model: NamedCostModel, *, rate_req_s: float, acceptance: float = 0.0
) -> float:
    """The largest share of programs like these that one server could attain at this rate: as many of the cheapest ones
    as fill it, by the bounds `kv` and `tier`.

    Raises `ValueError` unless `rate_req_s` > 0 and there is a program.
    """
    if not rate_req_s > 0:
        raise ValueError(f"rate_req_s must be greater than 0, not {rate_req_s!r}")
    return min(_most(_ways(programs, model, acceptance), partial(_share, rate_req_s=rate_req_s)))


def _ways(programs: Sequence[Program], model: NamedCostModel, acceptance: float) -> list[list[_Costs]]:
    """What the programs cost, for each piece of the cost model with each number of drafted tokens."""
    if not programs:
        raise ValueError("programs must hold at least one program, not 0")
    rows = [[_totals(stage) for stage in program.stages] for program in programs]
    tight_ms = min((pace for program in programs for stage in program.stages for pace in _paces(stage)), default=None)
    numbers = range(MAX_DRAFTS + 1 if acceptance else 1)
    return [
        [_costs_ms(rows, piece, drafts, acceptance, model.kv_tokens, tight_ms) for drafts in numbers]
        for piece in model.pieces
    ]


def _most(ways: Sequence[Sequence[_Costs]], measure: Callable[[Sequence[float]], float]) -> tuple[float, float, float]:
    """`measure` of the costs by each bound: the best of the numbers drafted, on the piece that allows least."""
    by_piece = [[max(map(measure, each)) for each in zip(*drafted, strict=True)] for drafted in ways]
    fluid, kv, tier = (min(found) for found in zip(*by_piece, strict=True))
    return fluid, kv, tier


def _costs_ms(
    rows: Sequence[Sequence[_Totals]],
    piece: Piece,
    drafts: int,
    acceptance: float,
    kv_tokens: int,
    tight_ms: float | None,
) -> _Costs:
    """What each program costs if every step drafts so many tokens for each decoder."""
    tokens = tokens_a_step(drafts, acceptance)
    step_ms = piece.const_ms + drafts * piece.spec_steps_ms
    work_ms = [sum(_work_ms(stage, piece, (1 + drafts) / tokens, tokens) for stage in stages) for stages in rows]
    held_ms = [step_ms / tokens * sum(stage.held_tokens for stage in stages) / kv_tokens for stages in rows]
    left = 1.0 if tight_ms is None else 1.0 - step_ms / (tight_ms * tokens)
    paced_ms = [w / left if left > 0 else math.inf for w in work_ms]
    return work_ms, [w + h for w, h in zip(work_ms, held_ms, strict=True)], paced_ms


def erlang_loss(places: int, load: float) -> float:
    """Share of random arrivals that find all `places` taken, where `load` of them would be taken if there were more
    (Erlang's loss formula; it holds whatever the times are distributed like).
    """
    loss = 1.0
    for taken in range(1, places + 1):
        loss = load * loss / (taken + load * loss)
    return loss


@dataclass(frozen=True, kw_only=True)
class _Totals:
    """What one stage adds to all its batches together.

    held_tokens  over its decode steps, the KV it holds in each
    """

    prompt_tokens: int
    decodes: int
    context_tokens: int
    held_tokens: int


def _totals(stage: Stage) -> _Totals:
    decodes = stage.output_tokens - 1
    held = decodes * stage.prompt_tokens + decodes * (decodes + 1) // 2
    return _Totals(
        prompt_tokens=stage.prompt_tokens - stage.cached_tokens,
        decodes=decodes,
        context_tokens=stage.prompt_tokens + held,
        held_tokens=held,
    )


def _work_ms(total: _Totals, piece: Piece, verified: float, gained: float) -> float:
    """What it costs if `verified` tokens are computed for each decoded one, and a step brings `gained` of them."""
    tokens_ms = piece.tokens_ms * (total.prompt_tokens + verified * total.decodes)
    requests_ms = piece.requests_ms * (1 + total.decodes / gained)
    return tokens_ms + requests_ms + piece.context_ms * (total.context_tokens + total.held_tokens * (1 / gained - 1))


def _places(totals: Sequence[_Totals], kv_tokens: int) -> int:
    """How many requests are in KV memory when it is full, in the mean over their steps."""
    held, steps = sum(total.held_tokens for total in totals), sum(total.decodes for total in totals)
    return max(kv_tokens * steps // held, 1) if held else kv_tokens


def _load(places: int, share: float) -> float:
    """The load of which `share` finds no place."""
    low, high = 0.0, places / (1.0 - share)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if erlang_loss(places, middle) <= share else (low, middle)
    return low


def _rate_req_s(cost_ms: Sequence[float], target: float) -> float:
    """Programs a second where the cheapest `target` share of them fills the server."""
    kept = math.ceil(target * len(cost_ms) - 1e-9)
    total_ms = sum(sorted(cost_ms)[:kept])
    return 1e3 * len(cost_ms) / total_ms if total_ms else math.inf


def _share(cost_ms: Sequence[float], rate_req_s: float) -> float:
    """The share of programs that fills the server at this rate, the cheapest first; a part of the last one counts."""
    left_ms = 1e3 * len(cost_ms) / rate_req_s
    for kept, each_ms in enumerate(sorted(cost_ms)):
        if each_ms > left_ms:
            return (kept + left_ms / each_ms) / len(cost_ms)
        left_ms -= each_ms
    return 1.0


def _paces(stage: Stage) -> list[float]:
    thinking = [stage.think_tpot_ms] if stage.think_tokens > 1 else []
    answering = [stage.tpot_ms] if stage.output_tokens > max(stage.think_tokens, 1) else []
    return [pace for pace in (*thinking, *answering) if pace is not None]
