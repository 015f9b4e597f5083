"""The mixed load of the CPU benchmark: one bursty tight tier and two loose ones, scaled to a small server.

Shape. Three tiers as in the paper's *mixed* scenario (coder, chatbot, summarizer), lengths scaled down to about
230 prompt and 30 output tokens so that a 2-core server answers several a second. Prompts are random token ids:
nothing is shared, the radix cache can't answer. Each program is one call.

Arrivals. The coder tier comes in bursts (an on-off process: geometric bursts of 15 calls on average, five times as
dense as the tier's mean, inter-arrival CV about 4; the paper's trace of coding assistants has 7), the loose tiers as
Poisson. Every tier is stretched to span exactly programs / rate seconds, and a rate only stretches time: the same
seed gives the same calls in the same order at every rate.

Targets. TTFT as in the paper's table, a slowdown of 5, 5 and 3 over the prompt's zero-load TTFT, turned into
milliseconds once from a calibration of the stock server, so that every arm gets and is judged by the same numbers.
TPOT of the loose tiers 100 ms as there. The tight tier's is scaled: the paper's 50 ms are 1.6 to 2 of its servers'
zero-load decode steps; this server's step takes 6 ms alone and 24 ms in a batch of 32, and `TIGHT_TPOT_MS` lies
between: it can be kept, but not by a server that lets whole prompts pass between two tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from slos_sglang.measure.attainment import Targets
from slos_sglang.measure.load import Call

TIGHT_TPOT_MS = 30.0
MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 40, 900
MIN_OUTPUT_TOKENS, MAX_OUTPUT_TOKENS = 5, 120
HIDDEN_CAP_TOKENS = 256
_BURST_CALLS = 15.0
_BURST_DENSITY = 5.0


@dataclass(frozen=True, kw_only=True)
class Tier:
    """One class of calls: its share of the programs, log-normal lengths (median, sigma), targets.

    `priority` is what the priority arm sends (SGLang: a higher value goes first).
    """

    name: str
    share: float
    prompt_tokens: tuple[float, float]
    output_tokens: tuple[float, float]
    ttft_slowdown: float
    tpot_ms: float
    bursty: bool
    priority: int


TIERS = (
    Tier(
        name="coder",
        share=0.35,
        prompt_tokens=(150, 0.6),
        output_tokens=(16, 0.6),
        ttft_slowdown=5,
        tpot_ms=TIGHT_TPOT_MS,
        bursty=True,
        priority=2,
    ),
    Tier(
        name="chat",
        share=0.35,
        prompt_tokens=(170, 0.6),
        output_tokens=(38, 0.5),
        ttft_slowdown=5,
        tpot_ms=100,
        bursty=False,
        priority=1,
    ),
    Tier(
        name="summarizer",
        share=0.30,
        prompt_tokens=(300, 0.45),
        output_tokens=(25, 0.5),
        ttft_slowdown=3,
        tpot_ms=100,
        bursty=False,
        priority=1,
    ),
)
TIGHT = TIERS[0].name


@dataclass(frozen=True, kw_only=True)
class ZeroLoad:
    """What one call takes on an idle stock server: TTFT = const + per_token x prompt tokens; one decode step."""

    ttft_const_ms: float
    ttft_token_ms: float
    tpot_ms: float

    def ttft_ms(self, prompt_tokens: int) -> float:
        """Zero-load time to first token of a prompt, ms."""
        return self.ttft_const_ms + self.ttft_token_ms * prompt_tokens


@dataclass(frozen=True, kw_only=True)
class _Draft:
    tier: Tier
    position: float  # of the run, 0 to 1
    prompt: tuple[int, ...]
    output_tokens: int


def mixed_calls(
    *,
    programs: int,
    rate_req_s: float,
    seed: int,
    zero_load: ZeroLoad,
    vocabulary: int,
    hide_lengths: bool = False,
) -> list[Call]:
    """`programs` calls at `rate_req_s` programs a second, in order of arrival.

    The targets travel as absolute numbers in `custom_params.slo`. `max_new_tokens` is the drawn output length, a cap
    and no hint; with `hide_lengths` it is the same for all calls and the client hangs up at the drawn length.
    """
    drafts = [d for tier in TIERS for d in _draft(tier, round(programs * tier.share), seed, vocabulary)]
    drafts.sort(key=lambda d: (d.position, d.tier.name))
    span_s = len(drafts) / rate_req_s
    return [
        _call(draft, f"{seed}-{number}", draft.position * span_s, zero_load, hide_lengths)
        for number, draft in enumerate(drafts)
    ]


def with_priority(calls: Sequence[Call]) -> list[Call]:
    """The same calls with the priority of their tier."""
    priority = {tier.name: tier.priority for tier in TIERS}
    return [replace(call, priority=priority[call.name]) for call in calls]


def _call(draft: _Draft, call_id: str, arrival_s: float, zero_load: ZeroLoad, hide_lengths: bool) -> Call:
    tier = draft.tier
    ttft_ms = round(tier.ttft_slowdown * zero_load.ttft_ms(len(draft.prompt)), 1)
    return Call(
        id=call_id,
        name=tier.name,
        arrival_s=arrival_s,
        prompt=draft.prompt,
        output_tokens=draft.output_tokens,
        targets=Targets(ttft_ms=ttft_ms, tpot_ms=tier.tpot_ms),
        slo={"program": call_id, "stage": tier.name, "ttft_ms": ttft_ms, "tpot_ms": tier.tpot_ms},
        cap_tokens=HIDDEN_CAP_TOKENS if hide_lengths else None,
    )


def _draft(tier: Tier, count: int, seed: int, vocabulary: int) -> list[_Draft]:
    rng = random.Random(f"{seed}/{tier.name}")
    gaps = _bursty_gaps(rng, count + 1) if tier.bursty else [rng.expovariate(1) for _ in range(count + 1)]
    total, at, drafts = sum(gaps), 0.0, []
    for gap in gaps[:count]:
        at += gap
        prompt_tokens = _length(rng, tier.prompt_tokens, MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS)
        prompt = tuple(rng.randrange(vocabulary // 4, vocabulary) for _ in range(prompt_tokens))
        output_tokens = _length(rng, tier.output_tokens, MIN_OUTPUT_TOKENS, MAX_OUTPUT_TOKENS)
        drafts.append(_Draft(tier=tier, position=at / total, prompt=prompt, output_tokens=output_tokens))
    return drafts


def _bursty_gaps(rng: random.Random, count: int) -> list[float]:
    """Inter-arrival times of mean 1: dense inside a burst, a long gap before each."""
    within = 1 / _BURST_DENSITY
    between = within + (1 - within) * _BURST_CALLS
    return [rng.expovariate(1 / (between if rng.random() < 1 / _BURST_CALLS else within)) for _ in range(count)]


def _length(rng: random.Random, lognormal: tuple[float, float], low: int, high: int) -> int:
    median, sigma = lognormal
    return min(max(round(median * rng.lognormvariate(0, sigma)), low), high)
