"""How long decisions take: promise, then form the batch, as a server's step asks.

    python benchmarks/decisions.py

Random moments of a server (the cost of llama-3.1-8b-h200) on which so many requests run and 32 wait: a third of these
promised with a prompt to compute as far as that can be kept, a third best effort, the others declined (they are asked
again), and newcomers as they come to a step (none most often, two and more now and then). `dp` is the dynamic program
alone on ten newcomers of three tiers, `burst` a whole decision with them. Times are the thread's own (CPU), whatever
else the machine does. Writes benchmarks/results/decisions.json.
"""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slos_sglang.policy import dp
from slos_sglang.policy.admission import Outlook
from slos_sglang.policy.batches import Limits, Memory
from slos_sglang.policy.cost_models import COST_MODELS
from slos_sglang.policy.request import Request
from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.policy.state import world_of
from slos_sglang.slo import WireSLO

FILE = Path("benchmarks/results/decisions.json")
MODEL = COST_MODELS["llama-3.1-8b-h200"]
COST = MODEL.cost()
LIMITS = Limits()
RUNNING = (64, 256, 512, 1024, 2048)
WAITING, BURST = 32, 10
MOMENTS = 300
TPOTS_MS = (100.0, 150.0, 200.0)
# How many newcomers a step finds.
NEWCOMERS, WEIGHTS = (0, 1, 2, 3, 5), (60, 28, 8, 3, 1)


def moment(rng: random.Random, running: int, newcomers: int) -> tuple[list[Request], list[Request], Memory]:
    """Who decodes, who waits (the last ones are the newcomers), and a memory that holds them all."""
    decoding = [_decoder(rng, seq) for seq in range(running)]
    waiting = [_prompt(rng, running + number) for number in range(WAITING - newcomers)]
    held = sum(r.context_tokens for r in decoding)
    need = held + sum(r.left_tokens for r in decoding) + 2000 * WAITING
    memory = Memory(capacity_tokens=need, free_tokens=need - held, block_tokens=1)
    for number, request in enumerate(waiting):
        request.arrival_s -= 0.2
        request.first_due_s -= 0.2
        request.due_s -= 0.2
        if number % 3 == 0:
            request.first_due_s = request.due_s = 5.0
        elif number % 3 == 2:
            request.slo, request.constrained = None, False
    # Promised is what can be kept, as on a server.
    outlook = Outlook(0.0, decoding, waiting[::3], COST, LIMITS, memory)
    promised = [r for r in waiting[::3] if outlook.ask(r).admitted]
    for request in waiting:
        if request in promised:
            request.admit()
        elif request.constrained:
            request.decline()
    waiting += [_prompt(rng, running + WAITING - newcomers + number) for number in range(newcomers)]
    return decoding, waiting, memory


def _prompt(rng: random.Random, seq: int) -> Request:
    slo = WireSLO(ttft_slowdown=rng.choice((3.0, 5.0)), tpot_ms=rng.choice(TPOTS_MS))
    request = Request(rid=f"r{seq}", seq=seq, arrival_s=0.0, slo=slo)
    request.uncached_tokens = min(max(int(rng.lognormvariate(6.0, 1.0)), 16), 4000)
    request.left_tokens = rng.randint(10, 400)
    request.set_targets(COST, credit_share=LIMITS.credit_share)
    return request


def _decoder(rng: random.Random, seq: int) -> Request:
    request = _prompt(rng, seq)
    request.admit()
    request.context_tokens, request.uncached_tokens, request.started = request.uncached_tokens, 0, True
    request.token(-0.1 * request.pace_s * rng.random())
    return request


def decisions(running: int, newcomers: Callable[[random.Random], int]) -> list[float]:
    """Milliseconds that `admit` and `next_batch` took together, at each moment."""
    took_ms = []
    for seed in range(MOMENTS):
        rng = random.Random(f"{seed}/{running}")
        scheduler = Scheduler(cost=COST, limits=LIMITS)
        decoding, waiting, memory = moment(rng, running, newcomers(rng))
        start_s = time.thread_time()
        undecided = [r for r in waiting if r.undecided(0.0)]
        scheduler.admit(0.0, undecided, decoding, waiting, memory)
        scheduler.next_batch(0.0, decoding, waiting, memory)
        took_ms.append((time.thread_time() - start_s) * 1e3)
    return took_ms


def dynamic_program(running: int) -> list[float]:
    """Milliseconds of one proposal for ten newcomers of three tiers."""
    took_ms = []
    for seed in range(MOMENTS):
        decoding, waiting, memory = moment(random.Random(f"{seed}/dp"), running, BURST)
        promised = [*decoding, *(r for r in waiting if r.standard)]
        world = world_of(COST, LIMITS, memory)
        start_s = time.thread_time()
        dp.propose(0.0, promised, waiting[-BURST:], world)
        took_ms.append((time.thread_time() - start_s) * 1e3)
    return took_ms


def usual(rng: random.Random) -> int:
    """Newcomers of a usual step."""
    return rng.choices(NEWCOMERS, WEIGHTS)[0]


def _summary(took_ms: list[float]) -> dict[str, float]:
    ordered = sorted(took_ms)
    return {name: round(ordered[int(q * (len(ordered) - 1))], 3) for name, q in (("p50", 0.5), ("p99", 0.99))}


def main() -> None:
    """Measure and write."""
    dp.compile_ahead()
    decisions(64, usual)  # warm
    found: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "moments": MOMENTS,
        "waiting": WAITING,
        "decision_ms": {str(running): _summary(decisions(running, usual)) for running in RUNNING},
        "burst_ms": {str(running): _summary(decisions(running, lambda _: BURST)) for running in (64, 256)},
        "dp_ms": {str(running): _summary(dynamic_program(running)) for running in (6, 256)},
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
