"""What is kept in SGLang's own prefix cache: it is given up last, counted once, and never locked afterwards."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from slos_sglang.engine.kept_kv import KeptKV
from slos_sglang.policy.request import Request


class Allocator:
    """As much of an allocator as a cache needs to give memory back."""

    device = torch.device("cpu")

    def __init__(self, page_size: int) -> None:
        self.page_size, self.freed = page_size, 0

    def available_size(self) -> int:
        return self.freed

    def free_segment(self, slots: torch.Tensor, start_pos: int = 0) -> None:
        self.freed += len(slots)


class Cache:
    """SGLang's cache, and the calls whose tokens are in it."""

    def __init__(self, page_size: int = 1) -> None:
        self.tree = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=SimpleNamespace(),  # type: ignore[arg-type]
                token_to_kv_pool_allocator=Allocator(page_size),  # type: ignore[arg-type]
                page_size=page_size,
                tree_components=(ComponentType.FULL,),
            )
        )
        self.kept = KeptKV(self.tree)
        self._slots = 0

    def done(self, seq: int, tokens: list[int], *, output: int = 10) -> Request:
        """A call that ended: its tokens are cached."""
        key = RadixKey(array("q", tokens))
        slots = torch.arange(self._slots, self._slots + len(tokens))
        self.tree.insert(InsertParams(key=key, value=slots))
        self._slots += len(tokens)
        prompt, said = array("q", tokens[:-output]), array("q", tokens[-output:])
        req = SimpleNamespace(origin_input_ids=prompt, output_ids=said, extra_key=None, cache_salt=None)
        return Request(rid=f"r{seq}", seq=seq, arrival_s=0.0, handle=req)

    def cached(self, call: Request) -> int:
        """How much of the call's tokens is cached. Looking changes what is given up next: ask last."""
        key = RadixKey(call.handle.origin_input_ids + call.handle.output_ids)
        return self.tree.match_prefix(MatchPrefixParams(key=key)).device_prefix_len

    def evict(self, tokens: int) -> None:
        self.tree.evict(EvictParams(num_tokens=tokens))


def tokens_of(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(1000) for _ in range(count)]


@pytest.mark.parametrize("page_size", [1, 16])
def test_what_is_kept_is_given_up_last_and_the_last_of_it_last_of_all(page_size: int) -> None:
    cache, rng = Cache(page_size), random.Random(1)
    calls = [cache.done(n, tokens_of(rng, 320)) for n in range(10)]
    assert cache.kept.use([calls[2], calls[0], calls[1]]) == 960
    cache.evict(7 * 320)
    assert cache.kept.use([calls[2], calls[0], calls[1]]) == 960
    cache.evict(320)
    assert cache.kept.use([calls[2], calls[0], calls[1]]) == 640
    cache.evict(320)
    assert [cache.cached(call) for call in calls[:4]] == [0, 320, 0, 0]


def test_without_it_the_oldest_goes_first() -> None:
    cache, rng = Cache(), random.Random(1)
    calls = [cache.done(n, tokens_of(rng, 300)) for n in range(10)]
    cache.evict(7 * 300)
    assert [cache.cached(call) for call in calls[:8]] == [0] * 7 + [300]


def test_it_counts_what_is_shared_once_and_what_is_in_use_not_at_all() -> None:
    cache, rng = Cache(), random.Random(2)
    system = tokens_of(rng, 100)
    calls = [cache.done(n, system + tokens_of(rng, 50)) for n in range(3)]
    assert cache.kept.use(calls) == 100 + 3 * 50
    node = cache.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", system)))).last_device_node
    runs = cache.tree.lock(node)
    assert cache.kept.use(calls) == 3 * 50
    cache.tree.unlock(runs)
    assert cache.tree.protected_size() == 0
    assert cache.tree.evictable_size() == 250


def test_it_finds_what_was_split_went_on_or_is_partly_gone() -> None:
    cache, rng = Cache(), random.Random(3)
    tokens = tokens_of(rng, 200)
    call = cache.done(0, tokens)
    assert cache.kept.use([call]) == 200
    cache.done(1, tokens[:120] + tokens_of(rng, 80))  # splits it
    assert cache.kept.use([call]) == 200
    cache.done(2, tokens + tokens_of(rng, 40))  # goes on from it
    assert cache.kept.use([call]) == 200
    gone = cache.done(3, tokens_of(rng, 60))
    cache.tree.reset()
    assert cache.kept.use([gone, call]) == 0


def test_nothing_stays_locked() -> None:
    cache, rng = Cache(), random.Random(4)
    calls = [cache.done(n, tokens_of(rng, 64)) for n in range(5)]
    cache.kept.use(calls)
    assert (cache.tree.protected_size(), cache.tree.evictable_size()) == (0, 320)
    cache.evict(320)
    assert cache.kept.use(calls) == 0
