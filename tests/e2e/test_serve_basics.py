"""What every client takes for granted, against both kinds of server."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import requests
from traffic import tie

from slos_sglang.engine.launch import Server

pytestmark = pytest.mark.e2e

PROMPTS = ["Once upon a time", "SELECT name FROM city", "Ünïcödé 🙂", "x", " ".join(["deadline"] * 300)]


@pytest.fixture(params=["stock_server", "slos_server"])
def running(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)


def generate(running: Server, text: str, top_logprobs: int = 0, **sampling) -> dict:
    body = {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": 24} | sampling}
    if top_logprobs:
        body |= {"return_logprob": True, "top_logprobs_num": top_logprobs}
    response = requests.post(f"{running.url}/generate", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def test_generate(running):
    answer = generate(running, PROMPTS[0])
    assert answer["text"].strip()
    assert answer["meta_info"]["completion_tokens"] == 24
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 24}


def test_streaming_ends_in_the_same_answer(running):
    whole = generate(running, PROMPTS[1])["text"]
    body = {"text": PROMPTS[1], "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 24}}
    with requests.post(f"{running.url}/generate", json=body, stream=True, timeout=120) as response:
        events = [line[6:] for line in response.iter_lines() if line.startswith(b"data: ")]
    assert events.pop() == b"[DONE]"
    texts = [json.loads(event)["text"] for event in events]
    assert len(texts) > 3
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == whole


def test_chat_completion(running):
    body = {
        "model": "default",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How far is it?"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    response = requests.post(f"{running.url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].strip()
    assert response.json()["usage"]["completion_tokens"] == 12


def test_output_under_a_grammar_is_well_formed(running):
    pattern = r'\{"tool": "(add|look_up)", "input": "[a-z0-9 ]{1,12}"\}'
    calls = [generate(running, prompt, regex=pattern, max_new_tokens=64)["text"] for prompt in PROMPTS]
    assert all(re.fullmatch(pattern, call) for call in calls), calls
    schema = json.dumps({"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]})
    assert json.loads(generate(running, PROMPTS[0], json_schema=schema, max_new_tokens=64)["text"])["n"] in (1, 2)


def test_thinking_marks_reach_the_text(running):
    text = generate(running, PROMPTS[0], regex=r"<think>[a-z ]{5,20}</think>[a-z ]{5}", max_new_tokens=64)["text"]
    assert re.fullmatch(r"<think>[a-z ]{5,20}</think>[a-z ]{5}", text)


def test_the_same_answers_alone_and_together(running):
    """But for two tokens so close that the rounding of another batch decides between them."""
    alone = [generate(running, prompt, top_logprobs=5) for prompt in PROMPTS]
    requests.post(f"{running.url}/flush_cache", params={"timeout": 10}, timeout=60)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: generate(running, prompt)["output_ids"], PROMPTS))
    for answer, output in zip(alone, together, strict=True):
        expected = answer["output_ids"]
        assert len(output) == len(expected)
        at = next((n for n, pair in enumerate(zip(output, expected, strict=True)) if pair[0] != pair[1]), None)
        assert at is None or tie(answer["meta_info"]["output_top_logprobs"][at], output[at], expected[at])


def test_the_platform_is_the_one_for_the_cpu(running):
    info = requests.get(f"{running.url}/server_info", timeout=60).json()
    chosen = {name: info[name] for name in ("device", "attention_backend", "dtype", "disable_overlap_schedule")}
    assert chosen == {
        "device": "cpu",
        "attention_backend": "torch_cpu",
        "dtype": "float32",
        "disable_overlap_schedule": True,
    }
    assert info["enable_mixed_chunk"]
