"""Two tensor-parallel ranks on the CPU: every rank takes the same decisions, whatever clients do meanwhile.

Each rank runs the scheduler. If one decided otherwise than the other, their collectives would not match, and the
server would hang or answer nonsense. So each rank's events are compared, times and predictions included, bit by bit.
"""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CHUNKS, Running, slo_server
from traffic import TIERS, Answer, ask, ask_all, client, prompt, request

from slos_sglang.telemetry.events import Arrive, Step

pytestmark = pytest.mark.e2e

REQUESTS = 32
LONGEST_PROMPT_TOKENS = 800


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("two-ranks")
    with slo_server(
        folder, tiny_model, "--tp-size", "2", *CHUNKS, SGLANG_CPU_OMP_THREADS_BIND="0|1", OMP_NUM_THREADS="1"
    ) as running:
        yield running


def assert_ranks_agree(running: Running) -> list[Arrive | Step]:
    """Everything but the ends of requests, which only the rank that answers clients reports."""
    first, second = ([e for e in running.events(rank) if isinstance(e, Arrive | Step)] for rank in (0, 1))
    assert len(first) > 100
    differing = [(a, b) for a, b in zip(first, second, strict=False) if a != b]
    assert not differing, differing[0]
    # The last events may still be in memory of the rank that has been told last.
    assert abs(len(first) - len(second)) < 20
    return first


def test_the_same_tokens_as_one_rank(shared: Running, two_ranks: Running) -> None:
    rng = random.Random(21)
    sizes = [round(LONGEST_PROMPT_TOKENS ** (n / (REQUESTS - 1))) for n in range(REQUESTS)]
    plain = [request(prompt(rng, size), 24) for size in sizes]
    tiered = [request(body["input_ids"], 24, TIERS[n % len(TIERS)]) for n, body in enumerate(plain)]

    async def one_at_a_time() -> list[Answer]:
        async with client() as session:
            return [await ask(session, shared.url, body) for body in plain]

    alone = asyncio.run(one_at_a_time())
    crowd = asyncio.run(ask_all(two_ranks.url, tiered, waits_s=[rng.uniform(0, 1.5) for _ in tiered]))
    differing = [len(body["input_ids"]) for body, a, b in zip(plain, alone, crowd, strict=True) if a.output != b.output]
    print(f"differing of {REQUESTS}: {len(differing)}")
    assert all(len(answer.output) == 24 for answer in crowd)
    assert differing == []
    events = assert_ranks_agree(two_ranks)
    # The comparison means something only where requests were parked, and chunks mixed with decoders.
    assert any(isinstance(event, Step) and event.parked for event in events)
    assert any(isinstance(event, Step) and event.prefill and event.decode for event in events)


def test_ranks_agree_under_a_crowd_with_aborts(two_ranks: Running) -> None:
    """Aborted, disconnected, rejected and grammar-bound requests; afterwards nothing hangs and nothing is left."""
    rng = random.Random(22)

    async def leave(session, body: dict, after_s: float) -> None:
        await asyncio.sleep(after_s)
        async with session.post(f"{two_ranks.url}/abort_request", json={"rid": body["rid"]}) as response:
            assert response.status == 200

    async def run() -> list[Answer]:
        async with client() as session:
            calls, aborts = [], []
            for n in range(60):
                slo = rng.choice([*TIERS, {"ttft_ms": 50.0, "tpot_ms": 15.0, "on_decline": "reject"}])
                grammar = {"regex": "[a-z]{4,8}"} if n % 7 == 0 else {}
                body = request(prompt(rng, rng.randint(1, 600)), 48, slo, **grammar) | {"rid": f"tp{n}-"}
                wait_s = rng.uniform(0, 4)
                hang_up_s = rng.uniform(0.05, 2) if n % 5 == 1 else None
                calls.append(
                    ask(session, two_ranks.url, body | {"stream": n % 2 == 0}, wait_s=wait_s, hang_up_s=hang_up_s)
                )
                if n % 5 == 2:
                    aborts.append(leave(session, body, wait_s + rng.uniform(0.05, 2)))
            answers, _ = await asyncio.gather(asyncio.gather(*calls), asyncio.gather(*aborts))
            return answers

    answers = asyncio.run(run())
    for n, answer in enumerate(answers):
        if n % 5 not in (1, 2):
            assert answer.status == 429 or answer.finish in ("length", "stop"), answer
    two_ranks.assert_nothing_is_left()
    assert_ranks_agree(two_ranks)
