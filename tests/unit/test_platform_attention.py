"""The CPU attention against the definition, written out query by query."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")

from slos_sglang.platforms import accelerator  # noqa: E402

if accelerator() is not None:
    pytest.skip("SGLang serves this machine's device itself", allow_module_level=True)

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend  # noqa: E402

from slos_sglang.platforms.attention import TorchCpuAttnBackend, attend, plan_rows  # noqa: E402

HEAD_SIZE = 8
POOL_SLOTS = 512


@st.composite
def batches(draw):
    """(prefix, new) tokens per request, kv heads, heads per kv head, window, seed."""
    lens = draw(st.lists(st.tuples(st.integers(0, 20), st.one_of(st.just(1), st.integers(1, 12))), max_size=6))
    window = draw(st.one_of(st.none(), st.integers(0, 24)))
    return lens, draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4])), window, draw(st.integers(0, 99))


def make_batch(lens, kv_heads, group, seed):
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(POOL_SLOTS, generator=generator, dtype=torch.int64).to(torch.int32)
    req_to_token = torch.full((16, 64), POOL_SLOTS - 1, dtype=torch.int32)
    pool_indices = torch.randperm(16, generator=generator)[: len(lens)]
    taken = 0
    for pool_index, (prefix, new) in zip(pool_indices.tolist(), lens, strict=True):
        req_to_token[pool_index, : prefix + new] = slots[taken : taken + prefix + new]
        taken += prefix + new
    tokens = sum(new for _, new in lens)
    return SimpleNamespace(
        req_to_token=req_to_token,
        pool_indices=pool_indices,
        seq_lens=torch.tensor([prefix + new for prefix, new in lens], dtype=torch.int64),
        prefix_lens=torch.tensor([prefix for prefix, _ in lens], dtype=torch.int64),
        query=torch.randn(tokens, kv_heads * group, HEAD_SIZE, generator=generator),
        keys=torch.randn(POOL_SLOTS, kv_heads, HEAD_SIZE, generator=generator),
        values=torch.randn(POOL_SLOTS, kv_heads, HEAD_SIZE, generator=generator),
    )


def by_definition(batch, lens, group, window, scale):
    """Each query and head on its own, in double precision."""
    out, row = torch.zeros_like(batch.query, dtype=torch.float64), 0
    for pool_index, (prefix, new) in zip(batch.pool_indices.tolist(), lens, strict=True):
        for position in range(prefix, prefix + new):
            first = 0 if window is None else max(0, position - window)
            seen = batch.req_to_token[pool_index, first : position + 1].long()
            for head in range(batch.query.shape[1]):
                keys = batch.keys[seen, head // group].double()
                weights = torch.softmax(keys @ batch.query[row, head].double() * scale, dim=0)
                out[row, head] = weights @ batch.values[seen, head // group].double()
            row += 1
    return out


def attended(batch, window, scaling=None, dtype=torch.float32):
    output = torch.full_like(batch.query, float("nan"), dtype=dtype)
    plan = plan_rows(batch.req_to_token, batch.pool_indices, batch.seq_lens, batch.prefix_lens)
    pool = (batch.keys.to(dtype), batch.values.to(dtype))
    attend(batch.query.to(dtype), output, *pool, plan, scaling=scaling, window_tokens=window)
    return output


@settings(deadline=None, max_examples=150)
@given(batches())
def test_attention_is_what_it_is_defined_to_be(drawn):
    lens, kv_heads, group, window, seed = drawn
    batch = make_batch(lens, kv_heads, group, seed)
    expected = by_definition(batch, lens, group, window, scale=HEAD_SIZE**-0.5)
    torch.testing.assert_close(attended(batch, window).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_short_types_and_a_given_scale(window):
    lens = [(7, 1), (0, 9), (5, 4)]
    batch = make_batch(lens, 2, 2, seed=3)
    expected = by_definition(batch, lens, 2, window, scale=0.7)
    result = attended(batch, window, scaling=0.7, dtype=torch.bfloat16)
    torch.testing.assert_close(result.double(), expected, atol=0.05, rtol=0.05)


def test_one_new_token_gives_the_same_bits_in_any_company():
    lens = [(19, 1), (0, 12), (7, 1), (13, 5)]
    batch = make_batch(lens, 2, 2, seed=1)
    crowd = attended(batch, None)
    row = 0
    for index, (_, new) in enumerate(lens):
        alone = SimpleNamespace(**vars(batch))
        alone.pool_indices = batch.pool_indices[index : index + 1]
        alone.seq_lens, alone.prefix_lens = batch.seq_lens[index : index + 1], batch.prefix_lens[index : index + 1]
        alone.query = batch.query[row : row + new]
        assert torch.equal(attended(alone, None), crowd[row : row + new])
        row += new


def test_lengths_advanced_in_place_are_seen_by_the_next_forward():
    batch = make_batch([(9, 1), (4, 1)], 2, 2, seed=5)
    runner = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
    ours, stock = TorchCpuAttnBackend(runner), TorchNativeAttnBackend(runner)
    options = dict(scaling=0.3, enable_gqa=True, causal=False, is_cross_attn=False, sliding_window_size=None)
    for _ in range(2):
        results = []
        for backend in (ours, stock):
            backend.init_forward_metadata(SimpleNamespace(out_cache_loc=None))
            output = torch.empty_like(batch.query)
            pools = (batch.keys, batch.values, batch.req_to_token)
            backend._run_sdpa_forward_decode(
                batch.query, output, *pools, batch.pool_indices, batch.seq_lens, None, **options
            )
            results.append(output)
        torch.testing.assert_close(*results)
        batch.seq_lens.add_(1)


def test_what_is_not_causal_self_attention_is_left_to_sglang():
    batch = make_batch([(0, 4), (0, 6)], 2, 2, seed=2)
    runner = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
    options = dict(scaling=0.3, enable_gqa=True, causal=False, is_cross_attn=False, sliding_window_size=None)
    results = []
    for backend in (TorchCpuAttnBackend(runner), TorchNativeAttnBackend(runner)):
        output = torch.empty_like(batch.query)
        pools = (batch.keys, batch.values, batch.req_to_token)
        lens = (batch.seq_lens, batch.prefix_lens, batch.seq_lens - batch.prefix_lens)
        backend._run_sdpa_forward_extend(batch.query, output, *pools, batch.pool_indices, *lens, None, **options)
        results.append(output)
    assert torch.equal(*results)
