"""Splitting and rejoining batches: every row keeps what is its own, and penalties go on counting on both sides."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.sampling import penaltylib
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from slos_sglang.engine.batch_split import rejoin, split

VOCABULARY = 32
KINDS = {
    penaltylib.BatchedFrequencyPenalizer: "cumulated_frequency_penalties",
    penaltylib.BatchedPresencePenalizer: "cumulated_presence_penalties",
    penaltylib.BatchedMinNewTokensPenalizer: "len_output_tokens",
}


@dataclass(eq=False, kw_only=True)
class Req:
    """As much of a request as batches look at; `number` is told apart in every tensor."""

    number: int
    frequency: float = 0.0
    presence: float = 0.0
    least: int = 0
    return_logprob: bool = False
    counted: list[int] = field(default_factory=list)

    @property
    def sampling_params(self) -> Any:
        return SimpleNamespace(
            frequency_penalty=self.frequency,
            presence_penalty=self.presence,
            min_new_tokens=self.least,
            stop_token_ids=None,
        )

    tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=1)
    eos_token_ids = None
    grammar = None
    return_hidden_states = False
    return_hidden_states_mode = CaptureHiddenMode.NULL

    def finished(self) -> bool:
        return False


def batch_of(reqs: list[Req]) -> ScheduleBatch:
    rows = torch.tensor([req.number for req in reqs])
    batch = ScheduleBatch(
        reqs=list(reqs),
        model_config=SimpleNamespace(is_encoder_decoder=False),
        device="cpu",
        req_pool_indices=rows.clone(),
        req_pool_indices_cpu=rows.clone(),
        seq_lens=100 + rows,
        seq_lens_cpu=100 + rows,
        orig_seq_lens=(100 + rows).int(),
        input_ids=1000 + rows,
    )
    batch.return_logprob = any(req.return_logprob for req in reqs)
    if batch.return_logprob:
        batch.top_logprobs_nums = [req.number if req.return_logprob else 0 for req in reqs]
        batch.token_ids_logprobs = [[req.number] if req.return_logprob else None for req in reqs]
    batch.sampling_info = SamplingBatchInfo(
        temperatures=rows.float().unsqueeze(1),
        top_ps=rows.float(),
        top_ks=rows.int(),
        min_ps=rows.float(),
        is_all_greedy=False,
        is_any_greedy=False,
        need_top_p_sampling=True,
        need_top_k_sampling=True,
        need_min_p_sampling=True,
        vocab_size=VOCABULARY,
        device="cpu",
        penalizer_orchestrator=penaltylib.BatchedPenalizerOrchestrator(VOCABULARY, batch, set(KINDS)),
    )
    return batch


def decode(batch: ScheduleBatch, token: int) -> None:
    """One token a row, as far as penalties go."""
    for req in batch.reqs:
        req.counted.append((token + req.number) % VOCABULARY)
    tokens = torch.tensor([req.counted[-1] for req in batch.reqs])
    batch.sampling_info.penalizer_orchestrator.cumulate_output_tokens(tokens)


def check(batch: ScheduleBatch) -> None:
    numbers = [req.number for req in batch.reqs]
    info = batch.sampling_info
    assert batch.req_pool_indices.tolist() == batch.req_pool_indices_cpu.tolist() == numbers
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu.tolist() == [100 + n for n in numbers]
    assert batch.input_ids.tolist() == [1000 + n for n in numbers]
    assert info.temperatures.flatten().tolist() == info.top_ps.tolist() == info.top_ks.tolist() == numbers
    assert batch.return_logprob == any(req.return_logprob for req in batch.reqs)
    if batch.return_logprob:
        assert batch.top_logprobs_nums == [req.number if req.return_logprob else 0 for req in batch.reqs]
    orchestrator = info.penalizer_orchestrator
    assert orchestrator.batch is batch
    expected = torch.zeros(len(numbers), VOCABULARY)
    for row, req in enumerate(batch.reqs):
        for token in req.counted:
            expected[row, token] += req.frequency
        for token in set(req.counted):
            expected[row, token] += req.presence
        if len(req.counted) < req.least:
            expected[row, 1] = float("inf")
    logits = torch.zeros(len(numbers), VOCABULARY)
    orchestrator.apply(logits)
    assert torch.allclose(-logits, expected)


@pytest.mark.parametrize("seed", range(20))
def test_random_splits_keep_every_row_whole(seed: int) -> None:
    """Split, decode one side or both, rejoin, and again: fifteen times with whatever rows asked for."""
    rng = random.Random(seed)
    penalized = seed % 2 == 0

    def req(number: int) -> Req:
        some = rng.random() if penalized else 1.0
        return Req(
            number=number,
            frequency=0.25 if some < 0.3 else 0.0,
            presence=0.5 if 0.2 < some < 0.5 else 0.0,
            least=rng.randint(1, 9) if some < 0.2 else 0,
            return_logprob=rng.random() < 0.3,
        )

    reqs = [req(n) for n in range(1, rng.randint(3, 12))]
    batch = batch_of(reqs)
    for step in range(15):
        chosen = set(rng.sample([r.number for r in batch.reqs], rng.randint(1, len(reqs) - 1)))
        before = [r.number for r in batch.reqs]
        active = split(batch, lambda r, chosen=chosen: r.number in chosen)
        assert [r.number for r in active.reqs] == [n for n in before if n in chosen]
        assert [r.number for r in batch.reqs] == [n for n in before if n not in chosen]
        check(active)
        check(batch)
        decode(active, step)
        check(active)
        check(batch)
        batch = rejoin(batch, active) if rng.random() < 0.5 else rejoin(active, batch)
        del active
        check(batch)
    assert sorted(r.number for r in batch.reqs) == [r.number for r in reqs]


def test_rejoining_with_nothing_is_the_other() -> None:
    batch = batch_of([Req(number=1), Req(number=2)])
    assert rejoin(ScheduleBatch(reqs=[]), batch) is batch
    assert rejoin(batch, ScheduleBatch(reqs=[])) is batch
    check(batch)


@pytest.mark.parametrize("all_or_none", [True, False])
def test_a_split_needs_rows_on_both_sides(all_or_none: bool) -> None:
    with pytest.raises(AssertionError, match="both sides"):
        split(batch_of([Req(number=1), Req(number=2)]), lambda _: all_or_none)
