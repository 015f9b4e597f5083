"""Named cost models and calibration files."""

import json

import pytest

from slos_sglang.policy.batch_time import BatchSize, Piece
from slos_sglang.policy.cost_models import COST_MODELS, NamedCostModel, parse_cost_model

CALIBRATED = NamedCostModel(
    name="my-server",
    pieces=(Piece(tokens_ms=0.1, requests_ms=0.3, context_ms=1e-3, const_ms=6.0), Piece(const_ms=9.0)),
    kv_tokens=50_000,
    gpus=2,
    fit={"r2": 0.99, "mape": 0.03, "quantiles": {"0.9": 1.06}, "source": "calibrate"},
)


@pytest.mark.parametrize(
    ("name", "kv_tokens"),
    [
        ("opt-6.7b-a100", 43_106),
        ("opt-13b-a100-tp2", 56_152),
        ("toolllama-7b-a100", 42_915),
        ("r1-distill-qwen-1.5b-a100", 1_147_460),
    ],
)
def test_kv_capacity_is_that_of_the_reference(name, kv_tokens):
    assert COST_MODELS[name].kv_tokens == kv_tokens


def test_the_promised_names_are_there_under_their_own_name():
    promised = "opt-6.7b-a100 opt-13b-a100-tp2 opt-30b-a100-tp4 opt-13b-h100 toolllama-7b-a100 "
    promised += "r1-distill-qwen-1.5b-a100 llama-3.1-8b-h200 qwen2.5-7b-h100"
    assert set(promised.split()) <= set(COST_MODELS)
    assert all(model.name == name for name, model in COST_MODELS.items())


def test_a_step_takes_the_maximum_over_the_pieces():
    cost = COST_MODELS["opt-6.7b-a100"].cost()
    small, large = (BatchSize(tokens=n, requests=1, context_tokens=n) for n in (100, 8000))
    assert cost.batch_ms(small) == pytest.approx(0.06878 * 100 + 24.80)
    assert cost.batch_ms(large) == pytest.approx(0.07523 * 8000 + 3.03)


def test_speeds_are_milliseconds():
    """A 763-token prompt on OPT-13B takes some 87 ms (paper: a chat prompt well under 0.2 s)."""
    assert COST_MODELS["opt-13b-a100-tp2"].cost().prefill_ms(763) == pytest.approx(86.8, abs=0.1)


@pytest.mark.parametrize("model", [CALIBRATED, *COST_MODELS.values()], ids=lambda model: model.name)
def test_reading_back_gives_the_same_model(model):
    assert parse_cost_model(model.to_json()) == model


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gpu": 1}, "unknown key 'gpu'"),
        ({"pieces": [{"token_ms": 1}]}, "unknown key 'token_ms'"),
        ({"pieces": []}, "pieces must hold"),
        ({"pieces": 3}, "pieces must be a list of objects, not 3"),
        ({"pieces": [{"const_ms": -1}]}, "pieces.const_ms must be a finite number of at least 0, not -1"),
        ({"pieces": [{"const_ms": "6"}]}, "pieces.const_ms"),
        ({"kv_tokens": 0}, "kv_tokens must be a whole number of at least 1, not 0"),
        ({"kv_tokens": None}, "kv_tokens must be a whole number of at least 1, not None"),
        ({"gpus": 1.5}, "gpus must be a whole number of at least 1, not 1.5"),
        ({"name": ""}, "name must be a non-empty text"),
        ({"fit": {"r3": 1}}, "unknown key 'r3'"),
    ],
    ids=str,
)
def test_wrong_files_name_field_and_value(change, says):
    with pytest.raises(ValueError, match=says):
        parse_cost_model(json.dumps({**json.loads(CALIBRATED.to_json()), **change}))


@pytest.mark.parametrize(("text", "says"), [("{", "not JSON"), ("[]", "must be an object"), ("{}", "pieces must be")])
def test_what_is_no_cost_model_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse_cost_model(text)


def test_a_missing_field_is_named():
    body = json.loads(CALIBRATED.to_json())
    del body["kv_tokens"]
    with pytest.raises(ValueError, match="kv_tokens is missing"):
        parse_cost_model(json.dumps(body))
