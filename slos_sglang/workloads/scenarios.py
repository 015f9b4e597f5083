"""The six scenarios of the paper's evaluation (section 6), rebuilt from open data.

    chatbot, coder  five minutes of the Azure 2023 traces, short calls only; summarizer: ArXiv lengths, Poisson arrivals
    mixed           a third of each, at a third of the rate each
    toolllm         generated: 1 to 7 turns (tool calls as counted in ToolBench, then the answer), Poisson arrivals
    reasoning       generated: a short prompt, long thinking, an answer, Poisson arrivals

Generated lengths match the mean, P99 and standard deviation of the paper's tables; of the reasoning outputs only the
means are known, their spread (sigma 0.6) is our choice.

What must stay true: a scenario is made at one program a second and a rate only stretches time, so that the same seed
gives the same programs in the same order at every rate. Seed 0 of a trace is the trace as recorded; other seeds deal
its lengths anew among its arrivals. Tool times do not stretch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

from slos_sglang.slo import SLO, presets
from slos_sglang.workloads.lengths import Lognormal, poisson, weighted
from slos_sglang.workloads.program import Program, Stage
from slos_sglang.workloads.traces import (
    ARXIV,
    AZURE_CODE,
    AZURE_CONV,
    Arrival,
    data_dir,
    find,
    read_azure,
    read_lengths,
)

WINDOW_S = 300.0
# Between the calls of coding agents: median 0.3 s, P90 13.6 s, cap 220 s.
TOOL_GAP_S = Lognormal(median=0.3, sigma=2.976, high=220.0)
TOOL_PROMPT = Lognormal(shift=343.5, median=238.8, sigma=0.866, low=16, high=4096)
TOOL_OUTPUT = Lognormal(shift=34.3, median=63.5, sigma=0.710, low=1, high=1024)
# How many of 600 queries made 0, 1, .. 6 tool calls.
TOOL_CALLS = (2, 42, 140, 88, 80, 63, 185)
# A turn that continues a conversation brings at least this much that no cache can hold.
MIN_NEW_TOKENS = 16
REASONING_PROMPT = Lognormal(shift=-11.3, median=118.5, sigma=0.555, low=8, high=2048)
REASONING_THINK = Lognormal(median=3920, sigma=0.6, low=1, high=32_768)
REASONING_ANSWER = Lognormal(median=670.7, sigma=0.6, low=1, high=8192)


@dataclass(frozen=True, kw_only=True)
class TraceWindow:
    """Which part of which trace, and the longest call (prompt and output together) that counts."""

    pattern: str
    start_s: float
    max_tokens: int


CODER = TraceWindow(pattern=AZURE_CODE, start_s=1786.0, max_tokens=2048)
CHATBOT = TraceWindow(pattern=AZURE_CONV, start_s=900.0, max_tokens=2038)
SUMMARIZER_MAX_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What a scenario is drawn with.

    programs        how many; None takes the scenario's own number
    data            folder of the published traces; None finds it (see `traces.data_dir`)
    window_start_s  another part of the trace, s from its first call; for held-out evaluation
    prefix_cache    turns of a conversation find what came before them cached; False: as in the paper, nothing is
    """

    programs: int | None = None
    seed: int = 0
    data: Path | None = None
    window_start_s: float | None = None
    prefix_cache: bool = True


def scenario(name: str, draw: Draw) -> list[Program]:
    """The programs of a scenario at one program a second, by arrival.

    Raises `ValueError` for an unknown name, a number of programs below 1, or trace files that are missing or malformed.
    """
    if name not in SCENARIOS:
        raise ValueError(f"scenario must be one of {', '.join(SCENARIOS)}, not {name!r}")
    if draw.programs is not None and draw.programs < 1:
        raise ValueError(f"programs must be at least 1, not {draw.programs}")
    return SCENARIOS[name](draw)


def at_rate(programs: Iterable[Program], rate_req_s: float) -> list[Program]:
    """Programs made at one a second, arriving at `rate_req_s` instead. Raises `ValueError` unless that is positive."""
    if not 0 < rate_req_s < float("inf"):
        raise ValueError(f"rate_req_s must be greater than 0, not {rate_req_s!r}")
    return [replace(program, arrival_s=program.arrival_s / rate_req_s) for program in programs]


def at_rates(programs: Iterable[Program], phases: Sequence[tuple[float, float]]) -> list[Program]:
    """Programs made at one a second, arriving at a rate that changes: `phases` of (seconds, programs a second).

    The last phase goes on for as long as there are programs. Raises `ValueError` unless all are positive.
    """
    if not phases or any(not (seconds > 0 and rate_req_s > 0) for seconds, rate_req_s in phases):
        raise ValueError(f"phases must be pairs of seconds and programs a second greater than 0, not {phases!r}")
    stretched, left = [], list(phases)
    start_s, offered = 0.0, 0.0
    for program in programs:
        while len(left) > 1 and program.arrival_s - offered > left[0][0] * left[0][1]:
            seconds, rate_req_s = left.pop(0)
            start_s, offered = start_s + seconds, offered + seconds * rate_req_s
        stretched.append(replace(program, arrival_s=start_s + (program.arrival_s - offered) / left[0][1]))
    return stretched


def programs_of(app: str, calls: Sequence[Arrival], slo: SLO) -> list[Program]:
    """One program of one stage, both called `app`, for each call. Raises `ValueError` where there is none."""
    if not calls:
        raise ValueError("the trace holds no call")
    return [
        Program(
            id=f"{app}-{number:04}",
            arrival_s=call.arrival_s,
            app=app,
            stages=(
                replace(
                    _stage(app, slo, prompt_tokens=call.prompt_tokens, output_tokens=call.output_tokens),
                    cached_tokens=call.cached_tokens,
                ),
            ),
        )
        for number, call in enumerate(calls)
    ]


def _coder(draw: Draw) -> list[Program]:
    return _trace("coder", CODER, presets.CODING, draw)


def _chatbot(draw: Draw) -> list[Program]:
    return _trace("chatbot", CHATBOT, presets.CHATBOT, draw)


def _summarizer(draw: Draw) -> list[Program]:
    rng = random.Random(f"{draw.seed}/summarizer")
    count = draw.programs or 600
    calls = _spread(_summaries(find(data_dir(draw.data), ARXIV)), count, rng)
    return programs_of("summarizer", _at(poisson(count, rng), calls), presets.SUMMARIZATION)


def _mixed(draw: Draw) -> list[Program]:
    count = draw.programs or 3 * 559
    shares = [count // 3 + (number < count % 3) for number in range(3)]
    parts = [
        at_rate(make(replace(draw, programs=share)), share / count)
        for make, share in zip((_coder, _chatbot, _summarizer), shares, strict=True)
        if share
    ]
    return sorted((program for part in parts for program in part), key=lambda program: (program.arrival_s, program.id))


def _toolllm(draw: Draw) -> list[Program]:
    rng = random.Random(f"{draw.seed}/toolllm")
    count = draw.programs or 600
    turns = [calls + 1 for calls in weighted(range(len(TOOL_CALLS)), TOOL_CALLS, count, rng)]
    prompts, outputs = TOOL_PROMPT.whole(sum(turns), rng), TOOL_OUTPUT.whole(sum(turns), rng)
    gaps = TOOL_GAP_S.sample(sum(turns), rng)
    programs = []
    for number, at in enumerate(poisson(count, rng)):
        prompt = sorted(prompts.pop() for _ in range(turns[number]))
        stages = [
            _stage("act", presets.TOOL_LOOP, prompt_tokens=tokens, output_tokens=outputs.pop(), after_s=gaps.pop())
            for tokens in prompt
        ]
        stages[-1] = replace(stages[-1], name="final", tpot_ms=presets.TOOL_FINAL.tpot_ms, after_s=0.0)
        if draw.prefix_cache:
            stages = [stages[0], *(_continued(before, stage) for before, stage in pairwise(stages))]
        programs.append(Program(id=f"toolllm-{number:04}", arrival_s=at, app="toolllm", stages=tuple(stages)))
    return programs


def _reasoning(draw: Draw) -> list[Program]:
    rng = random.Random(f"{draw.seed}/reasoning")
    count = draw.programs or 400
    lengths = [kind.whole(count, rng) for kind in (REASONING_PROMPT, REASONING_THINK, REASONING_ANSWER)]
    return [
        Program(
            id=f"reasoning-{number:04}",
            arrival_s=at,
            app="reasoning",
            stages=(
                _stage(
                    "reasoning",
                    presets.REASONING,
                    prompt_tokens=prompt,
                    output_tokens=think + answer,
                    think_tokens=think,
                ),
            ),
        )
        for number, (at, prompt, think, answer) in enumerate(zip(poisson(count, rng), *lengths, strict=True))
    ]


SCENARIOS: dict[str, Callable[[Draw], list[Program]]] = {
    "chatbot": _chatbot,
    "coder": _coder,
    "summarizer": _summarizer,
    "mixed": _mixed,
    "toolllm": _toolllm,
    "reasoning": _reasoning,
}
# What each scenario runs on in the paper's evaluation.
COST_MODEL_OF = {
    **dict.fromkeys(SCENARIOS, "opt-13b-a100-tp2"),
    "toolllm": "toolllama-7b-a100",
    "reasoning": "r1-distill-qwen-1.5b-a100",
}


def _trace(app: str, window: TraceWindow, slo: SLO, draw: Draw) -> list[Program]:
    """The window, again and again (lengths dealt anew) until there are enough programs."""
    file = find(data_dir(draw.data), window.pattern)
    if draw.window_start_s is not None:
        window = replace(window, start_s=draw.window_start_s)
    calls = _window(file, window)
    count = draw.programs or len(calls)
    arrivals: list[float] = []
    lengths: list[Arrival] = []
    for turn in range(-(-count // len(calls))):
        arrivals += [turn * WINDOW_S + call.arrival_s for call in calls]
        lengths += _dealt(calls, None if draw.seed == turn == 0 else random.Random(f"{draw.seed}/{app}/{turn}"))
    # One program a second on average, up to the call that would come next.
    end_s = arrivals[count] if count < len(arrivals) else WINDOW_S * (len(arrivals) // len(calls))
    scaled = [at * count / end_s for at in arrivals[:count]]
    return programs_of(app, _at(scaled, lengths[:count]), slo)


@cache
def _window(file: Path, window: TraceWindow) -> tuple[Arrival, ...]:
    calls = tuple(
        replace(call, arrival_s=call.arrival_s - window.start_s)
        for call in read_azure(file)
        if window.start_s <= call.arrival_s < window.start_s + WINDOW_S
        and call.prompt_tokens + call.output_tokens <= window.max_tokens
    )
    if not calls:
        raise ValueError(f"window_start_s {window.start_s:g}: no calls of at most {window.max_tokens} tokens in {file}")
    return calls


def _dealt(calls: Sequence[Arrival], rng: random.Random | None) -> list[Arrival]:
    dealt = list(calls)
    if rng:
        rng.shuffle(dealt)
    return dealt


@cache
def _summaries(file: Path) -> tuple[Arrival, ...]:
    return tuple(
        call for call in read_lengths(file) if call.prompt_tokens + call.output_tokens <= SUMMARIZER_MAX_TOKENS
    )


def _spread(calls: Sequence[Arrival], count: int, rng: random.Random) -> list[Arrival]:
    """`count` of `calls`, in random order, spread evenly over outputs and, among like outputs, over prompts."""
    by_output = sorted(calls, key=lambda call: (call.output_tokens, call.prompt_tokens))
    slices = max(round(count**0.5), 1)
    size = -(-len(by_output) // slices)
    ordered: list[Arrival] = []
    for number in range(slices):
        part = by_output[number * size : (number + 1) * size]
        ordered += sorted(part, key=lambda call: call.prompt_tokens, reverse=number % 2 == 1)
    offset = rng.random()
    drawn = [ordered[int((number + offset) * len(ordered) / count)] for number in range(count)]
    rng.shuffle(drawn)
    return drawn


def _at(arrivals: Sequence[float], calls: Sequence[Arrival]) -> list[Arrival]:
    return [replace(call, arrival_s=at) for at, call in zip(arrivals, calls, strict=True)]


def _stage(
    name: str, slo: SLO, *, prompt_tokens: int, output_tokens: int, think_tokens: int = 0, after_s: float = 0.0
) -> Stage:
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
        after_s=after_s,
    )


def _continued(before: Stage, stage: Stage) -> Stage:
    """`stage` with the conversation so far cached: the prompt before it and its answer, as far as they are kept."""
    so_far = before.prompt_tokens + before.output_tokens
    return replace(stage, cached_tokens=min(so_far, stage.prompt_tokens - MIN_NEW_TOKENS))
