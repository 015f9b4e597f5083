"""One simulated server: a step runs a batch and takes the time that a cost model gives it.

What must stay true, and is asserted at every step: a batch holds nobody twice, only requests that are here, and never
more of a prompt than is left; whenever there is work, something runs; at the end everybody has all tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from slos_sglang.policy.batch_time import CostModel, OnlineCostModel
from slos_sglang.policy.batches import Batch
from slos_sglang.policy.request import Request
from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.slo import WireSLO


@dataclass(frozen=True, kw_only=True)
class SimCall:
    """One call offered to the server. The policy sees `max_tokens`, never `output_tokens`."""

    id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    slo: WireSLO | None = None
    cached_tokens: int = 0
    max_tokens: int = 1 << 30


@dataclass(kw_only=True)
class Served:
    """What became of a call: when each token left, and the policy's own account of it."""

    call: SimCall
    request: Request
    token_s: list[float] = field(default_factory=list)


def simulate(
    calls: Sequence[SimCall], scheduler: Scheduler, true_cost: CostModel, *, noise: float = 0.0, seed: int = 0
) -> list[Served]:
    """Serve `calls` (sorted by arrival) to the end; a step's time varies by a log-normal factor of sigma `noise`."""
    rng = random.Random(seed)
    served = [
        Served(
            call=call,
            request=Request(
                rid=call.id, seq=number, arrival_s=call.arrival_s, slo=call.slo, max_tokens=call.max_tokens
            ),
        )
        for number, call in enumerate(calls)
    ]
    for one in served:
        one.request.handle = one
    coming = served[::-1]
    waiting: list[Request] = []
    decoding: list[Request] = []
    now_s = 0.0
    while coming or waiting or decoding:
        if not waiting and not decoding:
            now_s = max(now_s, coming[-1].call.arrival_s)
        while coming and coming[-1].call.arrival_s <= now_s:
            waiting.append(_arrive(coming.pop(), scheduler.cost, now_s))
        scheduler.admit(now_s, [r for r in (*waiting, *decoding) if r.undecided(now_s)], decoding, waiting)
        batch = scheduler.next_batch(now_s, decoding, waiting)
        _check(batch, decoding, waiting)
        factor = rng.lognormvariate(0, noise) if noise else 1.0
        step_ms = true_cost.batch_ms(batch.size) * factor
        if isinstance(scheduler.cost, OnlineCostModel):
            scheduler.cost.observe(batch.size, step_ms)
        now_s += step_ms / 1e3
        _apply(batch, decoding, waiting, now_s)
    assert all(len(one.token_s) == one.call.output_tokens for one in served)
    return served


def _arrive(one: Served, cost: CostModel, now_s: float) -> Request:
    request = one.request
    request.context_tokens = one.call.cached_tokens
    request.uncached_tokens = one.call.prompt_tokens - one.call.cached_tokens
    request.served_s = now_s
    request.set_targets(cost)
    return request


def _check(batch: Batch, decoding: Sequence[Request], waiting: Sequence[Request]) -> None:
    chosen = [*batch.decode, *(r for r, _ in batch.prefill)]
    assert chosen, "there is work, but nothing runs"
    assert len({id(r) for r in chosen}) == len(chosen), "somebody is in the batch twice"
    assert {id(r) for r in batch.decode} <= {id(r) for r in decoding}
    assert {id(r) for r, _ in batch.prefill} <= {id(r) for r in waiting}
    assert all(0 < tokens <= r.uncached_tokens for r, tokens in batch.prefill)
    unfinished = [r for r, tokens in batch.prefill if tokens < r.uncached_tokens]
    assert len(unfinished) <= 1 and (not unfinished or unfinished[0] is batch.prefill[-1][0])


def _apply(batch: Batch, decoding: list[Request], waiting: list[Request], now_s: float) -> None:
    for request, tokens in batch.prefill:
        request.uncached_tokens -= tokens
        request.context_tokens += tokens
        request.served_s = now_s
        if request.uncached_tokens == 0:
            waiting.remove(request)
            decoding.append(request)
            _token(request, decoding, now_s)
    for request in batch.decode:
        request.context_tokens += 1
        _token(request, decoding, now_s)


def _token(request: Request, decoding: list[Request], now_s: float) -> None:
    one: Served = request.handle
    request.token(now_s)
    one.token_s.append(now_s)
    if len(one.token_s) == one.call.output_tokens:
        request.finish(now_s)
        decoding.remove(request)
