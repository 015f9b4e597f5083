"""Output lengths nobody knows: what is expected, and what is certain enough to lend on."""

import pytest

from slos_sglang.policy.lengths import LengthEstimator
from slos_sglang.policy.request import Request
from slos_sglang.slo import WireSLO


def request(stage: str = "act", *, done: int = 0, cap: int = 500) -> Request:
    return Request(
        rid="r", seq=0, arrival_s=0.0, slo=WireSLO(stage=stage, tpot_ms=50), max_tokens=cap, output_tokens=done
    )


def seen(*outputs: int, stage: str = "act", **settings: float) -> LengthEstimator:
    lengths = LengthEstimator(**settings)  # type: ignore[arg-type]
    for output in outputs:
        lengths.finished(request(stage, done=output))
    return lengths


def test_the_cap_is_all_there_is_before_enough_was_seen() -> None:
    assert seen(10, 20, 30).expect(request()) == 500
    assert seen(10, 20, 30).expect(request(done=100)) == 400
    assert seen(10, 20, 30).at_least(request()) == 1
    assert seen().expect(request(cap=1 << 30)) == 4096, "a cap that says nothing"


def test_a_quantile_of_what_the_stage_has_shown() -> None:
    lengths = seen(*range(10, 110, 10), quantile=0.7, sure=0.2)
    assert lengths.expect(request()) == 80
    assert lengths.at_least(request()) == 30
    assert lengths.expect(request("other")) == 500, "each stage has its own"
    assert lengths.expect(request(cap=50)) == 50 and lengths.at_least(request(cap=20)) == 20


def test_only_longer_outputs_count_once_it_has_some() -> None:
    lengths = seen(*([5] * 50), *([100] * 10), quantile=0.5)
    assert lengths.expect(request()) == 5
    assert lengths.expect(request(done=5)) == 95


def test_beyond_what_was_ever_seen_it_may_go_on_for_as_long_again() -> None:
    lengths = seen(*([20] * 10))
    assert lengths.expect(request(done=60)) == 60
    assert lengths.expect(request(done=300)) == 200, "within the cap"


def test_at_most_is_what_was_seen_too_and_the_cap_only_where_nothing_is_known() -> None:
    lengths = seen(*range(10, 210, 10), most=0.9)
    assert lengths.at_most(request()) == 190
    assert lengths.at_most(request(done=150)) == 300, "beyond what was seen as much again"
    assert lengths.at_most(request(done=80)) == 190
    assert lengths.at_most(request(done=400)) == 500 and seen(10, 20).at_most(request()) == 500


def test_what_is_long_ago_is_forgotten() -> None:
    lengths = seen(*([400] * 20), *([10] * 20), memory=20)
    assert lengths.expect(request()) == 10


@pytest.mark.parametrize(("scale", "expected"), [(0.5, 20), (1.0, 40), (2.0, 80)])
def test_wrong_estimates_are_a_switch_for_experiments(scale: float, expected: int) -> None:
    assert seen(*([40] * 10), scale=scale).expect(request()) == expected
