"""DistServe: prompts on some instances, output on others.

Source: DistServe (OSDI'24), sections 3 and 4. A prompt goes to the prefill instance with the fewest tokens queued, runs
first come, first served in batches of whole prompts, and its KV then moves to the decode instance with the fewest
requests, which takes it when it has room; until then it stays where it is. The transfer is free here: DistServe places
the two so that it is hidden. What a decode instance must recompute it recomputes itself. Count replicas by the ratio:
of every `prefill + decode`, the first `prefill` compute prompts. Capacity is per GPU of all of them; compare it with
other policies on as many replicas, because where rates only stretch time a burst weighs less on more servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slos_sglang.sim.baselines.vllm import VLLM
from slos_sglang.sim.replica import Call, Replica
from slos_sglang.sim.routing import Route


@dataclass(kw_only=True)
class DistServe(VLLM):
    """Either kind of instance: one never sees a decoder, the other hardly ever a prompt."""

    prefill: int = 1
    decode: int = 1

    def route(self) -> Route:
        """Prompts here, output there."""
        return Disaggregated(prefill=self.prefill, decode=self.decode)


@dataclass(frozen=True, kw_only=True)
class Disaggregated:
    """Routes calls between prefill and decode instances."""

    prefill: int
    decode: int

    def arrival(self, call: Call, replicas: Sequence[Replica]) -> int:
        return min(
            (r for r in replicas if self._prefills(r.index)),
            key=lambda r: (sum(request.uncached_tokens for request in r.waiting), r.index),
        ).index

    def prefilled(self, call: Call, replicas: Sequence[Replica]) -> int:
        return min(
            (r for r in replicas if not self._prefills(r.index)),
            key=lambda r: (len(r.decoding) + len(r.waiting) + len(r.coming), r.index),
        ).index

    def _prefills(self, index: int) -> bool:
        return index % (self.prefill + self.decode) < self.prefill
