"""Capacity: the highest rate at which at least the target share of all offered programs attains, found by search.

Rates lie on one geometric grid (`GRID` apart), whatever the search starts from, so that searches that follow each
other meet the same rates and a cache of runs serves them again. Attainment falls with the rate but for noise of single
runs; the answer is the grid rate below the first failing one that the bisection meets.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from slos_sglang.measure.result import RunResult

GRID = 1.02
# The search gallops by this many grid steps (about 17 %) before it bisects.
_STRIDE = 8
# Nothing is looked for below or above these, programs a second.
LEAST_REQ_S, MOST_REQ_S = 1e-3, 1e4
Rule = Literal["token", "mean"]
# Two-sided 95 % quantiles of Student's t for 1, 2, .. degrees of freedom.
_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Capacity(BaseModel):
    """A capacity, programs a second for all replicas together: the mean over the seeds, and each seed's.

    `low_req_s` and `high_req_s` bound the mean with 95 % confidence (Student's t over the seeds); None for one seed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate_req_s: float
    by_seed_req_s: tuple[float, ...]
    low_req_s: float | None
    high_req_s: float | None
    target: float
    rule: Rule

    @classmethod
    def of(cls, by_seed_req_s: Sequence[float], *, target: float, rule: Rule) -> Capacity:
        """The capacity that the searches of several seeds found."""
        mean = statistics.fmean(by_seed_req_s)
        half: float | None = None
        if len(by_seed_req_s) > 1:
            student = _STUDENT[min(len(by_seed_req_s) - 1, len(_STUDENT)) - 1]
            half = student * statistics.stdev(by_seed_req_s) / math.sqrt(len(by_seed_req_s))
        return cls(
            rate_req_s=mean,
            by_seed_req_s=tuple(by_seed_req_s),
            low_req_s=None if half is None else max(mean - half, 0.0),
            high_req_s=None if half is None else mean + half,
            target=target,
            rule=rule,
        )


def find_capacity(
    run: Callable[[float, int], RunResult],
    seeds: Sequence[int],
    *,
    hint_req_s: float,
    target: float = 0.9,
    rule: Rule = "token",
) -> Capacity:
    """Search the capacity of what `run(rate_req_s, seed)` runs, for each seed.

    hint_req_s  where to look first; a good guess saves runs, a bad one costs some
    Raises `ValueError` unless 0 < `target` <= 1 and there is a seed.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target must be greater than 0 and at most 1, not {target!r}")
    if not seeds:
        raise ValueError("seeds must hold at least one seed, not ()")
    found: list[float] = []
    for seed in seeds:

        def holds(step: int, seed: int = seed) -> bool:
            result = run(_rate_req_s(step), seed)
            return (result.attainment if rule == "token" else result.attainment_mean_tpot) >= target

        found.append(_rate_req_s(highest(holds, _step(found[-1] if found else hint_req_s))))
    return Capacity.of(found, target=target, rule=rule)


def highest(holds: Callable[[int], bool], start: int) -> int:
    """The highest step that holds, near `start`: gallop until one holds and one does not, then bisect.

    Steps are bounded by `LEAST_REQ_S` and `MOST_REQ_S`; where none holds, the step below the least is the answer.
    """
    least, most = _step(LEAST_REQ_S), _step(MOST_REQ_S)
    good = bad = min(max(start, least), most)
    stride = _STRIDE
    if holds(good):
        while bad == good:
            if good == most:
                return most
            bad = min(good + stride, most)
            if holds(bad):
                good, stride = bad, 2 * stride
    else:
        while good == bad:
            if bad == least:
                return least - 1
            good = max(bad - stride, least)
            if not holds(good):
                bad, stride = good, 2 * stride
    while bad - good > 1:
        middle = (good + bad) // 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good


def _step(rate_req_s: float) -> int:
    return round(math.log(min(max(rate_req_s, LEAST_REQ_S), MOST_REQ_S), GRID))


def _rate_req_s(step: int) -> float:
    """The rate of a grid step; 0 below the least."""
    return GRID**step if step >= _step(LEAST_REQ_S) else 0.0
