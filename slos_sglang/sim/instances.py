"""Random moments of a server: some requests run, others ask. How much of what is asked could be promised at best?

`optimum` tries every set of those that ask, in the plan's own exact simulation: what a way of admitting is worth is
measured against it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slos_sglang.policy import plan
from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.batches import Limits, Memory
from slos_sglang.policy.request import Request, table_of
from slos_sglang.policy.state import rows_of, world_of
from slos_sglang.slo import WireSLO

MAX_ASKING = 10
MAX_RUNNING = 6
_TPOTS_MS = (30.0, 50.0, 75.0, 100.0, 200.0)


@dataclass(frozen=True, kw_only=True)
class Instance:
    """`promised` hold the server at `now_s`, `asking` ask. What is promised can be kept."""

    now_s: float
    promised: tuple[Request, ...]
    asking: tuple[Request, ...]
    cost: CostModel
    limits: Limits
    memory: Memory

    def keeps(self, admitted: Sequence[Request]) -> bool:
        """Are all targets kept if `admitted` are promised too? By the exact simulation, batch by batch."""
        requests = sorted((*self.promised, *admitted), key=lambda r: r.seq)
        nobody = np.zeros(len(requests), dtype=np.bool_)
        world = world_of(self.cost, self.limits, self.memory)
        code, _, _ = plan.foresee(self.now_s, rows_of(table_of(requests)), world, nobody, nobody.copy())
        return bool(code == plan.KEPT)

    def optimum(self) -> float:
        """The most value that any set of `asking` brings of which all targets are kept."""
        count = len(self.asking)
        masks = sorted(range(1 << count), key=lambda mask: (-self._value(mask), mask))
        return next(self._value(mask) for mask in masks if self.keeps(self._set(mask)))

    def _set(self, mask: int) -> list[Request]:
        return [r for number, r in enumerate(self.asking) if mask >> number & 1]

    def _value(self, mask: int) -> float:
        return value_of(self._set(mask))


def value_of(requests: Sequence[Request]) -> float:
    """What keeping the targets of all of them is worth."""
    return sum(r.slo.value for r in requests if r.slo)


def draw_instance(seed: int) -> Instance:
    """The instance of `seed`: up to 6 running and 10 asking, 3 TPOTs, values and memory limits in half of them."""
    rng = random.Random(f"{seed}/instance")
    while True:
        instance = _draw(rng)
        if instance.keeps(()):
            return instance


def _draw(rng: random.Random) -> Instance:
    cost = _cost(rng)
    tpots_ms = rng.sample([t for t in _TPOTS_MS if t > 1.3 * cost.const_ms], 3)
    valued = rng.random() < 0.5
    seconds = rng.choice((0.2, 0.5, 1.0, 3.0))
    requests = []
    running = rng.randint(0, MAX_RUNNING)
    asking = rng.randint(1, MAX_ASKING)
    for seq in range(running + asking):
        slo = _slo(rng, rng.choice(tpots_ms), seconds, rng.choice((1.0, 1.0, 2.0, 5.0)) if valued else 1.0)
        request = Request(rid=f"r{seq}", seq=seq, arrival_s=-rng.choice((0.0, 0.02, 0.1)), slo=slo)
        request.uncached_tokens = min(max(int(rng.lognormvariate(5.5, 1.0)), 1), 3000)
        request.context_tokens = rng.choice((0, 0, 0, rng.randint(1, 1000)))
        request.left_tokens = rng.randint(1, rng.choice((20, 200)))
        request.set_targets(cost, credit_share=Limits().credit_share)
        if seq < running:
            _promise(rng, request)
        requests.append(request)
    need = sum(r.context_tokens + r.uncached_tokens + r.left_tokens for r in requests)
    capacity = int(need * rng.uniform(0.3, 1.0)) if rng.random() < 0.5 else need
    return Instance(
        now_s=0.0,
        promised=tuple(requests[:running]),
        asking=tuple(requests[running:]),
        cost=cost,
        limits=Limits(),
        memory=Memory(capacity_tokens=capacity, free_tokens=capacity),
    )


def _cost(rng: random.Random) -> CostModel:
    const_ms = rng.choice((5.0, 15.0, 32.0))
    # Where rows are dear, a few decoders are all that a tight pace allows.
    piece = Piece(
        tokens_ms=rng.choice((0.02, 0.07)),
        requests_ms=rng.choice((0.0, 0.3, 2.0, 5.0)),
        context_ms=rng.choice((0.0, 0.0, 5e-4)),
        const_ms=const_ms,
    )
    return CostModel(piece, Piece(const_ms=1.3 * const_ms)) if rng.random() < 0.3 else CostModel(piece)


def _slo(rng: random.Random, tpot_ms: float, seconds: float, value: float) -> WireSLO:
    if rng.random() < 0.5:
        return WireSLO(ttft_slowdown=rng.choice((3.0, 5.0)), tpot_ms=tpot_ms, value=value)
    return WireSLO(ttft_ms=rng.uniform(0.1, 1.0) * seconds * 1e3, tpot_ms=tpot_ms, value=value)


def _promise(rng: random.Random, request: Request) -> None:
    """Let `request` be under way: decoding, half through its prompt, or still to start."""
    request.admit()
    state = rng.random()
    if state < 0.7:
        request.context_tokens += request.uncached_tokens
        request.uncached_tokens, request.started = 0, True
        request.arrival_s -= request.ttft_s * rng.random()
        request.first_due_s = request.slack_until_s = request.arrival_s + request.ttft_s
        request.token(-rng.random() * request.pace_s)
    elif state < 0.85 and request.uncached_tokens > 1:
        done = rng.randint(1, request.uncached_tokens - 1)
        request.context_tokens += done
        request.uncached_tokens, request.started = request.uncached_tokens - done, True
