"""Whatever clients do: nobody is left without an answer, nothing leaks, nothing stays parked, and the server goes on.

The servers check their memory after every step and end at the first leak (`conftest.STRICT`). Crowds hold requests of
three tiers, so that some are parked and some chunked while it happens.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Running, slo_server
from traffic import TIERS, Answer, ask, ask_all, client, prompt, request

from slos_sglang.telemetry.events import Step

pytestmark = pytest.mark.e2e

STRESS_S = 45
# Well below the ageing bound, after which best effort is served whatever happens.
ABORT_HEARD_S = 1.5
STRESS_REQUESTS = 220
REJECT = {"ttft_ms": 30.0, "tpot_ms": 15.0, "on_decline": "reject"}


def crowd(seed: int, size: int, *, longest: int = 600, tokens: int = 24, **more: Any) -> list[dict[str, Any]]:
    """Requests whose tiers take turns, with names to abort them by."""
    rng = random.Random(seed)
    bodies = [request(prompt(rng, rng.randint(1, longest)), tokens, TIERS[n % len(TIERS)]) for n in range(size)]
    return [body | more | {"rid": f"crowd{seed}-{n}-"} for n, body in enumerate(bodies)]


def complete(answers: list[Answer], tokens: int = 24) -> bool:
    return all(a.status == 200 and a.finish == "length" and len(a.output) == tokens for a in answers)


def steps_of(running: Running) -> list[Step]:
    return [event for event in running.events() if isinstance(event, Step)]


# Requests at the edge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slo", TIERS)
@pytest.mark.parametrize("stream", [False, True])
def test_requests_at_the_edge_of_what_can_be_asked(shared: Running, slo: dict[str, Any] | None, stream: bool) -> None:
    rng = random.Random(3)
    context = json.loads((shared.model / "config.json").read_text())["max_position_embeddings"]

    def status(body: dict[str, Any]) -> tuple[int, str]:
        response = shared.post("/generate", body | {"stream": stream})
        return response.status_code, response.text

    assert status(request(prompt(rng, 5), 0, slo))[0] == 200
    assert status(request(prompt(rng, 1), 1, slo))[0] == 200
    empty = request([], 4, slo)
    if not stream:  # SGLang's own stream of this one logs an error
        assert status(empty)[0] == 400
    del empty["input_ids"]
    for body, says in (
        (empty | {"text": ""}, "empty"),
        (request(prompt(rng, context + 1), 4, slo), "longer than the model's context length"),
        (request(prompt(rng, 5), 4, slo, temperature=1.0) | {"return_sampling_mask": True}, "return_sampling_mask"),
    ):
        code, text = status(body)
        assert says in text
        # SGLang may start a stream before it knows.
        assert code == 400 or stream, (code, text)
    shared.assert_nothing_is_left()


def test_more_refusals_at_once_than_are_judged_in_a_step(shared: Running) -> None:
    """They gather while the server pauses, and none of them runs before it is judged."""
    rng = random.Random(4)
    bodies = [request(prompt(rng, 800), 20, REJECT) for _ in range(60)]

    async def run() -> list[Answer]:
        async with client() as session:
            async with session.post(f"{shared.url}/pause_generation", json={"mode": "in_place"}) as response:
                assert response.status == 200
            asks = [asyncio.create_task(ask(session, shared.url, body)) for body in bodies]
            await asyncio.sleep(2)
            async with session.post(f"{shared.url}/continue_generation", json={}) as response:
                assert response.status == 200
            return await asyncio.gather(*asks)

    assert Counter(answer.status for answer in asyncio.run(run())) == {429: len(bodies)}
    shared.assert_nothing_is_left()


# Everything a request can ask for -----------------------------------------------------------------------------------

SCHEMA = json.dumps({"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]})
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs": {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0},
    "output logprobs": {"return_logprob": True},
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": 0.7},
    "repetition": {"repetition_penalty": 1.3},
    "least": {"min_new_tokens": 8},
    "bias": {"logit_bias": {"40": 3.0}},
    "regex": {"regex": r"[a-z]{4,8} [0-9]{2}"},
    "schema": {"json_schema": SCHEMA},
    "stop": {"stop": ["e", "th"], "ignore_eos": False},
    "two": {"n": 2},
    "sampled": {"temperature": 1.0, "top_p": 0.9, "top_k": 20},
}
OF_REQUEST = {"return_logprob", "top_logprobs_num", "logprob_start_len"}


def featured(rng: random.Random, name: str, slo: dict[str, Any] | None) -> dict[str, Any]:
    fields = FEATURES[name]
    sampling = {key: value for key, value in fields.items() if key not in OF_REQUEST}
    body = request(prompt(rng, rng.randint(1, 500)), 24, slo, **sampling)
    return body | {key: value for key, value in fields.items() if key in OF_REQUEST}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_all_features_beside_each_other(shared: Running, stream: bool) -> None:
    """Each feature in each tier, all at once: rows of every kind are split off, parked, mixed in and merged back."""
    rng = random.Random(5)
    asked = [(name, featured(rng, name, slo)) for name in FEATURES for slo in TIERS]
    if stream:
        # One choice a stream here: with several their events take turns.
        asked = [(name, body | {"stream": True}) for name, body in asked if name != "two"]
    rng.shuffle(asked)

    async def run() -> list[list[dict[str, Any]]]:
        async with client() as session:
            return await asyncio.gather(*(choices(session, shared.url, body) for _, body in asked))

    for (name, body), answers in zip(asked, asyncio.run(run()), strict=True):
        assert len(answers) == (2 if name == "two" else 1)
        for answer in answers:
            meta, text = answer["meta_info"], answer["text"]
            assert meta["finish_reason"]["type"] in ("length", "stop"), (name, meta)
            assert ("slo" in meta and meta["slo"] is not None) == ("custom_params" in body["sampling_params"]), name
            if name in ("logprobs", "output logprobs"):
                assert len(meta["output_token_logprobs"]) == 24
            if name == "schema":
                assert json.loads(text)["n"] in (1, 2)
            if name in ("plain", "frequency", "presence", "repetition", "bias", "sampled", "two"):
                assert meta["completion_tokens"] == 24
    shared.assert_nothing_is_left()


async def choices(session: Any, url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with session.post(f"{url}/generate", json=body) as response:
        assert response.status == 200, await response.text()
        if body.get("stream"):
            lines = [line async for line in response.content if line.startswith(b"data: {")]
            return [json.loads(lines[-1][6:])]
        reply = await response.json()
    return reply if isinstance(reply, list) else [reply]


# Leaving early ------------------------------------------------------------------------------------------------------


def test_aborts_of_queued_chunked_parked_and_running_requests(shared: Running) -> None:
    """Everybody is asked to leave at a random moment; some finish before. Nobody aborted stays parked for long."""
    rng = random.Random(6)
    bodies = crowd(6, 48, longest=1500, tokens=200)
    aborted_s: dict[str, float] = {}

    async def run() -> list[Answer]:
        async with client() as session:

            async def abort(rid: str, after_s: float) -> None:
                await asyncio.sleep(after_s)
                async with session.post(f"{shared.url}/abort_request", json={"rid": rid}) as response:
                    assert response.status == 200
                aborted_s[rid] = time.perf_counter()  # the clock of the events

            waits_s = [rng.uniform(0, 2) for _ in bodies]
            asks = [ask(session, shared.url, body, wait_s=wait_s) for body, wait_s in zip(bodies, waits_s, strict=True)]
            aborts = [abort(body["rid"], w + rng.uniform(0.2, 4)) for body, w in zip(bodies, waits_s, strict=True)]
            answers, _ = await asyncio.gather(asyncio.gather(*asks), asyncio.gather(*aborts))
            return answers

    answers = asyncio.run(run())
    ended = Counter(answer.finish for answer in answers)
    assert set(ended) <= {"abort", "length", None}, ended
    assert ended["abort"] > 10, ended
    shared.assert_nothing_is_left()

    while_parked = 0
    for rid in (body["rid"] for body, answer in zip(bodies, answers, strict=True) if answer.finish == "abort"):
        at_s = aborted_s[rid]
        steps = [step for step in steps_of(shared) if rid in step.parked]
        while_parked += any(step.t_s <= at_s <= step.end_s for step in steps)
        # The word has to come through two processes, which a busy machine may keep waiting.
        assert not any(step.t_s > at_s + ABORT_HEARD_S for step in steps), rid
    assert while_parked, "no request was aborted while it was parked"


def test_clients_that_hang_up_free_what_they_held(shared: Running) -> None:
    """Mid-stream and before the first token, in every tier; the ones that stay get all they asked for."""
    rng = random.Random(7)
    bodies = crowd(7, 36, longest=1200, tokens=400, stream=True)
    staying = crowd(8, 6)

    async def run() -> list[Answer]:
        async with client() as session:
            leave = (ask(session, shared.url, body, hang_up_s=rng.uniform(0.02, 3.0)) for body in bodies)
            stay = (ask(session, shared.url, body, wait_s=rng.uniform(0, 2)) for body in staying)
            return await asyncio.gather(*leave, *stay)

    answers = asyncio.run(run())
    assert complete(answers[len(bodies) :])
    assert sum(answer.status == 0 for answer in answers) > len(bodies) / 2
    shared.assert_nothing_is_left()


def test_abort_all(shared: Running) -> None:
    bodies = crowd(9, 40, longest=1500, tokens=400)

    async def run() -> list[Answer]:
        async with client() as session:
            asks = [asyncio.create_task(ask(session, shared.url, body)) for body in bodies]
            await asyncio.sleep(1.5)
            async with session.post(f"{shared.url}/abort_request", json={"abort_all": True}) as response:
                assert response.status == 200
            return await asyncio.gather(*asks)

    answers = asyncio.run(run())
    assert {answer.finish for answer in answers} <= {"abort", "length"}
    assert sum(answer.finish == "abort" for answer in answers) > len(bodies) / 2
    shared.assert_nothing_is_left()


# Operators ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_pause_and_continue(shared: Running, mode: str) -> None:
    """Everybody gets all tokens, with two pauses in the middle of it and an attempt to flush in each.

    Requests come for 1.2 s, so that somebody is there in both pauses on a fast machine too.
    """
    bodies = crowd({"in_place": 10, "retract": 11}[mode], 24)

    async def post(session: Any, path: str, body: dict[str, Any]) -> int:
        async with session.post(shared.url + path, json=body) as response:
            return response.status

    async def run() -> list[Answer]:
        async with client() as session:
            asks = [
                asyncio.create_task(ask(session, shared.url, body, wait_s=0.05 * n)) for n, body in enumerate(bodies)
            ]
            for after_s in (0.5, 0.1):
                await asyncio.sleep(after_s)
                assert await post(session, "/pause_generation", {"mode": mode}) == 200
                await asyncio.sleep(0.5)
                flushed = await post(session, "/flush_cache", {})
                assert flushed in ((200, 400) if mode == "retract" else (400,))
                assert await post(session, "/continue_generation", {}) == 200
            return await asyncio.gather(*asks)

    assert complete(asyncio.run(run()))
    shared.assert_nothing_is_left()


def test_pausing_by_abort_ends_everybody(shared: Running) -> None:
    bodies = crowd(12, 24, tokens=300)

    async def run() -> list[Answer]:
        async with client() as session:
            asks = [asyncio.create_task(ask(session, shared.url, body)) for body in bodies]
            await asyncio.sleep(1.0)
            async with session.post(f"{shared.url}/pause_generation", json={"mode": "abort"}) as response:
                assert response.status == 200
            async with session.post(f"{shared.url}/continue_generation", json={}) as response:
                assert response.status == 200
            return await asyncio.gather(*asks)

    answers = asyncio.run(run())
    assert {answer.finish for answer in answers} <= {"abort", "length"}
    shared.assert_nothing_is_left()


def test_flushing_a_busy_server_changes_nothing(shared: Running) -> None:
    bodies = crowd(13, 24)

    async def run() -> list[Answer]:
        async with client() as session:
            asks = [asyncio.create_task(ask(session, shared.url, body)) for body in bodies]
            await asyncio.sleep(0.3)
            async with session.post(f"{shared.url}/flush_cache") as response:
                assert response.status == 400
            return await asyncio.gather(*asks)

    assert complete(asyncio.run(run()))
    shared.assert_nothing_is_left()


# Little memory ------------------------------------------------------------------------------------------------------

KV_TOKENS = 1500
MOST_ROWS = 12


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Iterator[Running]:
    """A server with memory for a handful of requests, which admits more than fit (SGLang's own optimism)."""
    flags = ("--max-total-tokens", str(KV_TOKENS), "--max-running-requests", str(MOST_ROWS))
    with slo_server(
        tmp_path_factory.mktemp("cramped"), tiny_model, *flags, "--schedule-conservativeness", "0.1"
    ) as running:
        yield running


def test_requests_are_retracted_when_memory_is_full(cramped: Running) -> None:
    rng = random.Random(14)
    bodies = crowd(14, 30, longest=60, tokens=250)
    for body in bodies:
        body["sampling_params"]["ignore_eos"] = False  # SGLang counts on an early end; this model has none
    answers = asyncio.run(ask_all(cramped.url, bodies, waits_s=[rng.uniform(0, 2) for _ in bodies]))
    assert complete(answers, 250)
    assert any(answer.meta["num_retractions"] for answer in answers)
    retracted = [a for a in answers if a.receipt and a.meta["num_retractions"]]
    assert all(a.receipt["preemptions"] == a.meta["num_retractions"] for a in retracted)
    steps = steps_of(cramped)
    assert any(step.parked for step in steps)
    # Parked requests keep their places: never more than may run.
    assert max(len({*step.decode, *step.prefill, *step.parked}) for step in steps) <= MOST_ROWS
    cramped.assert_nothing_is_left()


def test_a_prompt_that_can_never_fit_is_refused(cramped: Running) -> None:
    for slo in TIERS:
        body = request(prompt(random.Random(15), KV_TOKENS + 1), 4, slo)
        response = cramped.post("/generate", body)
        assert response.status_code == 400, response.text
    cramped.assert_nothing_is_left()


# Everything together ------------------------------------------------------------------------------------------------


STRESSES = {"shared": {"longest": 1500, "seed": 16}, "cramped": {"longest": 400, "seed": 17}}


@pytest.mark.parametrize("which", STRESSES)
def test_random_stress(which: str, request: pytest.FixtureRequest) -> None:
    """Random tiers, lengths, shared prefixes, features; 40 % of the clients abort or hang up at a random moment."""
    running: Running = request.getfixturevalue(which)
    stress(running, **STRESSES[which])
    running.assert_nothing_is_left()


def stress(running: Running, *, longest: int, seed: int) -> None:
    rng = random.Random(seed)
    common = [prompt(rng, size) for size in (40, 150, longest // 2)]
    calls = []
    for n in range(STRESS_REQUESTS):
        slo = rng.choice([*TIERS, *TIERS, REJECT, {"budget_ms": 3000.0}])
        body = featured(rng, rng.choice([name for name in FEATURES if name != "two"]), slo)
        start = rng.choice([[], [], *common])
        size = round(longest ** rng.random())
        body["input_ids"] = (start + prompt(rng, size))[:longest]
        body["rid"] = f"stress{seed}-{n}-"
        body["stream"] = rng.random() < 0.5
        body["sampling_params"]["ignore_eos"] = False
        leaves = rng.choices(("stays", "aborts", "hangs up"), (60, 20, 20))[0]
        calls.append((body, leaves, rng.uniform(0, STRESS_S), rng.uniform(0, 4)))

    async def call(session: Any, body: dict[str, Any], leaves: str, wait_s: float, after_s: float) -> Answer:
        if leaves == "aborts":

            async def abort() -> None:
                await asyncio.sleep(wait_s + after_s)
                async with session.post(f"{running.url}/abort_request", json={"rid": body["rid"]}) as response:
                    assert response.status == 200

            answer, _ = await asyncio.gather(ask(session, running.url, body, wait_s=wait_s), abort())
            return answer
        return await ask(session, running.url, body, wait_s=wait_s, hang_up_s=after_s if leaves == "hangs up" else None)

    async def run() -> list[Answer]:
        async with client() as session:
            return await asyncio.gather(*(call(session, *each) for each in calls))

    answers = asyncio.run(run())
    for (body, leaves, *_), answer in zip(calls, answers, strict=True):
        slo = body["sampling_params"].get("custom_params", {}).get("slo")
        if leaves == "stays" and not (slo is REJECT and answer.status == 429):
            assert answer.finish in ("length", "stop"), (body, answer)
