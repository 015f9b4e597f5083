"""KV of conversations that are away, in SGLang's prefix cache.

The cache gives up what was used the longest time ago. What is kept is used again, by looking it up, before any step
that may take memory from the cache, so that it goes last. Nothing is locked beyond that look: SGLang would take it for
a leak, and those that were promised something may have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.runtime_context import get_memory

from slos_sglang.policy.request import Request


class KeptKV:
    """What is kept in `tree_cache`."""

    def __init__(self, tree_cache: Any) -> None:
        self._tree = tree_cache
        self._keys: dict[int, RadixKey] = {}

    @staticmethod
    def works_with(tree_cache: Any) -> bool:
        """True where there is a prefix cache, of KV alone, that gives up the least recently used first."""
        shares = tree_cache.supports_prefix_sharing() and not tree_cache.supports_mamba()
        return bool(shares and get_memory().radix_eviction_policy.lower() == "lru")

    def use(self, calls: Sequence[Request]) -> int:
        """Make the conversations of these calls the most recently used ones, the last one most.

        Returns how many tokens of them are cached and in use by nobody else.
        """
        self._keys = {call.seq: self._keys.get(call.seq) or _key(call.handle) for call in calls}
        free_tokens = self._tree.evictable_size()
        found = [self._tree.match_prefix(MatchPrefixParams(key=key)) for key in self._keys.values()]
        locks = [self._tree.lock(match.last_device_node) for match in found if match.device_prefix_len]
        kept_tokens: int = free_tokens - self._tree.evictable_size()
        for lock in locks:
            self._tree.unlock(lock)
        return kept_tokens


def _key(req: Any) -> RadixKey:
    return RadixKey(req.origin_input_ids + req.output_ids, req.extra_key, cache_salt=req.cache_salt)
