"""What became of one program, and why: the verdicts that its stages got, and each deadline against what happened."""

from __future__ import annotations

from typing import Any

from slos_sglang.measure.attainment import checked_tokens
from slos_sglang.measure.result import StageRecord
from slos_sglang.policy.request import TOLERANCE
from slos_sglang.sim.replica import Call
from slos_sglang.sim.run import Run


def explain(run: Run, program: str) -> list[dict[str, Any]]:
    """One object a stage of `program` that arrived, in order, JSON values only; the run must have been traced.

    Times (`_s`) count from the start of the run. Raises `ValueError` where no such program was offered.
    """
    record = next((offered for offered in run.programs if offered.id == program), None)
    if record is None:
        some = ", ".join(repr(offered.id) for offered in run.programs[:3])
        raise ValueError(f"explain must be the id of a program ({some}, ...), not {program!r}")
    calls = [call for call in run.calls if call.program.id == program]
    return [_explained(call, stage) for call, stage in zip(calls, record.stages, strict=True)]


def lines(stages: list[dict[str, Any]]) -> list[str]:
    """The same for people."""
    text = []
    for stage in stages:
        text.append(
            f"stage {stage['stage']!r}: {stage['prompt_tokens']} prompt tokens, {stage['output_tokens']} output tokens"
        )
        events = [(stage["arrival_s"], "arrives"), *_verdicts(stage["verdicts"])]
        events += [(due["at_s"], _due(due)) for due in stage["deadlines"]]
        text += [f"{at_s:12.3f} s  {what}" for at_s, what in sorted(events, key=lambda event: event[0])]
        kept = ["not attained", "attained"][stage["attained"]]
        mean = ["missed", "kept"][stage["attained_mean_tpot"]]
        text.append(
            f"  {stage['outcome']} as {stage['tier'].replace('_', ' ')}, {kept} (mean-TPOT rule: {mean}), "
            f"preemptions: {stage['preemptions']}"
        )
    return text


def _explained(call: Call, record: StageRecord) -> dict[str, Any]:
    return {
        "stage": record.name,
        "prompt_tokens": call.stage.prompt_tokens,
        "output_tokens": call.stage.output_tokens,
        "arrival_s": record.arrival_s,
        "verdicts": [
            {
                "at_s": at_s,
                "admitted": verdict.admitted,
                "reason": verdict.reason,
                "retry_after_s": verdict.retry_after_s,
            }
            for at_s, verdict in call.verdicts
        ],
        "deadlines": _deadlines(record),
        "outcome": record.outcome,
        "tier": call.request.tier,
        "attained": record.attained,
        "attained_mean_tpot": record.attained_mean_tpot,
        "preemptions": call.request.preemptions,
    }


def _deadlines(record: StageRecord) -> list[dict[str, Any]]:
    """The first token, the token that came closest to being late or was latest, and the last one.

    `latest_s` is when the token rule, with its tolerance, asks for the token (None: never); `at_s`: when it came.
    """
    if not record.token_s:
        return []
    count = len(record.token_s)
    checked = [n for n in checked_tokens(count) if n > 1 and _latest_s(record, n) is not None]
    tightest = min(checked, key=lambda n: ((_latest_s(record, n) or 0.0) - record.token_s[n - 1], n), default=count)
    numbers = dict.fromkeys((1, tightest, count))
    return [{"token": n, "at_s": record.token_s[n - 1], "latest_s": _latest_s(record, n)} for n in numbers]


def _latest_s(record: StageRecord, token: int) -> float | None:
    targets, first_s = record.targets, record.token_s[0]
    due_s = None if targets.ttft_ms is None else record.arrival_s + targets.ttft_ms / 1e3
    if token == 1:
        return None if targets.ttft_ms is None else record.arrival_s + targets.ttft_ms / 1e3 * TOLERANCE
    start_s = first_s if due_s is None else max(first_s, due_s)
    thinking = min(record.think_tokens, len(record.token_s))
    pace_ms = targets.think_tpot_ms if token <= thinking else targets.tpot_ms
    if pace_ms is None:
        return None
    if token > thinking > 1 and targets.think_tpot_ms is None:
        return max(start_s, record.token_s[thinking - 1]) + (token - thinking) * pace_ms / 1e3 * TOLERANCE
    thought = min(max(thinking, 1), token) - 1
    steps_ms = thought * (targets.think_tpot_ms or 0.0) + (token - 1 - thought) * (targets.tpot_ms or 0.0)
    return start_s + steps_ms / 1e3 * TOLERANCE


def _verdicts(verdicts: list[dict[str, Any]]) -> list[tuple[float, str]]:
    """The first and the last answer; those between are counted."""
    shown = [(verdict["at_s"], _verdict(verdict)) for verdict in (*verdicts[:1], *verdicts[1:][-1:])]
    if len(verdicts) > 2:
        shown.insert(1, (verdicts[1]["at_s"], f"asked again {len(verdicts) - 2} times, declined"))
    return shown


def _verdict(verdict: dict[str, Any]) -> str:
    if verdict["admitted"]:
        return "admitted"
    retry_s = verdict["retry_after_s"]
    return f"declined: {verdict['reason']}" + (f" (ask again in {retry_s:.1f} s)" if retry_s else "")


def _due(due: dict[str, Any]) -> str:
    if due["latest_s"] is None:
        return f"token {due['token']}, no deadline"
    early_ms = (due["latest_s"] - due["at_s"]) * 1e3
    return f"token {due['token']}, {abs(early_ms):.0f} ms {'before' if early_ms >= 0 else 'after'} its deadline"
