"""Events come back as they were written; rows say what the events say; the picture draws."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from slos_sglang.telemetry.events import Arrive, Event, EventWriter, Finish, Kept, Step, read_events
from slos_sglang.telemetry.timeline import draw_timeline, timeline_rows

STEP = dict(measured_ms=10.0, predicted_ms=9.0, decode=("a",), prefill={"b": 7}, parked=("c",), waiting=2)


def arrive(writer: EventWriter, rid: str) -> None:
    writer.arrive(
        t_s=1.0,
        rid=rid,
        program="p1",
        stage="solve/act",
        tier="standard",
        declined=False,
        prompt_tokens=12,
        ttft_target_ms=200.0,
        tpot_target_ms=None,
        deadline_s=None,
        reason="",
    )


def test_events_come_back_typed_and_in_order(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "new" / "events.jsonl")
    arrive(writer, "a")
    writer.step(t_s=2.0, context_tokens=30, **STEP)
    writer.finish(t_s=3.0, rid="a", output_tokens=4, receipt={"attained": True})
    writer.kept(t_s=4.0, rid="a", kept_ms=900.0, gap_ms=900.0)
    writer.close()
    assert read_events(tmp_path / "new" / "events.jsonl") == [
        Arrive(
            t_s=1.0,
            rid="a",
            program="p1",
            stage="solve/act",
            tier="standard",
            prompt_tokens=12,
            ttft_target_ms=200.0,
        ),
        Step(t_s=2.0, context_tokens=30, **STEP),
        Finish(t_s=3.0, rid="a", output_tokens=4, receipt={"attained": True}),
        Kept(t_s=4.0, rid="a", kept_ms=900.0, gap_ms=900.0),
    ]


def test_lines_gather_until_half_a_second_an_end_or_a_flush(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path)

    def seen() -> int:
        return len(read_events(path))

    writer.step(t_s=10.0, context_tokens=0, **STEP)
    assert seen() == 1
    arrive(writer, "a")
    writer.step(t_s=10.4, context_tokens=0, **STEP)
    assert seen() == 1
    writer.step(t_s=10.5, context_tokens=0, **STEP)
    assert seen() == 4
    arrive(writer, "b")
    writer.finish(t_s=10.6, rid="a", output_tokens=1, receipt={})
    assert seen() == 6
    writer.step(t_s=10.7, context_tokens=0, **STEP)
    writer.flush()
    assert seen() == 7
    writer.close()
    writer.step(t_s=99.0, context_tokens=0, **STEP)
    assert seen() == 7


def test_off_means_nothing_at_all(tmp_path: Path) -> None:
    writer = EventWriter(None)
    assert not writer.on
    arrive(writer, "a")
    writer.finish(t_s=1.0, rid="a", output_tokens=1, receipt={"not": object()})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_switches_it_off_and_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    writer = EventWriter("/dev/full")
    writer.finish(t_s=1.0, rid="a", output_tokens=1, receipt={})
    assert not writer.on
    assert "events are off" in caplog.text
    writer.finish(t_s=1.0, rid="a", output_tokens=1, receipt={})


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"events=.*can't be written"):
        EventWriter(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("hello", "Invalid JSON"),
        ('{"kind":"dance"}', "dance"),
        ('{"kind":"finish","t_s":1,"output_tokens":3}', "finish.rid: Field required"),
        ('{"kind":"step","t_s":"soon","measured_ms":3}', "step.t_s"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind":"step","t_s":1,"measured_ms":3}\n' + line + "\n")
    with pytest.raises(ValueError, match=says) as caught:
        read_events(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_unknown_fields_and_a_last_line_in_the_making_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind":"step","t_s":1,"measured_ms":3,"draft_tokens":5}\n{"kind":"step","t_')
    assert read_events(path) == [Step(t_s=1, measured_ms=3)]
    with pytest.raises(ValueError, match=r"absent\.jsonl: No such file"):
        read_events(tmp_path / "absent.jsonl")


def test_rows_of_a_hand_made_run() -> None:
    def step(t_s: float, **what: object) -> Step:
        return Step(t_s=t_s, measured_ms=100.0, **what)

    rows = timeline_rows(
        [
            Arrive(t_s=0.5, rid="slow", tier="best_effort", declined=True, prompt_tokens=9),
            Arrive(
                t_s=1.0,
                rid="r2",
                program="tools-1234",
                stage="solve/final",
                tier="standard",
                prompt_tokens=8,
                ttft_target_ms=250.0,
                tpot_target_ms=100.0,
            ),
            Arrive(
                t_s=0.9,
                rid="r1",
                program="tools-1234",
                stage="solve/act",
                tier="standard",
                prompt_tokens=5,
                ttft_target_ms=100.0,
                deadline_s=9.0,
            ),
            step(1.0, prefill={"r2": 5, "r1": 5}),
            step(1.2, prefill={"r2": 3}, parked=("r1",)),
            step(1.3, prefill={"slow": 4}, parked=("r1", "r2")),
            step(1.4, decode=("r1", "r2")),
            step(1.5, decode=("r2",), parked=("r1",)),
            Finish(t_s=1.6, rid="r2", output_tokens=3, receipt={"attained": True, "phases": "answer"}),
        ]
    )
    assert [row.rid for row in rows] == ["r1", "r2", "slow"]
    first, second, slow = rows
    assert (first.label, second.label, slow.label) == ("tools-12/act", "tools-12/final", "slow")

    assert first.prefill == ((1.0, 1.1, 5),)
    assert first.decode_s == (1.5,)
    assert first.parked == ((1.2, pytest.approx(1.4)), (1.5, 1.6))
    assert first.first_due_s == pytest.approx(1.0)
    assert first.first_kept is False  # 1.1 s: past 0.9 s + 105 ms
    assert (first.final_due_s, first.final_kept, first.finish_s, first.attained) == (9.0, None, None, None)

    assert second.prefill == ((1.0, 1.1, 5), (1.2, pytest.approx(1.3), 3))
    assert second.decode_s == (1.5, 1.6)
    assert second.parked == ((1.3, pytest.approx(1.4)),)
    assert (second.first_due_s, second.first_kept) == (1.25, False)
    assert second.final_due_s == pytest.approx(1.5)  # first token at 1.3 s, two more at 100 ms
    assert (second.final_kept, second.attained) == (False, True)

    assert (slow.best_effort, slow.declined) == (True, True)
    assert slow.prefill == ((1.3, pytest.approx(1.4), 4),)
    assert (slow.first_due_s, slow.first_kept, slow.final_due_s) == (None, None, None)


def test_tolerance_of_deadlines_is_that_of_attainment() -> None:
    def verdict(first_token_s: float) -> bool | None:
        (row,) = timeline_rows(
            [
                Arrive(t_s=0.0, rid="a", tier="standard", prompt_tokens=1, ttft_target_ms=100.0),
                Step(t_s=0.0, measured_ms=first_token_s * 1e3, prefill={"a": 1}),
                Finish(t_s=1.0, rid="a", output_tokens=1),
            ]
        )
        return row.first_kept

    assert verdict(0.1049) is True
    assert verdict(0.1051) is False


def test_the_tier_is_the_one_a_request_ended_with() -> None:
    (row,) = timeline_rows(
        [
            Arrive(t_s=0.0, rid="a", tier="best_effort", declined=True, prompt_tokens=1),
            Finish(t_s=1.0, rid="a", output_tokens=0, receipt={"tier": "standard", "declined": False}),
        ]
    )
    assert (row.best_effort, row.declined) == (False, False)


def test_thinking_has_a_pace_of_its_own_so_the_answer_s_pace_sets_no_last_deadline() -> None:
    (row,) = timeline_rows(
        [
            Arrive(t_s=0.0, rid="a", tier="standard", prompt_tokens=1, tpot_target_ms=50.0),
            Step(t_s=0.0, measured_ms=10, prefill={"a": 1}),
            Finish(t_s=1.0, rid="a", output_tokens=9, receipt={"phases": "think,answer"}),
        ]
    )
    assert row.final_due_s is None


@pytest.mark.parametrize("window_s", [None, (1.0, 2.0)])
def test_a_picture_is_drawn(tmp_path: Path, window_s: tuple[float, float] | None) -> None:
    path = tmp_path / "timeline.png"
    draw_timeline(synthetic_events(seed=1), path, window_s=window_s)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert (int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")) == (1600, 1000)


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no request"):
        draw_timeline([], tmp_path / "timeline.png")
    with pytest.raises(ValueError, match=r"window_s=\(900.0, 901.0\) holds no request"):
        draw_timeline(synthetic_events(seed=1), tmp_path / "timeline.png", window_s=(900.0, 901.0))


def synthetic_events(*, seed: int, requests: int = 28) -> list[Event]:
    """A crude deadline scheduler on a made-up server: enough of everything the picture can show."""
    rng = random.Random(seed)
    arrivals: list[Arrive] = []
    for number in range(requests):
        best_effort = number % 4 == 3
        arrivals.append(
            Arrive(
                t_s=1000 + rng.random() * 5,
                rid=f"{rng.getrandbits(32):08x}",
                program=None if best_effort else f"{'agent' if number % 2 else 'think'}-{number // 4}",
                stage=None if best_effort else rng.choice(("solve/act", "solve/final", "reply")),
                tier="best_effort" if best_effort else "standard",
                declined=number % 12 == 7,
                prompt_tokens=rng.randint(40, 700),
                ttft_target_ms=None if best_effort else rng.choice((120.0, 250.0, 500.0)),
                tpot_target_ms=None if best_effort else rng.choice((50.0, 100.0)),
            )
        )
    arrivals.sort(key=lambda a: a.t_s)
    left = {a.rid: a.prompt_tokens for a in arrivals}
    output = {a.rid: rng.randint(8, 60) for a in arrivals}
    due = {a.rid: a.t_s + (a.ttft_target_ms or 9e6) / 1e3 for a in arrivals}
    pace = {a.rid: (a.tpot_target_ms or 200.0) / 1e3 for a in arrivals}
    made: dict[str, int] = {}
    events: list[Event] = []
    now_s, coming = arrivals[0].t_s, list(arrivals)
    while coming or left:
        while coming and coming[0].t_s <= now_s:
            events.append(coming.pop(0))
        here = [a.rid for a in events if isinstance(a, Arrive) and a.rid in left]
        running = sorted((rid for rid in here if rid in made), key=due.__getitem__)
        waiting = sorted((rid for rid in here if rid not in made), key=due.__getitem__)
        decode = [rid for rid in running if due[rid] < now_s + 0.03]
        budget, prefill = 160, {}
        for rid in waiting:
            if budget > 0:
                prefill[rid] = min(budget, left[rid])
                budget -= prefill[rid]
        if not (decode or prefill or running):
            now_s = coming[0].t_s if coming else now_s + 0.01
            continue
        decode = decode or running[:1]
        predicted_ms = 6.5 + 0.09 * sum(prefill.values()) + 0.4 * len(decode)
        measured_ms = predicted_ms * rng.lognormvariate(0, 0.09)
        events.append(
            Step(
                t_s=now_s,
                measured_ms=measured_ms,
                predicted_ms=predicted_ms,
                decode=tuple(decode),
                prefill=prefill,
                parked=tuple(rid for rid in running if rid not in decode),
                waiting=len(waiting),
            )
        )
        now_s += measured_ms / 1e3
        for rid in decode:
            made[rid] += 1
            due[rid] = max(due[rid], now_s - pace[rid]) + pace[rid]
        for rid, chunk in prefill.items():
            left[rid] -= chunk
            if left[rid] == 0:
                made[rid] = 1
                due[rid] = max(now_s, min(due[rid], now_s + 9)) + pace[rid]
        for rid in [rid for rid in made if rid in left and made[rid] >= output[rid]]:
            del left[rid]
            attained = rng.random() > 0.1
            events.append(Finish(t_s=now_s, rid=rid, output_tokens=output[rid], receipt={"attained": attained}))
    return events
