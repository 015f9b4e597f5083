"""SLOs, their wire form and headers: what is well formed survives unchanged, what isn't is refused by name."""

import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_sglang.slo import (
    HEADERS,
    SLO,
    WIRE_KEYS,
    Phase,
    WireSLO,
    decode_phases,
    encode_phases,
    nearest,
    parse_headers,
    parse_wire,
    presets,
)

POSITIVE = ("ttft_ms", "ttft_slowdown", "tpot_ms", "think_tpot_ms", "answer_ttft_ms", "value")
REST = ("rest_calls", "rest_prompt_tokens", "rest_output_tokens", "rest_gaps_ms", "gap_ms")
positive = st.one_of(st.integers(1, 10**9), st.floats(min_value=1e-6, max_value=1e9))
ONE_OR_TWO = ("tpot_ms", "think_tpot_ms", "think_end", "answer_ttft_ms")
finite = st.one_of(st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False))
texts = st.text(min_size=1, max_size=8)
not_a_number = st.one_of(
    st.booleans(),
    st.sampled_from([math.nan, math.inf, -math.inf, 10**400, -(10**400)]),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
)


@st.composite
def phase_lists(draw) -> list[Phase]:
    names = draw(st.lists(st.from_regex(r"[a-z_-]{1,6}", fullmatch=True), min_size=1, max_size=5, unique=True))
    return [
        Phase(
            name=name,
            tpot_ms=draw(st.none() | positive),
            first_ms=draw(st.none() | positive) if number else None,
            until=draw(texts) if number < len(names) - 1 else None,
        )
        for number, name in enumerate(names)
    ]


@st.composite
def wires(draw) -> WireSLO:
    optional = {
        "program": texts,
        "stage": texts,
        "tpot_ms": positive,
        "think_tpot_ms": positive,
        "think_end": texts,
        "answer_ttft_ms": positive,
        "budget_ms": finite,
        **dict.fromkeys(REST, st.floats(0, 1e9)),
        draw(st.sampled_from(["ttft_ms", "ttft_slowdown"])): positive,
    }
    given = {name: draw(strategy) for name, strategy in optional.items() if draw(st.booleans())}
    if draw(st.booleans()):
        of_phases = {"phases": encode_phases(draw(phase_lists()))}
        given = {key: value for key, value in given.items() if key not in ONE_OR_TWO} | of_phases
    return WireSLO(**given, value=draw(positive), on_decline=draw(st.sampled_from(["best_effort", "reject"])))


@given(wires())
def test_the_wire_form_survives_json_and_parsing(wire):
    body = json.loads(json.dumps(wire.to_dict()))
    assert parse_wire(body) == wire
    assert set(body) <= set(WIRE_KEYS)
    assert all(isinstance(value, str | int | float) for value in body.values())


@given(wires())
def test_unset_targets_may_be_sent_as_null(wire):
    assert parse_wire({name: getattr(wire, name) for name in WIRE_KEYS}) == wire


@given(st.sampled_from(POSITIVE), st.one_of(not_a_number, st.floats(max_value=0), st.integers(max_value=0)))
def test_targets_must_be_positive_numbers(name, value):
    for make in (lambda: SLO(**{name: value}), lambda: parse_wire({name: value})):
        with pytest.raises(ValueError) as error:
            make()
        assert f"slo.{name} must be a finite number" in str(error.value)
        assert repr(value) in str(error.value)


@given(not_a_number)
def test_budgets_must_be_numbers(value):
    with pytest.raises(ValueError, match=r"slo\.budget_ms must be a finite number"):
        parse_wire({"budget_ms": value})
    with pytest.raises(ValueError, match=r"slo\.e2e_ms must be a finite number"):
        SLO(e2e_ms=value)


@given(st.floats(max_value=0, allow_nan=False, allow_infinity=False))
def test_a_spent_budget_is_well_formed_but_a_program_cannot_ask_for_one(value):
    assert parse_wire({"budget_ms": value}).budget_ms == value
    with pytest.raises(ValueError, match=r"slo\.e2e_ms"):
        SLO(e2e_ms=value)


@given(st.text(max_size=12).filter(lambda key: key not in WIRE_KEYS))
def test_unknown_keys_are_named_with_their_value(key):
    with pytest.raises(ValueError) as error:
        parse_wire({key: 5, "tpot_ms": 50})
    assert f"unknown key {key!r} (value 5)" in str(error.value)


@pytest.mark.parametrize(
    "key, known",
    [
        ("tpot", "tpot_ms"),
        ("ttft", "ttft_ms"),
        ("slowdown", "ttft_slowdown"),
        ("e2e_ms", "budget_ms"),
        ("stag", "stage"),
    ],
)
def test_unknown_keys_come_with_the_nearest_known_one(key, known):
    with pytest.raises(ValueError, match=f"did you mean '{known}'"):
        parse_wire({key: 1})


def test_an_unknown_key_near_nothing_lists_the_known_ones():
    with pytest.raises(ValueError, match="known keys: program, stage, "):
        parse_wire({"zzzz": 1})


@pytest.mark.parametrize("body", [None, 5, "fast", [1], True])
def test_a_body_must_be_an_object(body):
    with pytest.raises(ValueError, match="slo must be an object"):
        parse_wire(body)


@pytest.mark.parametrize(
    "body, message",
    [
        ({"ttft_ms": 1, "ttft_slowdown": 2}, "slo.ttft_ms (1) and slo.ttft_slowdown (2)"),
        ({"think_end": ""}, "slo.think_end must be a non-empty text, not ''"),
        ({"think_end": 5}, "slo.think_end must be a non-empty text, not 5"),
        ({"on_decline": "drop"}, "slo.on_decline must be 'best_effort' or 'reject', not 'drop'"),
        ({"on_decline": ["reject"]}, "slo.on_decline must be 'best_effort' or 'reject', not ['reject']"),
        ({"program": 5}, "slo.program must be a text, not 5"),
        ({"stage": ["a"]}, "slo.stage must be a text, not ['a']"),
    ],
)
def test_other_wrong_values(body, message):
    with pytest.raises(ValueError) as error:
        parse_wire(body)
    assert message in str(error.value)


@given(st.dictionaries(st.sampled_from(sorted(HEADERS)), positive, max_size=5))
def test_headers_carry_milliseconds(values):
    slo = parse_headers({name: str(value) for name, value in values.items()})
    if not values:
        assert slo is None
        return
    for key in ("ttft_ms", "tpot_ms"):
        sent = [values[name] for name in HEADERS if HEADERS[name] == key and name in values]
        assert getattr(slo, key) == (pytest.approx(sent[0]) if sent else None)


@pytest.mark.parametrize("text", ["", "fast", "10ms", "1,5", "nan", "inf", "-1", "0"])
@pytest.mark.parametrize("header", sorted(HEADERS))
def test_wrong_headers_are_refused(header, text):
    with pytest.raises(ValueError) as error:
        parse_headers({header: text})
    assert header in str(error.value) and text in str(error.value)


def test_other_headers_are_ignored():
    assert parse_headers({"content-type": "application/json", "x-slo-tpot": "5"}) is None


def test_thinking_ends_at_the_usual_text_unless_told():
    assert SLO(think_tpot_ms=5).think_end == WireSLO(think_tpot_ms=5).think_end == "</think>"
    assert SLO(think_tpot_ms=5, think_end="<|end|>").think_end == "<|end|>"
    assert SLO(tpot_ms=5).think_end is None


def test_constrained_means_a_target_is_set():
    assert not WireSLO(program="p", stage="s", value=3).constrained
    assert all(WireSLO(**{name: 1}).constrained for name in (*POSITIVE[:-1], "budget_ms"))


@given(phase_lists())
def test_phases_survive_as_one_text(phases):
    text = encode_phases(phases)
    assert decode_phases(text) == tuple(phases) and text.count(";") == len(phases) - 1
    slo = SLO.phases(phases, ttft_ms=5)
    assert WireSLO(phases=encode_phases(slo.phase_list), ttft_ms=5).all_phases == tuple(phases)


def test_phases_as_another_client_would_write_them():
    text = "name=think&tpot_ms=50&until=%3C%2Fthink%3E;name=answer&first_ms=2e3"
    assert decode_phases(text) == (
        Phase(name="think", tpot_ms=50, until="</think>"),
        Phase(name="answer", first_ms=2000),
    )


def test_thinking_and_answer_are_two_phases():
    assert WireSLO(tpot_ms=5).all_phases == (Phase(name="answer", tpot_ms=5),)
    assert WireSLO(think_tpot_ms=7, tpot_ms=5, answer_ttft_ms=900).all_phases == (
        Phase(name="think", tpot_ms=7, until="</think>"),
        Phase(name="answer", tpot_ms=5, first_ms=900),
    )


THINK = Phase(name="think", until="x")
ANSWER = Phase(name="answer")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SLO.phases([]), "slo.phases must be at least one, not []"),
        (lambda: SLO.phases([THINK]), "slo.phases: think: until must be None in the last phase, not 'x'"),
        (lambda: SLO.phases([ANSWER, THINK]), "slo.phases: answer: until must say which text ends it, not None"),
        (lambda: SLO.phases([THINK, THINK, ANSWER]), "slo.phases: a name must be there once, not 2 times: 'think'"),
        (lambda: SLO.phases(["think"]), "slo.phases must be of Phase, not 'think'"),
        (lambda: SLO.phases([THINK, ANSWER], tpot_ms=5), "slo.tpot_ms (5) is not for a call of named phases"),
        (lambda: SLO.phases([THINK, ANSWER], think_end="x"), "slo.think_end ('x') is not for a call of named phases"),
        (lambda: SLO.phases([Phase(name="a", first_ms=5)]), "slo.phases: a: first_ms must be None in the first phase"),
        (lambda: Phase(name="a,b"), "slo.phases: a name must be of letters, digits, _ and -, not 'a,b'"),
        (lambda: Phase(name="a", tpot_ms=-5), "slo.phases: a: tpot_ms must be greater than 0, not -5"),
        (lambda: Phase(name="a", until=""), "slo.phases: a: until must be a non-empty text, not ''"),
        (lambda: decode_phases("name=a&tpot=5"), "unknown key 'tpot' (value '5'); did you mean 'tpot_ms'?"),
        (lambda: decode_phases("name=a&zzz=5"), "known keys: name, tpot_ms, first_ms, until"),
        (lambda: decode_phases("name=a&tpot_ms=fast"), "slo.phases: tpot_ms must be a number, not 'fast'"),
        (lambda: decode_phases("tpot_ms=5"), "slo.phases: a name must be of letters, digits, _ and -, not ''"),
        (lambda: decode_phases("think"), "slo.phases: a phase must be written key=value&key=value, not 'think'"),
        (lambda: parse_wire({"phases": 5}), "slo.phases must be a non-empty text, not 5"),
        (lambda: parse_wire({"phases": "name=a&tpot_ms=nan"}), "tpot_ms must be a finite number, not nan"),
    ],
)
def test_wrong_phases_are_named(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


@given(st.sampled_from(REST), st.one_of(not_a_number, st.floats(max_value=-1e-9), st.integers(max_value=-1)))
def test_what_remains_is_no_less_than_nothing(name, value):
    with pytest.raises(ValueError, match=rf"slo\.{name} must be a finite number"):
        parse_wire({name: value})


def test_slos_are_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        SLO().tpot_ms = 5
    with pytest.raises(TypeError):
        SLO(5)


def test_the_wire_has_every_target_of_the_program_side():
    assert {f.name for f in fields(SLO)} - {"e2e_ms", "phase_list"} <= set(WIRE_KEYS)


def test_presets_are_those_of_the_interface():
    def classes(slo):
        return slo.ttft_slowdown, slo.think_tpot_ms, slo.tpot_ms

    assert {name: classes(slo) for name, slo in vars(presets).items()} == {
        "SUMMARIZATION": (3, None, 100),
        "CODING": (5, None, 50),
        "CHATBOT": (5, None, 100),
        "TOOL_LOOP": (3, None, 50),
        "TOOL_FINAL": (3, None, 100),
        "REASONING": (3, 50, 100),
    }


def test_nearest():
    assert nearest("tool_agnt", ("tool_agent", "reasoning")) == "tool_agent"
    assert nearest("zzz", ("tool_agent", "reasoning")) is None
