"""How long a batch takes, and how sure that is.

A step's time is modelled as the maximum over linear pieces (paper, section 4: a roofline), each

    tokens_ms * tokens + requests_ms * requests + context_ms * context + spec_steps_ms * draft steps + const_ms

with `tokens` the new tokens of the batch (one a decoding request and one more for each token drafted for it, the chunk
of a prefill), `requests` its rows and `context` the sum of its rows' KV lengths. `OnlineCostModel` corrects one such
piece by the steps that were measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

# No step drafts more tokens for a decoder than this: hardly any of them would be accepted.
MAX_DRAFTS = 6


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One linear piece of a cost model; coefficients in ms per unit.

    `spec_steps_ms` is per step of a draft model, which drafts a token for each decoder; a batch that drafts nothing
    pays nothing of it.
    """

    tokens_ms: float = 0.0
    requests_ms: float = 0.0
    context_ms: float = 0.0
    spec_steps_ms: float = 0.0
    const_ms: float = 0.0


@dataclass(slots=True)
class BatchSize:
    """What the cost model needs to know of a batch: new tokens, rows, the KV tokens those rows attend to, and the steps
    that a draft model takes before it.
    """

    tokens: int = 0
    requests: int = 0
    context_tokens: int = 0
    draft_steps: int = 0

    def add(self, *, tokens: int, context_tokens: int) -> None:
        """Add one row with `tokens` new tokens that attends to `context_tokens` KV tokens, its own included."""
        self.tokens += tokens
        self.requests += 1
        self.context_tokens += context_tokens


def tokens_a_step(draft_steps: int, acceptance: float) -> float:
    """Output tokens that a decoder gets, in the mean, from a step for which so many were drafted: one of the model's
    own, and the drafted ones up to the first that it rejects (paper, section 5).
    """
    tokens, chance = 1.0, 1.0
    for _ in range(draft_steps):
        chance *= acceptance
        tokens += chance
    return tokens


class CostModel:
    """A fixed cost model: the maximum over its pieces (paper, section 4).

    acceptance  probability that the model accepts a token of its draft model; 0: there is no draft model
    """

    def __init__(self, *pieces: Piece, acceptance: float = 0.0) -> None:
        if not pieces:
            raise ValueError("a cost model needs at least one piece")
        if not 0 <= acceptance < 1:
            raise ValueError(f"acceptance must be at least 0 and less than 1, not {acceptance!r}")
        self.pieces, self.acceptance = pieces, acceptance

    @property
    def margin(self) -> float:
        """Factor (at least 1) by which a plan should exceed the prediction; 1 where the model is exact."""
        return 1.0

    def batch_ms(self, size: BatchSize) -> float:
        """Predicted time of a batch, ms; 0 for an empty one."""
        if size.requests == 0:
            return 0.0
        return max(
            p.tokens_ms * size.tokens
            + p.requests_ms * size.requests
            + p.context_ms * size.context_tokens
            + p.spec_steps_ms * size.draft_steps
            + p.const_ms
            for p in self.pieces
        )

    def chunk_tokens(self, size: BatchSize, *, prefix_tokens: int, within_ms: float) -> int:
        """The most new tokens that one more row, after `prefix_tokens` of KV, may add to a batch of `within_ms`."""
        tokens, requests, context = size.tokens, size.requests + 1, size.context_tokens + prefix_tokens
        room = math.inf
        for p in self.pieces:
            idle_ms = p.const_ms + p.spec_steps_ms * size.draft_steps
            left_ms = within_ms - idle_ms - p.tokens_ms * tokens - p.requests_ms * requests - p.context_ms * context
            room = min(room, left_ms / max(p.tokens_ms + p.context_ms, 1e-9))
        return max(0, int(room + 1e-9))

    def prefill_ms(self, tokens: int, *, prefix_tokens: int = 0) -> float:
        """Zero-load time of a prefill of `tokens` uncached tokens after `prefix_tokens` cached ones, ms."""
        return self.batch_ms(BatchSize(tokens=tokens, requests=1, context_tokens=prefix_tokens + tokens))

    def decode_token_ms(self, context_tokens: int) -> float:
        """What one decoding row adds to a batch, ms (no share of the constant)."""
        return max(p.tokens_ms + p.requests_ms + p.context_ms * context_tokens for p in self.pieces)

    def token_ms(self, context_tokens: int) -> float:
        """What an output token takes on an idle server, ms, with as many drafted a step as are worth it."""
        row_ms, best_ms = self.decode_token_ms(context_tokens), math.inf
        for drafts in range(MAX_DRAFTS + 1 if self.acceptance else 1):
            idle_ms = max(p.const_ms + p.spec_steps_ms * drafts + p.tokens_ms * drafts for p in self.pieces)
            best_ms = min(best_ms, (idle_ms + row_ms) / tokens_a_step(drafts, self.acceptance))
        return best_ms

    @property
    def const_ms(self) -> float:
        """What a step costs before any work, ms."""
        return max(p.const_ms for p in self.pieces)


# What the torch_cpu platform measured with the embedded model on two small cores; only a start, steps correct it.
CPU_PRIOR = Piece(tokens_ms=0.1, requests_ms=0.35, context_ms=0.0015, const_ms=6.5)


@dataclass
class OnlineCostModel(CostModel):
    """One piece, corrected by measured steps.

    Two corrections at two speeds. The coefficients come from exponentially weighted ridge regression towards the prior,
    on relative errors, kept at or above zero; a step that took more than `outlier` times its prediction (a hiccup of
    the machine) counts as that much. `drift`, a factor on all of them, follows the last few steps: a shared machine is
    slow for a while, then fast again. `margin` follows the 90 % quantile of measured over predicted times.
    """

    prior: Piece = CPU_PRIOR
    memory_steps: float = 2000.0
    prior_weight: float = 0.15
    refit_every: int = 16
    outlier: float = 2.0
    drift_gain: float = 0.2
    quantile: float = 0.9
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__init__(self.prior)
        theta = np.array([self.prior.tokens_ms, self.prior.requests_ms, self.prior.context_ms, self.prior.const_ms])
        if (theta <= 0).any():
            raise ValueError(f"prior must have positive coefficients to be corrected, not {self.prior}")
        self._prior = self._theta = theta
        self._ridge = np.diag(self.prior_weight / theta**2)
        self._xx = np.zeros((4, 4))
        self._xy = np.zeros(4)
        self._margin = 1.15
        self._drift = 1.0

    @property
    def margin(self) -> float:
        return self._margin

    def observe(self, size: BatchSize, measured_ms: float) -> None:
        """Take in one measured step."""
        if size.requests == 0 or measured_ms <= 0:
            return
        predicted = self.batch_ms(size)
        undrifted = predicted / self._drift
        warm = self.steps >= 2 * self.refit_every
        target = min(measured_ms, self.outlier * undrifted) if warm else measured_ms
        x = np.array([size.tokens, size.requests, size.context_tokens, 1.0]) / target
        keep = 1.0 - 1.0 / self.memory_steps
        self._xx = keep * self._xx + np.outer(x, x)
        self._xy = keep * self._xy + x
        self.steps += 1
        if self.steps % self.refit_every == 0 or self.steps < 8:
            self._refit()
        if warm:
            self._drift += self.drift_gain * (min(measured_ms / undrifted, 2 * self._drift) - self._drift)
            # Robbins-Monro step towards the quantile: up by q, down by 1 - q.
            gain = 0.01 if measured_ms > self._margin * predicted else -0.01
            self._margin += gain * (self.quantile if gain > 0 else 1.0 - self.quantile)
            self._margin = min(max(self._margin, 1.0), 1.6)
        self._scale()

    def _refit(self) -> None:
        free = [0, 1, 2, 3]
        theta = np.zeros(4)
        while free:
            a = (self._xx + self._ridge)[np.ix_(free, free)]
            b = (self._xy + self._ridge @ self._prior)[free]
            solved = np.linalg.solve(a, b)
            if (solved >= 0).all():
                theta[free] = solved
                break
            free = [i for i, value in zip(free, solved, strict=True) if value > 0]
        self._theta = theta

    def _scale(self) -> None:
        tokens, requests, context, const = (float(value) * self._drift for value in self._theta)
        self.pieces = (Piece(tokens_ms=tokens, requests_ms=requests, context_ms=context, const_ms=const),)
