"""The operator's file: what it sets, how it bounds what clients ask for, and what it says when it is wrong."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_sglang.engine.config import SLOClass, SLOConfig, config_from_env, load_config
from slos_sglang.slo import WireSLO, parse_wire


def written(folder: Path, text: str) -> Path:
    file = folder / "slo.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_no_file_and_an_empty_file_give_the_defaults(tmp_path: Path) -> None:
    assert load_config(None) == load_config(written(tmp_path, "# nothing set\n")) == SLOConfig()


def test_a_full_file(tmp_path: Path) -> None:
    config = load_config(
        written(
            tmp_path,
            """
            default_slo: {tpot_ms: 200}
            best_effort_max_wait_s: 2
            admission: edf_sim
            events: /tmp/events.jsonl
            classes:
              - {stage: "chat*", min_ttft_ms: 300, min_tpot_ms: 40, max_value: 2}
              - {stage: "*", min_tpot_ms: 100}
            """,
        )
    )
    assert config.best_effort_max_wait_s == 2 and config.admission == "edf_sim"
    assert config.effective(None) == {"tpot_ms": 200, "value": 1.0, "on_decline": "best_effort"}
    clamped = config.effective(WireSLO(stage="chat/act", ttft_ms=100, tpot_ms=10, think_tpot_ms=50, value=9))
    assert clamped is not None
    assert (clamped["ttft_ms"], clamped["tpot_ms"], clamped["think_tpot_ms"], clamped["value"]) == (300, 40, 50, 2)
    other = config.effective(WireSLO(tpot_ms=10, value=9))
    assert other is not None
    assert (other["tpot_ms"], other["value"]) == (100, 9)


def test_without_classes_or_default_nothing_is_changed_or_invented() -> None:
    asked = WireSLO(ttft_slowdown=3, tpot_ms=1, budget_ms=-5, value=7, on_decline="reject")
    assert SLOConfig().effective(asked) == asked.to_dict()
    assert SLOConfig().effective(None) is None


targets = st.none() | st.floats(0.1, 1e6)


def test_targets_of_phases_are_bounded_too() -> None:
    config = SLOConfig.model_validate({"classes": [{"min_ttft_ms": 300, "min_tpot_ms": 40}]})
    phases = "name=think&tpot_ms=10&until=x;name=answer&tpot_ms=50&first_ms=100"
    clamped = config.effective(WireSLO(phases=phases))
    assert clamped is not None
    assert clamped["phases"] == "name=think&tpot_ms=40.0&until=x;name=answer&tpot_ms=50.0&first_ms=300.0"
    clamped = config.effective(WireSLO(answer_ttft_ms=100))
    assert clamped is not None and clamped["answer_ttft_ms"] == 300


@given(
    asked=st.builds(WireSLO, ttft_ms=targets, tpot_ms=targets, think_tpot_ms=targets, value=st.floats(0.1, 100)),
    bounds=st.builds(SLOClass, min_ttft_ms=targets, min_tpot_ms=targets, max_value=targets),
)
def test_clamping_stays_in_bounds_sets_no_new_target_and_is_well_formed(asked: WireSLO, bounds: SLOClass) -> None:
    wire = bounds.clamp(asked)
    clamped = parse_wire(wire)
    for name, bound in (
        ("ttft_ms", bounds.min_ttft_ms),
        ("tpot_ms", bounds.min_tpot_ms),
        ("think_tpot_ms", bounds.min_tpot_ms),
    ):
        was = getattr(asked, name)
        assert getattr(clamped, name) == (None if was is None else max(was, bound or 0))
    assert clamped.value == (asked.value if bounds.max_value is None else min(asked.value, bounds.max_value))
    assert bounds.clamp(clamped) == wire


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("best_effort_max_wait: 2", ["best_effort_max_wait", "did you mean 'best_effort_max_wait_s'"]),
        ("best_effort_max_wait_s: 0", ["best_effort_max_wait_s", "0"]),
        ("best_effort_max_wait_s: true", ["best_effort_max_wait_s", "True"]),
        ("admission: edf", ["admission", "edf"]),
        ("classes: [{min_tpot_ms: .inf}]", ["classes.0.min_tpot_ms", "inf"]),
        ("classes: [{min_tpot: 4}]", ["classes.0.min_tpot", "did you mean 'min_tpot_ms'"]),
        ("default_slo: {tpot_ms: -1}", ["default_slo", "tpot_ms", "-1"]),
        ("default_slo: {tpt_ms: 1}", ["default_slo", "tpt_ms", "did you mean 'tpot_ms'"]),
        ("- 1", ["must be a mapping", "[1]"]),
        ("a: [", ["not YAML"]),
        ("1: 2", ["1"]),
    ],
)
def test_a_wrong_file_is_refused_with_file_field_and_value(tmp_path: Path, text: str, says: list[str]) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ValueError) as error:
        load_config(file)
    message = str(error.value)
    assert all(word in message for word in [str(file), *says]), message
    assert "\n" not in message


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary"):
        load_config(binary)


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_SGLANG_CONFIG", str(written(tmp_path, "best_effort_max_wait_s: 3")))
    assert config_from_env().best_effort_max_wait_s == 3
    monkeypatch.setenv("SLOS_SGLANG_CONFIG", "")
    assert config_from_env() == SLOConfig()


def test_the_file_in_the_documentation_is_valid(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    config = load_config(written(tmp_path, text.partition("```yaml\n")[2].partition("```")[0]))
    assert config.default_slo is not None
    assert [each.stage for each in config.classes] == ["batch/*", "*"]
