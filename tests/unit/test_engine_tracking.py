"""What is known of a request: from queueing over steps to its receipt, without a server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slos_sglang.engine.config import SLOConfig
from slos_sglang.engine.tracking import Tracker
from slos_sglang.engine.wire import RECEIVED_KEY
from slos_sglang.policy.batch_time import OnlineCostModel
from slos_sglang.telemetry.events import read_events


def tracker(config: SLOConfig | None = None, *, rank: int = 0, tokenizer: Any = None) -> Tracker:
    return Tracker(config or SLOConfig(), OnlineCostModel(), lambda: tokenizer, rank=rank)


def req(slo: dict[str, Any] | None = None, *, prompt: int = 5, **custom: Any) -> SimpleNamespace:
    return SimpleNamespace(
        rid="r",
        origin_input_ids=list(range(prompt)),
        output_ids=[],
        sampling_params=SimpleNamespace(custom_params=slo and {"slo": slo, **custom}, max_new_tokens=8),
        extend_end=prompt,
        finished_reason=None,
        finished=lambda: False,
    )


def step(tracked: Tracker, *reqs: SimpleNamespace, now_s: float, token: int = 7) -> None:
    """A decode step of all `reqs`, accounted for at the tick that ends it."""
    batch = SimpleNamespace(
        reqs=list(reqs),
        forward_mode=SimpleNamespace(is_extend=lambda: False),
        decoding_reqs=None,
        chunked_req=None,
        extend_lens=None,
    )
    tracked.launch(batch, None, waiting=0)  # type: ignore[arg-type]
    for each in reqs:
        each.output_ids.append(token)
    tracked.processed()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (req({"tpot_ms": 5.0}, prompt=0), "prompt is empty"),
        (req(prompt=0), "prompt is empty"),
        (req({"tpot_ms": -5.0}), "tpot_ms"),
        (req({"think_end": "x", "think_tpot_ms": 5.0}), "think_end='x'"),
    ],
)
def test_what_can_t_be_queued_is_said(asked: SimpleNamespace, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tracker().enqueue(asked, 100.0, is_retracted=False)


@pytest.mark.parametrize(
    ("custom", "arrival_s"),
    [({RECEIVED_KEY: 99.5}, 99.5), ({}, 100.0), ({RECEIVED_KEY: 100.5}, 100.0), ({RECEIVED_KEY: -900.0}, 100.0)],
    ids=["stamped", "no stamp", "a clock ahead", "a clock behind"],
)
def test_arrival_is_when_the_server_received_the_request(custom: dict[str, float], arrival_s: float) -> None:
    asked = req({"tpot_ms": 5.0}, **custom)
    tracker().enqueue(asked, 100.0, is_retracted=False)
    assert Tracker.state(asked).arrival_s == arrival_s


def test_only_retractions_count_as_preemptions() -> None:
    tracked, asked = tracker(), req({"tpot_ms": 5.0})
    for is_retracted in (False, True, False, True):
        tracked.enqueue(asked, 100.0, is_retracted=is_retracted)
    assert Tracker.state(asked).preemptions == 2


def test_tokens_count_at_the_tick_and_by_its_time() -> None:
    tracked, asked = tracker(), req({"ttft_ms": 2000.0, "tpot_ms": 500.0})
    tracked.enqueue(asked, 100.0, is_retracted=False)
    tracked.measure(asked, computed=0)
    tracked.settle(100.0)
    step(tracked, asked, now_s=100.0)
    state = Tracker.state(asked)
    assert (state.output_tokens, state.pending) == (0, 1)
    tracked.settle(100.25)
    assert (state.output_tokens, state.pending, state.first_token_s) == (1, 0, 100.25)
    assert state.due_s == 100.75


class Letters:
    """A tokenizer with a token a letter."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, token_ids))


def answered(tracked: Tracker, slo: dict[str, Any], text: str, *, every_s: float = 0.1) -> dict[str, Any]:
    """The receipt of a request that was answered with `text`, a letter a step."""
    asked = req(slo)
    asked.sampling_params.max_new_tokens = 64
    tracked.enqueue(asked, 100.0, is_retracted=False)
    tracked.measure(asked, computed=0)
    tracked.settle(100.0)
    for n, letter in enumerate(text[:-1], start=1):
        step(tracked, asked, now_s=100.0, token=ord(letter))
        tracked.settle(100.0 + n * every_s)
    asked.output_ids.append(ord(text[-1]))
    given = tracked.receipt(asked)
    assert given is not None
    return given


def test_the_receipt_has_every_phase_and_what_it_took() -> None:
    slo = {"phases": "name=think&tpot_ms=200&until=%3C%2Ft%3E;name=plan&tpot_ms=50&until=!;name=answer&first_ms=5000"}
    given = answered(tracker(tokenizer=Letters()), slo, "ab</t>cd!efgh")
    assert given["phases"] == "think,plan,answer" and "missing" not in given
    assert [(p["name"], p["tokens"]) for p in given["by_phase"]] == [("think", 6), ("plan", 3), ("answer", 4)]
    assert [p["tpot_ms"] for p in given["by_phase"][:2]] == [pytest.approx(100), pytest.approx(100)]
    assert [p["tpot_target_ms"] for p in given["by_phase"]] == [200, 50, None]
    assert [p["first_ms"] for p in given["by_phase"]] == [pytest.approx(n * 100) for n in (1, 7, 10)]
    assert given["by_phase"][2]["first_target_ms"] == 5000


def test_a_marker_that_never_comes_is_named() -> None:
    given = answered(tracker(tokenizer=Letters()), {"think_tpot_ms": 200.0}, "abcdefgh")
    assert given["phases"] == "think" and given["missing"] == "</think>"
    assert [p["name"] for p in given["by_phase"]] == ["think"]


def test_one_phase_needs_no_list() -> None:
    assert "by_phase" not in answered(tracker(), {"tpot_ms": 200.0}, "abc")


def test_earlier_calls_of_a_stage_say_how_long_this_one_thinks_and_talks() -> None:
    tracked = tracker(tokenizer=Letters())
    slo = {"stage": "s", "answer_ttft_ms": 5000.0, "budget_ms": 9000.0}
    for _ in range(8):
        answered(tracked, slo, "ab</think>cdef")
    asked = req(slo)
    asked.sampling_params.max_new_tokens = 64
    tracked.enqueue(asked, 100.0, is_retracted=False)
    state = Tracker.state(asked)
    assert (state.think_tokens, state.most_tokens, state.left_tokens) == (10, 14, 14)


def test_a_request_that_never_was_queued_has_no_receipt() -> None:
    assert tracker().receipt(req({"tpot_ms": 5.0})) is None


def test_a_request_that_asked_for_nothing_has_no_receipt() -> None:
    tracked, asked = tracker(), req()
    tracked.enqueue(asked, 100.0, is_retracted=False)
    assert tracked.receipt(asked) is None


@pytest.mark.parametrize(
    ("name", "written"), [("e.jsonl", ["e.jsonl"]), ("e{rank}.jsonl", ["e0.jsonl", "e1.jsonl"])], ids=["one", "each"]
)
def test_one_file_one_writer(name: str, written: list[str], tmp_path: Path) -> None:
    config = SLOConfig(events=str(tmp_path / name))
    ranks = [tracker(config, rank=rank) for rank in (0, 1)]
    for tracked in ranks:
        tracked.enqueue(req(), 100.0, is_retracted=False)
        tracked.idle()
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    assert [len(read_events(tmp_path / each)) for each in written] == [1] * len(written)
