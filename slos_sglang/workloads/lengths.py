"""Random lengths and arrivals that keep their statistics in small samples.

What must stay true: one seeded stream a source, and stratified draws: a sample of n takes one value from each of n
equally likely slices, so that two seeds differ in order and pairing, hardly in mean, spread or tail.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

T = TypeVar("T")
_NORMAL = NormalDist()


@dataclass(frozen=True, kw_only=True)
class Lognormal:
    """`shift` + a log-normal of this median and sigma, kept within `low` and `high`."""

    median: float
    sigma: float
    shift: float = 0.0
    low: float = 0.0
    high: float = math.inf

    def sample(self, count: int, rng: random.Random) -> list[float]:
        """`count` values, stratified, in random order."""
        return [self._quantile(share) for share in _shares(count, rng)]

    def whole(self, count: int, rng: random.Random) -> list[int]:
        """The same, rounded."""
        return [round(value) for value in self.sample(count, rng)]

    def _quantile(self, share: float) -> float:
        value = self.shift + self.median * math.exp(self.sigma * _NORMAL.inv_cdf(share))
        return min(max(value, self.low), self.high)


def weighted(values: Sequence[T], weights: Sequence[int], count: int, rng: random.Random) -> list[T]:
    """`count` of `values`, each as often as its weight says (to within one), in random order."""
    total, drawn = sum(weights), []
    for share in _shares(count, rng):
        rest = share * total
        for value, weight in zip(values, weights, strict=True):
            rest -= weight
            if rest < 0:
                drawn.append(value)
                break
    return drawn


def poisson(count: int, rng: random.Random) -> list[float]:
    """`count` arrivals of a Poisson process, s, scaled to a mean rate of exactly one a second."""
    gaps = [rng.expovariate(1.0) for _ in range(count + 1)]
    scale, at, arrivals = count / sum(gaps), 0.0, []
    for gap in gaps[:count]:
        at += gap * scale
        arrivals.append(at)
    return arrivals


def _shares(count: int, rng: random.Random) -> list[float]:
    shares = [(number + 0.5) / count for number in range(count)]
    rng.shuffle(shares)
    return shares
