"""Scenarios: the statistics of the paper's tables, rates that only stretch time, seeds, readers of traces."""

import statistics
from dataclasses import replace

import pytest

from slos_sglang.slo import presets
from slos_sglang.workloads.scenarios import SCENARIOS, TOOL_CALLS, Draw, at_rate, at_rates, programs_of, scenario
from slos_sglang.workloads.traces import data_dir, read_azure, read_mooncake

try:
    DATA = data_dir()
except ValueError:
    DATA = None
needs_data = pytest.mark.skipif(DATA is None, reason="no published traces: set SLOS_SGLANG_DATA to their folder")
GENERATED = ("toolllm", "reasoning")
NAMES = [name if name in GENERATED else pytest.param(name, marks=needs_data) for name in SCENARIOS]


def stages(name, **draw):
    return [stage for program in scenario(name, Draw(**draw)) for stage in program.stages]


def mean(name, of):
    return statistics.fmean(getattr(stage, name) for stage in of)


def p99(name, of):
    return sorted(getattr(stage, name) for stage in of)[round(0.99 * len(of)) - 1]


@needs_data
@pytest.mark.parametrize(
    ("name", "programs", "prompt_tokens", "output_tokens"),
    [("coder", 559, 847, 27), ("chatbot", 1391, 763, 267), ("summarizer", 600, 1333, 203)],
)
def test_trace_scenarios_have_the_tables_means(name, programs, prompt_tokens, output_tokens):
    of = stages(name)
    assert len(of) == programs
    # Within 1 %; the table rounds to whole tokens.
    assert mean("prompt_tokens", of) == pytest.approx(prompt_tokens, rel=0.01)
    assert mean("output_tokens", of) == pytest.approx(output_tokens, rel=0.01, abs=0.5)


@pytest.mark.parametrize("seed", [0, 1])
def test_generated_lengths_have_the_tables_mean_p99_and_spread(seed):
    tools, reasoning = stages("toolllm", seed=seed), stages("reasoning", seed=seed)
    for of, field, average, tail, spread in (
        (tools, "prompt_tokens", 690, 2131, 356),
        (tools, "output_tokens", 116, 363, 66),
        (reasoning, "prompt_tokens", 127, 421, 83),
    ):
        assert mean(field, of) == pytest.approx(average, rel=0.01)
        assert p99(field, of) == pytest.approx(tail, rel=0.04)
        assert statistics.pstdev(getattr(s, field) for s in of) == pytest.approx(spread, rel=0.02)
    assert mean("think_tokens", reasoning) == pytest.approx(4693, rel=0.01)
    assert mean("output_tokens", reasoning) == pytest.approx(4693 + 803, rel=0.01)


def test_tool_programs_are_conversations():
    programs = scenario("toolllm", Draw())
    assert tuple(sum(len(p.stages) == calls + 1 for p in programs) for calls in range(7)) == TOOL_CALLS
    for program in programs:
        *loops, final = program.stages
        assert {(s.name, s.tpot_ms) for s in loops} <= {("act", 50)}
        assert (final.name, final.tpot_ms, final.after_s) == ("final", 100, 0)
        for before, stage in zip(program.stages, program.stages[1:], strict=False):
            assert stage.prompt_tokens >= before.prompt_tokens
            assert 0 < stage.cached_tokens <= before.prompt_tokens + before.output_tokens
    gaps = sorted(s.after_s for p in programs for s in p.stages[:-1])
    assert gaps[len(gaps) // 2] == pytest.approx(0.3, rel=0.1)
    assert gaps[int(len(gaps) * 0.9)] == pytest.approx(13.6, rel=0.2)
    assert gaps[-1] <= 220
    uncached = scenario("toolllm", Draw(prefix_cache=False))
    assert all(s.cached_tokens == 0 for p in uncached for s in p.stages)
    assert [len(p.stages) for p in uncached] == [len(p.stages) for p in programs]


@pytest.mark.parametrize("name", NAMES)
def test_programs_arrive_at_the_rate_in_order_and_like_before(name):
    programs = scenario(name, Draw(programs=150, seed=5))
    assert programs == scenario(name, Draw(programs=150, seed=5))
    assert programs != scenario(name, Draw(programs=150, seed=6))
    assert len({p.id for p in programs}) == len(programs) == 150
    arrivals = [p.arrival_s for p in programs]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] >= 0 and 110 < arrivals[-1] <= 150
    fast = at_rate(programs, 4.0)
    assert [p.stages for p in fast] == [p.stages for p in programs]
    assert [p.arrival_s for p in fast] == pytest.approx([at / 4 for at in arrivals])


def test_rates_that_change_bring_a_burst():
    """2 a second for 10 s, 20 a second for 5 s, then 1 a second: the 20th, 120th and 125th at 10, 15 and 20 s."""
    base = scenario("toolllm", Draw(programs=130))
    even = [replace(program, arrival_s=float(number)) for number, program in enumerate(base)]
    burst = at_rates(even, [(10, 2), (5, 20), (1, 1)])
    assert [burst[n].arrival_s for n in (1, 20, 120, 125)] == pytest.approx([0.5, 10, 15, 20])
    assert [p.stages for p in burst] == [p.stages for p in base]
    assert [p.arrival_s for p in at_rates(base, [(3, 4.0)])] == pytest.approx([p.arrival_s for p in at_rate(base, 4.0)])
    for wrong in ([], [(0, 1)], [(1, -1)]):
        with pytest.raises(ValueError, match="phases must be"):
            at_rates(base, wrong)


@needs_data
def test_seed_0_is_the_trace_as_recorded_and_others_deal_it_anew():
    recorded, dealt = scenario("coder", Draw()), scenario("coder", Draw(seed=1))
    assert [p.arrival_s for p in recorded] == [p.arrival_s for p in dealt]
    lengths = [[p.stages[0].prompt_tokens for p in programs] for programs in (recorded, dealt)]
    assert lengths[0] != lengths[1]
    assert sorted(lengths[0]) == sorted(lengths[1])
    again = scenario("coder", Draw(programs=1200))
    arrivals = [p.arrival_s for p in again]
    assert arrivals == sorted(arrivals)
    assert len(again) == 1200 and 1100 < arrivals[-1] <= 1200
    other = scenario("coder", Draw(window_start_s=0))
    assert len(other) == 455


@needs_data
def test_mixed_is_a_third_of_each():
    programs = scenario("mixed", Draw(programs=300))
    for app in ("coder", "chatbot", "summarizer"):
        part = [p for p in programs if p.app == app]
        assert len(part) == 100
        assert part[-1].arrival_s > 200


@pytest.mark.parametrize(
    ("name", "draw", "says"),
    [
        ("chat", Draw(), "scenario must be one of .*'chat'"),
        ("toolllm", Draw(programs=0), "programs must be at least 1, not 0"),
    ],
)
def test_wrong_scenarios_are_refused(name, draw, says):
    with pytest.raises(ValueError, match=says):
        scenario(name, draw)


def test_missing_data_is_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no file named azure_2023_code"):
        scenario("coder", Draw(data=tmp_path))
    monkeypatch.setenv("SLOS_SGLANG_DATA", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="data must be a folder"):
        scenario("coder", Draw())
    with pytest.raises(ValueError, match=r"rate_req_s must be greater than 0, not 0"):
        at_rate([], 0)


def test_azure_traces(tmp_path):
    file = tmp_path / "t.csv"
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    file.write_text(f"{head}2023-11-16 18:17:04.5000000,9,8\n2023-11-16 18:17:03.2500000,7,6\n", encoding="utf-8")
    calls = read_azure(file)
    assert [(c.arrival_s, c.prompt_tokens, c.output_tokens) for c in calls] == [(0.0, 7, 6), (1.25, 9, 8)]
    assert [p.id for p in programs_of("x", calls, presets.CODING)] == ["x-0000", "x-0001"]
    for wrong in ("2023-11-16 18:17:04.5,nine,8", "yesterday,9,8", "2023-11-16 18:17:04.5,9,0", "2023-11-16 18:17:04"):
        file.write_text(f"{head}2023-11-16 18:17:03.25,7,6\n{wrong}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"t\.csv, line 3: "):
            read_azure(file)


def test_mooncake_traces_count_leading_blocks_that_were_seen(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text(
        '{"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]}\n'
        '{"timestamp": 3500, "input_length": 1600, "output_length": 7, "hash_ids": [1, 2, 9, 3]}\n'
        '{"timestamp": 4000, "input_length": 1024, "output_length": 7, "hash_ids": [1, 2]}\n',
        encoding="utf-8",
    )
    first, second, third = read_mooncake(file)
    assert (first.arrival_s, first.cached_tokens) == (0.0, 0)
    assert (second.arrival_s, second.prompt_tokens, second.cached_tokens) == (2.5, 1600, 1024)
    assert third.cached_tokens == 1023
    file.write_text('{"timestamp": 1, "input_length": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"m\.jsonl, line 1: no field 'output_length'"):
        read_mooncake(file)
