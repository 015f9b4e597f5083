"""How long an output will be, which nobody knows: a quantile of what calls of its kind have shown.

A kind is what the request says of itself (program stage), refined as tokens come: only outputs longer than what it
already has count. Where too few were seen, its cap is all there is to go by.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from dataclasses import dataclass, field

from slos_sglang.policy.request import Request

# An output of which only a cap is known is expected to have no more than this.
_UNKNOWN_TOKENS = 4096


@dataclass(kw_only=True)
class LengthEstimator:
    """Quantiles of output lengths by stage name.

    quantile  share of outputs that are to be no longer than estimated
    sure      share of outputs that may be shorter than they surely are
    most      share of outputs that are no longer than they are at most
    scale     factor on every estimate: for experiments with wrong ones
    memory    how many of the latest outputs of a kind count
    enough    fewer longer ones than this do not make an estimate
    """

    quantile: float = 0.7
    sure: float = 0.2
    most: float = 0.95
    scale: float = 1.0
    memory: int = 512
    enough: int = 8
    _recent: dict[str, deque[int]] = field(default_factory=dict)
    _sorted: dict[str, list[int]] = field(default_factory=dict)

    def expect(self, request: Request) -> int:
        """Output tokens still to come, at least 1."""
        done, cap = request.output_tokens, request.max_tokens
        seen = self._seen(request, self.quantile)
        guess = max(2 * done, _UNKNOWN_TOKENS) if seen is None else seen
        return max(int((min(guess, cap) - done) * self.scale), 1)

    def at_least(self, request: Request) -> int:
        """Output tokens that it surely has in all, at least 1."""
        seen = self._sorted.get(_kind(request), [])
        known = seen[int(self.sure * len(seen))] if len(seen) >= self.enough else 1
        return max(int(min(known, request.max_tokens) * self.scale), 1)

    def at_most(self, request: Request) -> int:
        """Output tokens that it has at most in all, by those that had more than it has; its cap where few are known."""
        done, cap = request.output_tokens, request.max_tokens
        most = self._seen(request, self.most)
        if most is None:
            return cap
        return min(done + max(int((most - done) * self.scale), 1), cap)

    def _seen(self, request: Request, share: float) -> int | None:
        """What that share of the longer outputs had at most; beyond what was ever seen, as much again.
        None where few of its kind are known.
        """
        done, seen = request.output_tokens, self._sorted.get(_kind(request), [])
        if len(seen) < self.enough:
            return None
        longer = len(seen) - (skip := bisect_right(seen, done))
        return seen[skip + min(int(share * longer), longer - 1)] if longer >= self.enough else max(2 * done, seen[-1])

    def finished(self, request: Request) -> None:
        """`request` ended by itself after its `output_tokens`."""
        kind = _kind(request)
        recent, ordered = self._recent.setdefault(kind, deque()), self._sorted.setdefault(kind, [])
        recent.append(request.output_tokens)
        insort(ordered, request.output_tokens)
        if len(recent) > self.memory:
            ordered.pop(bisect_right(ordered, recent.popleft()) - 1)


def _kind(request: Request) -> str:
    return (request.slo.stage if request.slo else None) or ""
