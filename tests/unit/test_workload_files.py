"""Workload files: what was written comes back, and whatever is wrong is told with file, line, field and value."""

import json
from pathlib import Path

import pytest

from slos_sglang.workloads.files import read_workload, write_workload
from slos_sglang.workloads.program import Program, Stage

TWO_TURNS = Program(
    id="p17",
    arrival_s=3.52,
    app="toolllm",
    stages=(
        Stage(name="act", prompt_tokens=690, output_tokens=116, ttft_slowdown=3.0, tpot_ms=50.0, after_s=0.8),
        Stage(name="final", prompt_tokens=910, cached_tokens=806, output_tokens=64, ttft_slowdown=3.0, tpot_ms=100.0),
    ),
)
THINKS = Program(
    id="p18",
    arrival_s=3.52,
    app="reasoning",
    stages=(Stage(name="answer", prompt_tokens=9, output_tokens=40, think_tokens=30, ttft_ms=500, think_tpot_ms=50),),
)
GOOD = {"id": "a", "arrival_s": 1.0, "app": "chat", "stages": [{"name": "s", "prompt_tokens": 5, "output_tokens": 2}]}


def test_reading_back_gives_the_same_programs(tmp_path):
    write_workload([TWO_TURNS, THINKS], tmp_path / "w.jsonl")
    assert read_workload(tmp_path / "w.jsonl") == [TWO_TURNS, THINKS]


def test_the_published_example_is_understood(tmp_path):
    file = tmp_path / "w.jsonl"
    file.write_text(
        '{"id": "p17", "arrival_s": 3.52, "app": "toolllm", "stages": ['
        '{"name": "act", "prompt_tokens": 690, "cached_tokens": 0, "output_tokens": 116, "think_tokens": 0,'
        ' "ttft_slowdown": 3.0, "tpot_ms": 50.0, "think_tpot_ms": null, "after_s": 0.8},'
        '{"name": "final", "prompt_tokens": 910, "cached_tokens": 806, "output_tokens": 64,'
        ' "ttft_slowdown": 3.0, "tpot_ms": 100.0}]}\n\n',
        encoding="utf-8",
    )
    assert read_workload(file) == [TWO_TURNS]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arrival_s": -1}, "arrival_s must not be negative, not -1"),
        ({"arrival_s": "1"}, "arrival_s must be a finite number, not '1'"),
        ({"arrival_s": 0.5}, "arrival_s must not be less than the line before's 1.0, not 0.5"),
        ({"id": "a"}, "id 'a' was given to an earlier program"),
        ({"id": ""}, "id must be a non-empty text, not ''"),
        ({"rate": 3}, "unknown key 'rate'"),
        ({"stages": []}, "stages must hold at least one stage"),
        ({"stages": {}}, "stages must be a list of objects, not {}"),
        ({"stages": [3]}, "stages[0]: a stage must be an object, not 3"),
        ({"stages": [{"name": "s", "output_tokens": 2}]}, "stages[0]: the stage has no prompt_tokens"),
        ({"prompt_tokens": 0}, "stages[0]: prompt_tokens must be a whole number of at least 1, not 0"),
        ({"prompt_tokens": 5.0}, "stages[0]: prompt_tokens must be a whole number of at least 1, not 5.0"),
        ({"output_tokens": True}, "stages[0]: output_tokens must be a whole number of at least 1, not True"),
        ({"cached_tokens": 5}, "stages[0]: cached_tokens must be less than prompt_tokens (5), not 5"),
        ({"think_tokens": 3}, "stages[0]: think_tokens must be at most output_tokens (2), not 3"),
        ({"tpot_ms": 0}, "stages[0]: tpot_ms must be greater than 0, not 0"),
        ({"value": -2}, "stages[0]: value must be greater than 0, not -2"),
        ({"after_s": -0.1}, "stages[0]: after_s must not be negative, not -0.1"),
        ({"after_s": float("nan")}, "stages[0]: after_s must be a finite number, not nan"),
        ({"ttft_ms": 9, "ttft_slowdown": 3}, "stages[0]: set at most one of ttft_ms (9) and ttft_slowdown (3)"),
        ({"tpot": 9}, "stages[0]: the stage has an unknown key 'tpot' (value 9); did you mean 'tpot_ms'?"),
    ],
    ids=str,
)
def test_wrong_programs_are_told_by_file_line_field_and_value(tmp_path, change, says):
    stage_change = {key: value for key, value in change.items() if key not in ("arrival_s", "id", "rate", "stages")}
    wrong = {**GOOD, "id": "b", "stages": [{**GOOD["stages"][0], **stage_change}]}
    wrong |= {key: value for key, value in change.items() if key not in stage_change}
    file = tmp_path / "w.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(wrong)}\n", encoding="utf-8")
    with pytest.raises(ValueError) as told:
        read_workload(file)
    assert str(told.value).startswith(f"{file}, line 3: ")
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def test_what_is_no_workload_is_refused(tmp_path):
    file = tmp_path / "w.jsonl"
    for text, says in (("", "holds no program"), ("{\n", "line 1: not JSON"), ("[]\n", "line 1: a program must be")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=says):
            read_workload(file)
    with pytest.raises(ValueError, match=r"missing\.jsonl: can't be read"):
        read_workload(tmp_path / "missing.jsonl")


def test_a_stage_beyond_the_kv_capacity_is_named(tmp_path):
    write_workload([THINKS, TWO_TURNS], tmp_path / "w.jsonl")
    assert len(read_workload(tmp_path / "w.jsonl", kv_tokens=974)) == 2
    with pytest.raises(ValueError, match=r"line 2: stage 'final'.*910.*64.*973"):
        read_workload(tmp_path / "w.jsonl", kv_tokens=973)


def test_the_wire_form_carries_the_targets():
    wire = THINKS.stages[0].wire("p18")
    assert (wire.program, wire.stage, wire.ttft_ms, wire.think_tpot_ms) == ("p18", "answer", 500, 50)
    assert wire.think_end == "</think>"


def test_the_example_of_the_documentation_is_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "simulation.md").read_text(encoding="utf-8")
    example = page.split("```json\n")[1].split("```")[0]
    file = tmp_path / "w.jsonl"
    file.write_text(example.replace("\n", " "), encoding="utf-8")
    (program,) = read_workload(file)
    assert [stage.name for stage in program.stages] == ["act", "final"]
