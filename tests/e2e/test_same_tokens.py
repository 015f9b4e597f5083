"""The same tokens: scheduling decides when a token comes, never which.

64 mixed requests (prompts of 1 to 1,500 tokens, some sharing prefixes) at temperature 0. The reference is stock SGLang
answering them one at a time. Stock itself does not always repeat that in a crowd: another batch shape adds floats in
another order, and where two tokens are nearly as likely the other one may win. So the bar is relative: with this
project's scheduler, in a crowd without SLOs and in a crowd of three tiers parked and chunked against each other, no
more outputs differ from the reference than in the worst of stock's own crowds; two tokens that stock itself finds
equally likely do not count.
"""

import asyncio
import json
import random
from collections import Counter

import aiohttp
import pytest
from conftest import Running
from requests import post as post_json
from traffic import TIERS, tie

from slos_sglang.engine.launch import Server
from slos_sglang.telemetry.events import Step

pytestmark = pytest.mark.e2e

REQUESTS = 64
LONGEST_PROMPT_TOKENS = 1500
CROWD_SPAN_S = 2.0
CROWDS = 3
TIERED = "same-tokens-"  # by these names the requests with tiers are found in the events


def mixed_requests(vocabulary: int) -> list[dict]:
    """Lengths spread evenly on a logarithmic scale; every fourth starts with one of two common prefixes."""
    rng = random.Random(7)
    common = [[rng.randrange(vocabulary) for _ in range(size)] for size in (60, 400)]
    requests = []
    for number in range(REQUESTS):
        size = round(LONGEST_PROMPT_TOKENS ** (number / (REQUESTS - 1)))
        prompt = [rng.randrange(vocabulary) for _ in range(size)]
        if number % 4 == 3:
            prompt = (common[number // 4 % 2] + prompt)[:LONGEST_PROMPT_TOKENS]
        sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": rng.randint(8, 40)}
        requests.append({"input_ids": prompt, "sampling_params": sampling})
    rng.shuffle(requests)
    return requests


def with_tiers(requests: list[dict]) -> list[dict]:
    tiered = []
    for number, request in enumerate(requests):
        slo = TIERS[number % len(TIERS)]
        custom = {} if slo is None else {"custom_params": {"slo": slo}}
        tiered.append(request | {"rid": f"{TIERED}{number}", "sampling_params": request["sampling_params"] | custom})
    return tiered


async def post(session: aiohttp.ClientSession, url: str, request: dict, wait_s: float = 0.0) -> list[int]:
    await asyncio.sleep(wait_s)
    async with session.post(f"{url}/generate", json=request) as response:
        assert response.status == 200, await response.text()
        answer = await response.json()
    output = answer["output_ids"]
    assert len(output) == request["sampling_params"]["max_new_tokens"]
    return output


async def flushed(url: str) -> aiohttp.ClientSession:
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120))
    async with session.post(f"{url}/flush_cache", params={"timeout": "10"}) as response:
        assert response.status == 200
    return session


def one_at_a_time(url: str, requests: list[dict]) -> list[list[int]]:
    async def run() -> list[list[int]]:
        async with await flushed(url) as session:
            return [await post(session, url, request) for request in requests]

    return asyncio.run(run())


def in_a_crowd(url: str, requests: list[dict], seed: int) -> list[list[int]]:
    waits = [random.Random(seed * REQUESTS + n).uniform(0, CROWD_SPAN_S) for n in range(len(requests))]

    async def run() -> list[list[int]]:
        async with await flushed(url) as session:
            posts = (post(session, url, r, wait_s) for r, wait_s in zip(requests, waits, strict=True))
            return await asyncio.gather(*posts)

    return asyncio.run(run())


def differing(url: str, requests: list[dict], outputs: list[list[int]], reference: list[list[int]]) -> int:
    """How many outputs differ, but for two tokens so close that the rounding of another batch decides between them."""
    pairs = zip(requests, outputs, reference, strict=True)
    return sum(out != expected and not tied(url, request, out, expected) for request, out, expected in pairs)


def tied(url: str, request: dict, output: list[int], expected: list[int]) -> bool:
    """Whether stock finds both tokens equally likely where the outputs part."""
    at = next(n for n, (ours, theirs) in enumerate(zip(output, expected, strict=True)) if ours != theirs)
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 1}
    body = {"input_ids": request["input_ids"] + expected[:at], "sampling_params": sampling}
    reply = post_json(f"{url}/generate", json=body | {"return_logprob": True, "top_logprobs_num": 5}, timeout=120)
    return tie(reply.json()["meta_info"]["output_top_logprobs"][0], output[at], expected[at])


def test_no_more_outputs_differ_than_between_stocks_own_runs(shared: Running, stock_server: Server) -> None:
    requests = mixed_requests(json.loads((shared.model / "config.json").read_text())["vocab_size"])
    reference = one_at_a_time(stock_server.url, requests)
    wrong = [[reference[0][0] + 1, *reference[0][1:]], *reference[1:]]
    assert differing(stock_server.url, requests, wrong, reference) == 1, "a wrong token is not excused"
    crowds = [
        differing(stock_server.url, requests, in_a_crowd(stock_server.url, requests, seed), reference)
        for seed in range(CROWDS)
    ]
    without_slos = [
        differing(stock_server.url, requests, in_a_crowd(shared.url, requests, seed), reference)
        for seed in range(CROWDS)
    ]
    tiered = with_tiers(requests)
    with_three_tiers = [
        differing(stock_server.url, requests, in_a_crowd(shared.url, tiered, seed), reference) for seed in range(CROWDS)
    ]

    print(f"differing of {REQUESTS}: stock {crowds}, without SLOs {without_slos}, three tiers {with_three_tiers}")
    assert max(without_slos) <= max(crowds)
    assert max(with_three_tiers) <= max(crowds)
    assert_really_mixed([event for event in shared.events() if isinstance(event, Step)])


def assert_really_mixed(steps: list[Step]) -> None:
    """The comparison means something only where requests were parked, chunked, and mixed with decoders."""
    chunks: Counter[str] = Counter()
    parked = mixed = 0
    for step in steps:
        chunked = [rid for rid in step.prefill if rid.startswith(TIERED)]
        chunks.update(chunked)
        mixed += bool(chunked and step.decode)
        parked += sum(rid.startswith(TIERED) for rid in step.parked)
    print(f"steps: {mixed} mixed, {parked} rows parked, most chunks of a prompt {max(chunks.values())}")
    assert mixed and parked
    assert max(chunks.values()) > 3
