"""KV memory of one replica: blocks that requests hold, and blocks that ended stages left behind.

What a stage leaves stays cached until its blocks are needed; the least recently used goes first, from its tail, so that
what remains is still a prefix. A waiting request's prefix is not held before its prompt starts: it may shrink while it
waits, and the request is told. Whoever looks at it uses it: the engine does so each step for those it has promised.

What must stay true: held and cached blocks never exceed the capacity; a request holds whole blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from slos_sglang.policy.batches import Memory
from slos_sglang.policy.request import Request


@dataclass(slots=True)
class _Left:
    """What an ended stage left of a program's KV, and who waits to go on from it."""

    tokens: int
    waiter: Request | None = None


class KVMemory:
    """`capacity_tokens` of KV in blocks of `block_tokens`."""

    def __init__(self, *, capacity_tokens: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.capacity_blocks = capacity_tokens // block_tokens
        self.held_blocks = 0
        self.cached_blocks = 0
        self.evicted_tokens = 0
        self._left: OrderedDict[str, _Left] = OrderedDict()

    def blocks(self, tokens: int) -> int:
        """Blocks that `tokens` of one request occupy."""
        return -(-tokens // self.block_tokens)

    def new_blocks(self, held_tokens: int, tokens: int) -> int:
        """Blocks that `tokens` more of a request take, after the `held_tokens` that it has."""
        return self.blocks(held_tokens + tokens) - self.blocks(held_tokens)

    def view(self) -> Memory:
        """What a policy sees: cached blocks count as free."""
        block = self.block_tokens
        return Memory(
            capacity_tokens=self.capacity_blocks * block,
            free_tokens=(self.capacity_blocks - self.held_blocks) * block,
            block_tokens=block,
        )

    def find(self, program: str, tokens: int, waiter: Request) -> int:
        """How many of the first `tokens` of the program's next prompt are cached; `waiter` will go on from them."""
        left = self._left.get(program)
        if left is None:
            return 0
        left.waiter = waiter
        self._left.move_to_end(program)
        return min(tokens, left.tokens)

    def use(self, program: str) -> None:
        """What is cached of the program was looked at just now."""
        if program in self._left:
            self._left.move_to_end(program)

    def claim(self, program: str, tokens: int) -> None:
        """A request starts with `tokens` of cached prefix and holds them from now on."""
        self.forget(program)
        self.held_blocks += self.blocks(tokens)

    def grow(self, blocks: int) -> None:
        """Requests take `blocks` more; what is cached makes room."""
        self.held_blocks += blocks
        assert self.held_blocks <= self.capacity_blocks, "KV over capacity"
        over = self.held_blocks + self.cached_blocks - self.capacity_blocks
        while over > 0:
            over -= self._evict(over)

    def shrink(self, blocks: int) -> None:
        """Requests give back `blocks` of what was drafted and rejected."""
        self.held_blocks -= blocks

    def release(self, tokens: int) -> None:
        """A request gives up its `tokens` of KV."""
        self.held_blocks -= self.blocks(tokens)

    def keep(self, program: str, tokens: int) -> None:
        """A request gives up its `tokens` of KV, and the cache keeps them."""
        self.forget(program)
        self.release(tokens)
        self._left[program] = _Left(tokens)
        self.cached_blocks += self.blocks(tokens)

    def forget(self, program: str) -> None:
        """The cache drops what it has of the program."""
        left = self._left.pop(program, None)
        if left is not None:
            self.cached_blocks -= self.blocks(left.tokens)

    def _evict(self, blocks: int) -> int:
        """Evict at most `blocks` of the least recently used prefix; how many that were."""
        program, left = next(iter(self._left.items()))
        had = self.blocks(left.tokens)
        gone = min(blocks, had)
        rest = (had - gone) * self.block_tokens
        self.cached_blocks -= gone
        self.evicted_tokens += left.tokens - rest
        left.tokens = rest
        waiter = left.waiter
        if waiter is not None and waiter.context_tokens > rest:
            waiter.uncached_tokens += waiter.context_tokens - rest
            waiter.context_tokens = rest
        if gone == had:
            del self._left[program]
        return gone
