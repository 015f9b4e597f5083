"""How much KV memory calls ask for, and how much is too much for one of them.

A call holds its prompt and a growing output until it ends. Where those that come ask for more than there is, some are
declined, and to decline whoever finds no room keeps few: one large call takes the place of several small ones. The most
calls are kept (a fractional knapsack, filled again and again) where the largest are declined as soon as they come, as
many as it takes until the others fit. So long as memory suffices for all, nobody is too large.

What a call asks for is told from its prompt and from the output that is expected of it; how much memory it then holds,
and for how long, from the calls that have ended. Where those that asked for more held no more, nobody is large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from slos_sglang.policy.batches import Memory
from slos_sglang.policy.request import Request
from slos_sglang.policy.state import Floats

# So many of the latest calls count, and fewer than so many say nothing.
_LATEST, _ENOUGH = 256, 16
# Calls that came longer ago than this, in times that calls hold their memory, have given it back: a burst is over.
_OVER = 2.0


@dataclass(kw_only=True)
class Demand:
    """What the latest calls asked for, and what they held.

    _came   of each: when it came, what it asked for (KV tokens times output tokens), and its worth
    _ended  of each: what it had asked for, what it held (KV tokens times seconds), and for how many seconds
    """

    _came: Floats = field(default_factory=lambda: np.empty((0, 3)))
    _ended: Floats = field(default_factory=lambda: np.empty((0, 3)))

    def arrived(self, request: Request) -> None:
        """A call came; its prompt and its worth are known, and what is expected of its output."""
        output = request.left_tokens
        if request.sure_tokens <= 1 < output:
            return  # only its cap is known, which says nothing
        request.asks = output * (request.context_tokens + request.uncached_tokens + output / 2)
        self._came = _with(self._came, (request.arrival_s, request.asks, request.worth))

    def ended(self, request: Request, now_s: float) -> None:
        """A call has had its last token."""
        if request.standard and request.asks and request.output_tokens > 1:
            for_s = now_s - request.first_token_s
            held = (request.context_tokens - request.output_tokens / 2) * for_s
            self._ended = _with(self._ended, (request.asks, held, for_s))

    def excess(self, requests: Sequence[Request], now_s: float, memory: Memory) -> list[float]:
        """What each of `requests` asks for its worth, over what it may for the latest calls to fit into `memory`: more
        than 1 is too much. 0 where anything may be asked.
        """
        if min(len(self._came), len(self._ended)) < _ENOUGH:
            return [0.0] * len(requests)
        base, slope, for_s = self._held()
        arrival_s, asked, worth = self._came[self._came[:, 0] >= now_s - _OVER * for_s].T
        if arrival_s.size < _ENOUGH:
            return [0.0] * len(requests)
        holds = base + slope * asked
        prices = holds / worth
        order = np.argsort(prices, kind="stable")
        # Those of a burst have the memory as long as they hold it.
        room = memory.capacity_tokens * max(now_s - arrival_s[0], for_s)
        fitting = int(np.searchsorted(np.cumsum(holds[order]), room, side="right"))
        if fitting == order.size:
            return [0.0] * len(requests)
        most = float(prices[order[fitting]])
        return [(base + slope * r.asks) / r.worth / most if r.asks else 0.0 for r in requests]

    def _held(self) -> tuple[float, float, float]:
        """What a call is expected to hold, `base + slope * asked` (least squares, neither below 0); for how long."""
        asked, held, for_s = self._ended.T
        spread = float(np.var(asked))
        together = float(np.mean((asked - asked.mean()) * (held - held.mean())))
        slope = min(max(together / spread, 0.0), float(held.mean() / asked.mean())) if spread else 0.0
        return float(held.mean() - slope * asked.mean()), slope, float(for_s.mean())


def _with(latest: Floats, row: tuple[float, float, float]) -> Floats:
    """The latest rows with one more, the oldest dropped."""
    return np.concatenate((latest[1 - _LATEST :], [row]))
