"""Small schedules worked out on paper. A step costs 10 ms and 1 ms a new token; times are in ms.

In the comments `A20` is a chunk of 20 prompt tokens of A, `A` alone its next output token.
"""

import pytest

from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.batches import Limits
from slos_sglang.sim import Abort, Run, simulate
from slos_sglang.sim.baselines import POLICIES
from slos_sglang.workloads.program import Program, Stage

COST = CostModel(Piece(tokens_ms=1.0, const_ms=10.0))


def call(
    name: str, at_ms: float, prompt_tokens: int, output_tokens: int, *, ttft_ms: float | None = None, **targets: float
) -> Program:
    stage = Stage(name="call", prompt_tokens=prompt_tokens, output_tokens=output_tokens, ttft_ms=ttft_ms, **targets)
    return Program(id=name, arrival_s=at_ms / 1e3, app="test", stages=(stage,))


def run(
    policy: str,
    programs: list[Program],
    *,
    memory_tokens: int = 1000,
    block_tokens: int = 1,
    replicas: int = 1,
    lengths: float = 1.0,
    aborts: tuple[Abort, ...] = (),
    **options: object,
) -> Run:
    return simulate(
        programs,
        [POLICIES[policy](cost=COST, **options) for _ in range(replicas)],
        COST,
        memory_tokens=memory_tokens,
        block_tokens=block_tokens,
        lengths=lengths,
        aborts=aborts,
        trace=True,
    )


def schedule(seen: Run) -> list[str]:
    """Each step as `start-end what`, a preempted request as `-A`."""
    lines = []
    for step in seen.steps:
        what = [f"-{rid[:-2]}" for rid in step.preempt]
        what += [rid[:-2] for rid in step.decode]
        what += [f"{rid[:-2]}{tokens}" for rid, tokens in step.prefill]
        lines.append(f"{step.start_s * 1e3:.0f}-{step.end_s * 1e3:.0f} {' '.join(what)}")
    return lines


def token_ms(seen: Run, name: str) -> list[int]:
    return [round(at_s * 1e3) for c in seen.calls if c.program.id == name for at_s in c.token_s]


TWO = [call("A", 0, 20, 3), call("B", 5, 30, 2)]


def test_vllm_lets_a_prompt_stall_the_decoder() -> None:
    # B came while A's prompt ran: it goes next, and A's second token waits for it.
    assert schedule(run("vllm", TWO)) == ["0-30 A20", "30-70 B30", "70-82 A B", "82-93 A"]


def test_vllm_batches_whole_prompts_up_to_its_budget() -> None:
    # 40 tokens a batch: B would make it 50; C after it does not overtake. D is longer than the budget and runs alone.
    load = [call("A", 0, 20, 1), call("B", 0, 30, 1), call("C", 0, 5, 1), call("D", 0, 50, 1)]
    assert schedule(run("vllm", load, max_batch_tokens=40)) == ["0-30 A20", "30-75 B30 C5", "75-135 D50"]


def test_vllm_recomputes_the_latest_arrival() -> None:
    # Memory for 24. At 54 both hold 12 and need one more: B goes, with 10 + 3 tokens to compute again. That prefill
    # brings its fourth token.
    seen = run("vllm", [call("A", 0, 10, 4), call("B", 0, 10, 4)], memory_tokens=24)
    assert schedule(seen) == ["0-30 A10 B10", "30-42 A B", "42-54 A B", "54-65 -B A", "65-88 B13"]
    assert token_ms(seen, "B") == [30, 42, 54, 88]
    assert [c.request.preemptions for c in seen.calls] == [0, 1]


def test_sarathi_decodes_first_and_fills_the_budget() -> None:
    # 16 tokens a step: A's token leaves 15 for B.
    assert schedule(run("sarathi", TWO, budget_tokens=16)) == [
        "0-26 A16",
        "26-52 A4 B12",
        "52-78 A B15",
        "78-92 A B3",
        "92-103 B",
    ]


# Memory for 40: B's 32 do not fit beside A's 10, a chunk of B does.
TIGHT = [call("A", 0, 10, 4), call("B", 0, 32, 2)]


def test_sarathi_starts_a_prompt_when_all_of_it_fits() -> None:
    assert schedule(run("sarathi", TIGHT, memory_tokens=40, budget_tokens=16)) == [
        "0-20 A10",
        "20-31 A",
        "31-42 A",
        "42-53 A",
        "53-79 B16",
        "79-105 B16",
        "105-116 B",
    ]


def test_vllm_v1_starts_a_prompt_when_a_chunk_fits() -> None:
    # At 52 A holds 11, B 21; A takes one of the 8 left, B's last 11 do not fit: it loses what it has. It starts again
    # at 63 and has the memory to itself from 89 on.
    assert schedule(run("vllm_v1", TIGHT, memory_tokens=40, budget_tokens=16)) == [
        "0-26 A10 B6",
        "26-52 A B15",
        "52-63 -B A",
        "63-89 A B15",
        "89-115 B16",
        "115-126 B1",
        "126-137 B",
    ]


def test_sglang_runs_chunks_in_batches_of_their_own() -> None:
    # Chunks of 16. A has its first token at 52 and no other before B's prompt is done.
    assert schedule(run("sglang", TWO, chunk_tokens=16)) == [
        "0-26 A16",
        "26-52 A4 B12",
        "52-78 B16",
        "78-90 B2",
        "90-102 A B",
        "102-113 A",
    ]


def test_sglang_mixed_lets_decoders_ride() -> None:
    # The decoder's token comes off the chunk.
    assert schedule(run("sglang_mixed", TWO, chunk_tokens=16)) == [
        "0-26 A16",
        "26-52 A4 B12",
        "52-78 A B15",
        "78-92 A B3",
        "92-103 B",
    ]


def test_sglang_reserves_the_output_that_is_left() -> None:
    # Memory for 40. A takes 10 + 4, B would take 20 + 8: more than the 26 left, so it waits for A's end.
    # vLLM looks at prompts only.
    load = [call("A", 0, 10, 4), call("B", 0, 20, 8)]
    assert schedule(run("sglang", load, memory_tokens=40))[:5] == [
        "0-20 A10",
        "20-31 A",
        "31-42 A",
        "42-53 A",
        "53-83 B20",
    ]
    assert schedule(run("vllm", load, memory_tokens=40))[0] == "0-40 A10 B20"


def test_sglang_retracts_the_fewest_tokens_then_the_longest_prompt() -> None:
    # Memory for 22, outputs believed to be a quarter as long: both start. At 42 both have two tokens; A has the longer
    # prompt and goes. It needs 14 + 1 to come back, and B holds 10, so it waits for B's end.
    seen = run("sglang", [call("A", 0, 12, 4), call("B", 0, 8, 4)], memory_tokens=22, lengths=0.25)
    assert schedule(seen) == [
        "0-30 A12 B8",
        "30-42 A B",
        "42-53 -A B",
        "53-64 B",
        "64-88 A14",
        "88-99 A",
    ]


def test_distserve_never_stalls_a_decoder() -> None:
    # A's output goes on at the second instance while the first computes B's prompt.
    seen = run("distserve", TWO, replicas=2)
    assert [(s.replica, line) for s, line in zip(seen.steps, schedule(seen), strict=True)] == [
        (0, "0-30 A20"),
        (0, "30-70 B30"),
        (1, "30-41 A"),
        (1, "41-52 A"),
        (1, "70-81 B"),
    ]


def test_distserve_decodes_where_the_fewest_are() -> None:
    # One instance for prompts, two for output: A goes to the first of them and is still there when B goes to the other.
    seen = run("distserve", [call("A", 0, 20, 10), call("B", 5, 30, 2)], replicas=3, decode=2)
    assert [c.replica for c in seen.calls] == [1, 2]


def test_distserve_leaves_kv_where_it_is_until_there_is_room() -> None:
    # Memory for 30 each. At 50 A holds 20 of the decode instance's, and B's 11 do not fit. B's KV stays behind, so C
    # (25) finds no room at the prefill instance either. A's end at 63 lets B over, that lets C start.
    load = [call("A", 0, 20, 4), call("B", 0, 10, 2), call("C", 45, 25, 1)]
    seen = run("distserve", load, replicas=2, memory_tokens=30, max_batch_tokens=20)
    assert [(s.replica, line) for s, line in zip(seen.steps, schedule(seen), strict=True)] == [
        (0, "0-30 A20"),
        (0, "30-50 B10"),
        (0, "63-98 C25"),
        (1, "30-41 A"),
        (1, "41-52 A"),
        (1, "52-63 A"),
        (1, "63-74 B"),
    ]


def test_edf_takes_the_earlier_deadline_first() -> None:
    # 30 ms a batch are 20 tokens. B came later, is due at 55 and overtakes what is left of A.
    load = [call("A", 0, 30, 1, ttft_ms=1000), call("B", 5, 10, 1, ttft_ms=50)]
    assert schedule(run("edf", load, max_batch_ms=30.0)) == ["0-30 A20", "30-60 B10 A10"]


def test_a_prompt_in_progress_keeps_room_for_its_rest() -> None:
    # Memory for 30, 10 tokens a batch. B is due earlier and would overtake A, whose other 10 tokens are set aside: 10
    # are left for B's 20. Both half done could block each other for good.
    load = [call("A", 0, 20, 1, ttft_ms=1000), call("B", 5, 20, 1, ttft_ms=50)]
    seen = run("edf", load, memory_tokens=30, max_batch_ms=20.0)
    assert schedule(seen) == ["0-20 A10", "20-40 A10", "40-60 B10", "60-80 B10"]


def test_qoserve_fills_the_slack_of_its_decoders() -> None:
    # D's tokens are due at 100 (TTFT), 140, 180. At 20 there are 120 ms: 10 for the step, 1 for D, 109 for X. At 140
    # there are 40. From 180 on nobody decodes.
    load = [call("D", 0, 10, 3, ttft_ms=100, tpot_ms=40), call("X", 5, 200, 1, ttft_ms=1000)]
    assert schedule(run("qoserve", load, min_chunk_tokens=16)) == [
        "0-20 D10",
        "20-140 D X109",
        "140-180 D X29",
        "180-252 X62",
    ]


def test_qoserve_blends_deadline_and_length_and_relegates_the_hopeless() -> None:
    # 50 prompt tokens a batch. H takes 70 ms alone and has 65: last, though 65 + 60 x 8 would be the first. A is due at
    # 500, but has 100 tokens: 500 + 800; B has 10: 900 + 80, so B goes before A.
    load = [call("H", 0, 60, 1, ttft_ms=65), call("A", 0, 100, 1, ttft_ms=500), call("B", 0, 10, 1, ttft_ms=900)]
    assert schedule(run("qoserve", load, max_chunk_tokens=50, min_chunk_tokens=16)) == [
        "0-60 B10 A40",
        "60-120 A50",
        "120-180 A10 H40",
        "180-210 H20",
    ]


def test_qoserve_overtakes_only_a_prompt_that_can_wait() -> None:
    # 50 a batch. At 60 A has 50 left (priority 235 + 400), B 20 (400 + 160): B would go first, and does where A is due
    # at 235. Due at 129, A could not wait for B's 30 ms, has 60 alone until 120 and goes on.
    def load(a_due_ms: float) -> list[Program]:
        return [call("A", 0, 100, 1, ttft_ms=a_due_ms), call("B", 10, 20, 1, ttft_ms=390)]

    options = {"max_chunk_tokens": 50, "min_chunk_tokens": 16}
    assert schedule(run("qoserve", load(235), **options)) == ["0-60 A50", "60-120 B20 A30", "120-150 A20"]
    assert schedule(run("qoserve", load(129), **options)) == ["0-60 A50", "60-120 A50", "120-150 B20"]


def test_slos_promises_one_of_two_that_cannot_both_be_kept() -> None:
    # Each takes 100 of the 110 ms that both have. A is promised; B, whose own deadline it would be that breaks, comes
    # after it with what is left over, and is asked again while it could still be in time.
    # Beside A's second token, due at 150, it gets all there is while it could: 10 + 1 + 39.
    load = [call(name, 0, 90, 2, ttft_ms=110, tpot_ms=50) for name in "AB"]
    seen = run("slos", load, limits=Limits(max_batch_ms=200))
    assert schedule(seen) == ["0-100 A90", "100-150 A B39", "150-211 B51", "211-222 B"]
    verdicts = [[verdict.admitted for _, verdict in c.verdicts] for c in seen.calls]
    assert verdicts[0] == [True] and len(verdicts[1]) > 1 and not any(verdicts[1])
    assert [program.attained for program in seen.programs] == [True, False]


CONVERSATION = Program(
    id="P",
    arrival_s=0.0,
    app="test",
    stages=(
        Stage(name="act", prompt_tokens=10, output_tokens=3, after_s=0.1),
        Stage(name="final", prompt_tokens=20, cached_tokens=13, output_tokens=1, ttft_slowdown=3),
    ),
)


def test_a_tool_gap_and_the_prefix_that_the_first_stage_left() -> None:
    # The first stage ends at 42, the second comes at 142. Of its 13 cached tokens the last one's KV was never computed:
    # 8 of 20 are left. Alone they take 18 ms, so its target is 54.
    seen = run("vllm", [CONVERSATION])
    assert schedule(seen) == ["0-20 P10", "20-31 P", "31-42 P", "142-160 P8"]
    assert seen.calls[1].request.ttft_s == pytest.approx(0.054)


def test_a_prefix_is_evicted_when_memory_is_needed() -> None:
    # Memory for 30, P left 12. Q (25) at 50 leaves 5 of them; 15 of 20 are to be computed.
    seen = run("vllm", [CONVERSATION, call("Q", 50, 25, 1)], memory_tokens=30)
    assert schedule(seen)[3:] == ["50-85 Q25", "142-167 P15"]
    # P took 7 of Q's place, then 15.
    assert seen.evicted_tokens == 7 + 15


def test_a_prefix_may_go_while_its_request_waits() -> None:
    # P's second stage comes at 142, finds 12 and waits behind Q and R. R (20) needs 7 of them at 156: P has 5 left.
    # Its target stays what it was when it came.
    load = [CONVERSATION, call("Q", 141, 5, 1), call("R", 141.5, 20, 1)]
    seen = run("vllm", load, memory_tokens=30, max_batch_tokens=5)
    assert schedule(seen)[3:] == ["141-156 Q5", "156-186 R20", "186-211 P15"]
    assert seen.calls[-1].request.ttft_s == pytest.approx(0.054)


def test_the_prefix_that_was_used_last_goes_last() -> None:
    # Memory for 30; P leaves 12 at 42, Q 5 at 65. P's second stage looks at its own at 142 and waits behind S and R. R
    # takes 16 at 152, 4 too many: Q's go.
    load = [CONVERSATION, call("Q", 50, 5, 1), call("S", 141, 1, 1), call("R", 141.5, 16, 1)]
    seen = run("vllm", load, memory_tokens=30, max_batch_tokens=16)
    assert schedule(seen)[3:] == ["50-65 Q5", "141-152 S1", "152-178 R16", "178-196 P8"]


def test_blocks_round_up() -> None:
    # Four blocks of 16: A and B take two each for 17 tokens. C waits for one, though 30 tokens are unused.
    load = [call("A", 0, 17, 2), call("B", 0, 17, 1), call("C", 0, 1, 1)]
    assert schedule(run("vllm", load, memory_tokens=64, block_tokens=16)) == ["0-44 A17 B17", "44-55 C1", "55-66 A"]


def test_an_abort_is_heard_when_the_step_ends() -> None:
    # B hangs up at 40, in the step that ends at 70; its KV is free then, its first token came to nobody.
    seen = run("vllm", TWO, aborts=(Abort(program="B", at_s=0.04),))
    assert schedule(seen) == ["0-30 A20", "30-70 B30", "70-81 A", "81-92 A"]
    assert [c.outcome for c in seen.calls] == ["finished", "failed"]
    assert [program.completed for program in seen.programs] == [True, True]


def test_an_abort_in_a_tool_gap_ends_the_program() -> None:
    seen = run("vllm", [CONVERSATION], aborts=(Abort(program="P", at_s=0.1),))
    assert schedule(seen) == ["0-20 P10", "20-31 P", "31-42 P"]
    assert not seen.programs[0].completed


def test_programs_go_round_the_replicas() -> None:
    load = [call("A", 0, 10, 1), call("B", 0, 10, 1), call("C", 0, 10, 1)]
    seen = run("vllm", load, replicas=2)
    assert [c.replica for c in seen.calls] == [0, 1, 0]
    assert schedule(seen) == ["0-30 A10 C10", "0-20 B10"]


def test_thinking_is_paced_by_its_own_target() -> None:
    # Two of four tokens think. By the token rule the fourth is due at 100 + 20 + 2 x 40.
    stage = Stage(
        name="think", prompt_tokens=10, output_tokens=4, think_tokens=2, ttft_ms=100, think_tpot_ms=20, tpot_ms=40
    )
    seen = run("vllm", [Program(id="T", arrival_s=0.0, app="test", stages=(stage,))])
    request = seen.calls[0].request
    assert request.phases == ["think", "answer"] and request.ruled_s == pytest.approx(0.2)
