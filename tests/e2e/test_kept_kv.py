"""While a tool runs its conversation stays in a memory that others fill, or does not: as the operator says."""

import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import STRICT, Running, slo_server
from traffic import Answer, ask, client, prompt, request

from slos_sglang.engine.launch import server
from slos_sglang.telemetry.events import Finish, Kept

pytestmark = pytest.mark.e2e

MEMORY_TOKENS = 4096
SMALL = ("--max-total-tokens", str(MEMORY_TOKENS), "--chunked-prefill-size", "512")
# In a gap people send so many times what the memory holds; what they use at once is more than half of it.
TURNED_OVER = 1.2
AGENTS, PEOPLE = 3, 10


@pytest.fixture(scope="module", params=["auto", "never"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Any]:
    """Whether conversations are kept, and a server with a small memory."""
    folder = tmp_path_factory.mktemp("kept")
    events, config = folder / "events-{rank}.jsonl", folder / "slo.yaml"
    config.write_text(json.dumps({"events": str(events), "hold_kv": request.param}), encoding="utf-8")
    with server(tiny_model, *SMALL, config=config, log=folder / "server.log", env=STRICT) as started:
        yield request.param == "auto", Running(server=started, model=tiny_model, events_path=events)


def call(ids: list[int], program: str, *, gap_s: float, **slo: Any) -> dict[str, Any]:
    targets = {"ttft_ms": 4000.0, "tpot_ms": 200.0}
    return request(ids, 16, {"program": program, "stage": "act", "gap_ms": gap_s * 1e3, **targets, **slo})


class Crowd:
    """People who ask one prompt after the other, without targets."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.tokens, self._ends = 0, False
        self._people = [asyncio.create_task(self._ask(session, url, random.Random(100 + n))) for n in range(PEOPLE)]

    async def _ask(self, session: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
        while not self._ends:
            body = request(prompt(rng, rng.randint(150, 350)), 8)
            answer = await ask(session, url, body)
            assert answer.status == 200, answer.message
            self.tokens += len(body["input_ids"]) + 8

    async def tokens_s(self) -> float:
        await asyncio.sleep(1)
        start_s, before = time.monotonic(), self.tokens
        await asyncio.sleep(2)
        return (self.tokens - before) / (time.monotonic() - start_s)

    async def end(self) -> None:
        self._ends = True
        await asyncio.gather(*self._people)


async def agent(
    session: aiohttp.ClientSession, url: str, rng: random.Random, name: str, gap_s: float
) -> list[tuple[int, Answer]]:
    """What each later turn's prompt shares with all that was said before, and its answer."""
    ids, turns = prompt(rng, 200), []
    for turn in range(3):
        answer = await ask(session, url, call(ids, name, gap_s=gap_s))
        assert answer.status == 200, answer.message
        turns.append((len(ids) - 20 - 1 if turn else 0, answer))
        ids = [*ids, *answer.output, *prompt(rng, 20)]
        await asyncio.sleep(gap_s)
    return turns[1:]


async def run(url: str) -> list[tuple[int, Answer]]:
    async with client() as session:
        crowd = Crowd(session, url)
        gap_s = TURNED_OVER * MEMORY_TOKENS / await crowd.tokens_s()
        runs = await asyncio.gather(*(agent(session, url, random.Random(n), f"agent{n}", gap_s) for n in range(AGENTS)))
        await crowd.end()
        return [turn for turns in runs for turn in turns]


def test_a_returning_call_finds_its_prefix(kept: tuple[bool, Running]) -> None:
    is_kept, running = kept
    turns = asyncio.run(run(running.url))
    could = sum(tokens for tokens, _ in turns)
    found = sum(answer.meta["cached_tokens"] for _, answer in turns if answer.meta)
    returned = [event for event in running.events() if isinstance(event, Kept) and event.gap_ms is not None]
    if is_kept:
        assert found >= 0.9 * could, [(tokens, answer.meta, answer.receipt) for tokens, answer in turns]
        assert len(returned) == len(turns)
    else:
        assert found < 0.5 * could, (found, could)
        assert not returned
    running.assert_nothing_is_left()


def test_two_ranks_keep_the_same(tmp_path: Path, tiny_model: Path) -> None:
    """What one kept and the other did not would make their batches differ."""
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}
    with slo_server(tmp_path, tiny_model, "--tp-size", "2", *SMALL, **env) as running:
        asyncio.run(run(running.url))
        running.assert_nothing_is_left()
        first, second = ([e for e in running.events(rank) if not isinstance(e, Finish)] for rank in (0, 1))
    assert any(isinstance(event, Kept) for event in first)
    differing = [(a, b) for a, b in zip(first, second, strict=False) if a != b]
    assert not differing, differing[0]
    # The last events may still be in memory of the rank that has been told last.
    assert abs(len(first) - len(second)) < 20


def test_what_is_kept_goes_to_who_was_promised_something(kept: tuple[bool, Running]) -> None:
    """Conversations that wait take most of the memory; a prompt that needs nearly all of it is promised and served."""
    _, running = kept
    rng = random.Random(7)

    async def main() -> Answer:
        async with client() as session:
            calls = [call(prompt(rng, 400), f"waits{n}", gap_s=20) for n in range(8)]
            await asyncio.gather(*(ask(session, running.url, body) for body in calls))
            return await ask(session, running.url, call(prompt(rng, 3800), "large", gap_s=20, ttft_ms=20_000.0))

    answer = asyncio.run(main())
    assert answer.status == 200 and answer.receipt is not None
    assert answer.receipt["tier"] == "standard", answer.receipt
    assert len(answer.output) == 16
    running.assert_nothing_is_left()


def test_an_aborted_call_keeps_nothing(kept: tuple[bool, Running]) -> None:
    _, running = kept

    async def main() -> None:
        async with client() as session:
            body = call(prompt(random.Random(8), 300), "gone", gap_s=20)
            body["sampling_params"]["max_new_tokens"] = 400
            await ask(session, running.url, body | {"rid": "aborted", "stream": True}, hang_up_s=0.5)
            await asyncio.sleep(2)
            # A later call of the same program ends what was kept, if anything was.
            await ask(session, running.url, call(prompt(random.Random(9), 30), "gone", gap_s=20))

    asyncio.run(main())
    running.assert_nothing_is_left()
    assert not any(isinstance(event, Kept) and event.rid == "aborted" for event in running.events())
