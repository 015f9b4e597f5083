"""How fast the machine is at the moment, and waiting until it is as fast as it can be.

Virtual machines share their cores' caches, memory and clock with neighbours that no counter of theirs shows: the same
work takes up to twice as long for seconds or minutes. A comparison that begins each run at a calm moment, the same for
every arm, loses fewer runs to that. It knows nothing of what is compared, and never looks at a result.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from math import inf

import numpy as np
import torch

# One probe is about what a prompt's step computes; that many make a look; the first time there are more of them.
_PRODUCTS, _PROBES, _FIRST_LOOKS = 20, 30, 8
# How much slower than at best the median probe and nine of ten may be when it is calm.
_CALM_MEDIAN, _CALM_P90 = 1.05, 1.15


@dataclass(kw_only=True)
class Pace:
    """The machine's pace: what a probe took at best so far, ms, and the longest wait for a calm moment, s."""

    limit_s: float = 20.0
    best_ms: float = inf
    _a: torch.Tensor = field(default_factory=lambda: torch.ones(200, 256))
    _b: torch.Tensor = field(default_factory=lambda: torch.ones(256, 1024))

    def wait(self) -> dict[str, float]:
        """Return at a calm moment, or after `limit_s`: how slow it still is (1: as at best), and what was waited, s."""
        start_s = time.monotonic()
        if self.best_ms == inf:
            self.best_ms = min(self._look()[0] for _ in range(_FIRST_LOOKS))
        while True:
            median_ms, p90_ms = self._look()
            self.best_ms = min(self.best_ms, median_ms)
            waited_s = time.monotonic() - start_s
            calm = median_ms <= _CALM_MEDIAN * self.best_ms and p90_ms <= _CALM_P90 * self.best_ms
            if calm or waited_s > self.limit_s:
                return {"slowness": median_ms / self.best_ms, "waited_s": waited_s}

    def _look(self) -> tuple[float, float]:
        """Median and 90th percentile of some probes on one core, ms."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        took_ms = []
        for _ in range(_PROBES):
            start_s = time.perf_counter()
            for _ in range(_PRODUCTS):
                self._a @ self._b
            took_ms.append((time.perf_counter() - start_s) * 1e3)
        torch.set_num_threads(threads)
        return float(np.median(took_ms)), float(np.quantile(took_ms, 0.9))
