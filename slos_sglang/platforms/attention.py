"""Attention on the CPU in plain torch, at a cost that follows the work.

SGLang's `torch_native` computes the queries of the whole sequence for every request of an extend batch, so a decoding
request inside a mixed batch, a later chunk or a cached prefix pays context x context. Here only the new queries are
computed, and what is the same for every layer is worked out once a forward.

What must stay true: a request is computed by itself and, when it has one new token, in the same way in a decode batch
as in a mixed one, so that its output does not depend on its company.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows `start` to `stop` of a batch: the new tokens of one request, after `prefix_tokens` earlier ones.

    slots  where the keys and values of the whole sequence lie in the pool
    """

    start: int
    stop: int
    prefix_tokens: int
    slots: torch.Tensor
    _masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def unseen_tokens(self, window_tokens: int | None) -> int:
        """How many of the first tokens lie outside the window of every new one."""
        return 0 if window_tokens is None else max(0, self.prefix_tokens - window_tokens)

    def mask(self, window_tokens: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Zero where a new token looks, minus infinity elsewhere; kept for the other layers.

        Shape [new tokens, sequence without the unseen ones]. The last row sees the last token: causal, aligned to the
        lower right. With a window a token sees that many before itself.
        """
        key = (window_tokens, dtype)
        if key not in self._masks:
            unseen = self.unseen_tokens(window_tokens)
            shape = (self.stop - self.start, self.slots.shape[0] - unseen)
            hidden = torch.ones(shape, dtype=torch.bool).triu_(self.prefix_tokens - unseen + 1)
            if window_tokens is not None:
                hidden |= torch.ones(shape, dtype=torch.bool).tril_(self.prefix_tokens - unseen - window_tokens - 1)
            self._masks[key] = torch.zeros(shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        return self._masks[key]


def plan_rows(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor | None,
) -> list[Rows]:
    """The rows of each request of a batch; without prefix lengths (decode) each has one new token."""
    lens = seq_lens.tolist()
    prefixes = [length - 1 for length in lens] if extend_prefix_lens is None else extend_prefix_lens.tolist()
    plan, start = [], 0
    for pool_index, length, prefix in zip(req_pool_indices.tolist(), lens, prefixes, strict=True):
        stop = start + length - prefix
        plan.append(Rows(start=start, stop=stop, prefix_tokens=prefix, slots=req_to_token[pool_index, :length]))
        start = stop
    return plan


def attend(
    query: torch.Tensor,
    output: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: list[Rows],
    *,
    scaling: float | None,
    window_tokens: int | None,
) -> None:
    """Causal self-attention of the planned rows, into `output`.

    query, output  [tokens, heads, head size], contiguous
    keys, values   [slots, kv heads, head size]: one layer's pool
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kv_heads = keys.shape[1]
    group = query.shape[1] // kv_heads
    # The heads that share a key stand in as the queries of one small product: nothing is copied for them.
    grouped_query = query.view(-1, kv_heads, group, query.shape[-1]) * scale
    grouped_output = output.view(-1, kv_heads, group, output.shape[-1])
    exact = query.dtype == torch.float32  # in shorter types only the fused operator keeps its sums in float32
    for rows in plan:
        slots = rows.slots[rows.unseen_tokens(window_tokens) :]
        k = keys.index_select(0, slots).to(query.dtype)
        v = values.index_select(0, slots).to(query.dtype)
        if exact and rows.stop - rows.start == 1:
            weights = torch.bmm(grouped_query[rows.start], k.permute(1, 2, 0)).softmax(dim=-1)
            torch.bmm(weights, v.transpose(0, 1), out=grouped_output[rows.start])
            continue
        from_start = rows.prefix_tokens == 0 and window_tokens is None
        result = scaled_dot_product_attention(
            query[rows.start : rows.stop].transpose(0, 1).unsqueeze(0),
            k.transpose(0, 1).unsqueeze(0),
            v.transpose(0, 1).unsqueeze(0),
            attn_mask=None if from_start else rows.mask(window_tokens, query.dtype),
            is_causal=from_start,
            scale=scale,
            enable_gqa=group > 1,
        )
        output[rows.start : rows.stop] = result.squeeze(0).transpose(0, 1)


class TorchCpuAttnBackend(TorchNativeAttnBackend):  # type: ignore[misc]
    """`torch_native` with causal self-attention computed as above; everything else is left to SGLang.

    Sits under `forward_extend` and `forward_decode`, which store keys and values first.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._plan: list[Rows] | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Before each forward. SGLang advances lengths in place, so no plan may outlive its forward."""
        super().init_forward_metadata(forward_batch)
        self._plan = None

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        if encoder_lens is not None or not options["causal"]:
            batch = (req_to_token, req_pool_indices, seq_lens, extend_prefix_lens, extend_seq_lens, encoder_lens)
            return super()._run_sdpa_forward_extend(query, output, k_cache, v_cache, *batch, **options)
        if self._plan is None:
            self._plan = plan_rows(req_to_token, req_pool_indices, seq_lens, extend_prefix_lens)
        return self._attend(query, output, k_cache, v_cache, options)

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        if encoder_lens is not None or options["is_cross_attn"]:
            batch = (req_to_token, req_pool_indices, seq_lens, encoder_lens)
            return super()._run_sdpa_forward_decode(query, output, k_cache, v_cache, *batch, **options)
        if self._plan is None:
            self._plan = plan_rows(req_to_token, req_pool_indices, seq_lens, None)
        return self._attend(query, output, k_cache, v_cache, options)

    def _attend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        options: dict[str, Any],
    ) -> torch.Tensor:
        assert self._plan is not None
        attend(
            query,
            output,
            keys,
            values,
            self._plan,
            scaling=options["scaling"],
            window_tokens=options["sliding_window_size"],
        )
        return output
