"""Other people's clients, unchanged: the OpenAI package, SGLang's own benchmark, and SGLang's gateway in front."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from conftest import Running

from slos_sglang.engine.launch import free_port
from slos_sglang.telemetry.events import Arrive

pytestmark = pytest.mark.e2e

SLO = {"ttft_ms": 60_000, "tpot_ms": 5_000}
SPENT = {"budget_ms": 0, "on_decline": "reject"}
READY_WITHIN_S = 60.0


def staged(stage: str, slo: dict[str, Any] = SLO) -> dict[str, Any]:
    return {"slo": {**slo, "stage": stage}}


def arrived(running: Running, stage: str) -> list[Arrive]:
    return [event for event in running.events() if isinstance(event, Arrive) and event.stage == stage]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_openais_client(shared: Running, kind: str, stream: bool) -> None:
    client = openai.OpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    create: Any = client.chat.completions.create if kind == "chat" else client.completions.create
    asked = {"messages": [{"role": "user", "content": "hi"}]} if kind == "chat" else {"prompt": "hi"}

    def ask(custom: dict[str, Any] | None) -> list[Any]:
        extra = {"ignore_eos": True} if custom is None else {"ignore_eos": True, "custom_params": custom}
        answer = create(model=model, max_tokens=6, temperature=0, stream=stream, extra_body=extra, **asked)
        return list(answer) if stream else [answer]

    def text(parts: list[Any]) -> str:
        choices = [choice for part in parts for choice in part.choices]
        if kind == "completions":
            return "".join(choice.text for choice in choices)
        return "".join((choice.delta if stream else choice.message).content or "" for choice in choices)

    def receipts(parts: list[Any]) -> list[Any]:
        metadata = ((part.model_extra or {}).get("metadata") or getattr(part, "metadata", None) or {} for part in parts)
        return [each["slo"] for each in metadata if each.get("slo")]

    plain, annotated = ask(None), ask(staged("openai"))
    assert receipts(plain) == []
    (receipt,) = receipts(annotated)
    assert (receipt["tier"], receipt["attained"], receipt["tpot_target_ms"]) == ("standard", True, 5_000)
    assert text(annotated) == text(plain) != ""


def test_sglangs_own_benchmark(shared: Running, tmp_path: Path) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True, "custom_params": staged("bench")}
    results = tmp_path / "results.jsonl"
    command = [
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", shared.url),
        *("--model", str(shared.model), "--tokenizer", str(shared.model), "--dataset-name", "random-ids"),
        *("--num-prompts", "12", "--random-input-len", "64", "--random-output-len", "8", "--random-range-ratio", "1"),
        *("--warmup-requests", "1", "--disable-tqdm", "--output-file", str(results)),
        *("--extra-request-body", json.dumps({"sampling_params": sampling})),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(results.read_text().splitlines()[-1])
    assert (result["completed"], result["total_output_tokens"]) == (12, 12 * 8)
    assert len(arrived(shared, "bench")) == 12 + 1


@contextmanager
def gateway(worker: str, log: Path) -> Iterator[str]:
    """SGLang's gateway in front of one worker."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        *(sys.executable, "-m", "sglang_router.launch_router", "--worker-urls", worker, "--policy", "round_robin"),
        *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())),
    ]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait_for_worker(url, process, log)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_worker(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Its /health says 200 before it knows a worker."""
    deadline_s = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline_s:
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        try:
            if requests.get(f"{url}/workers", timeout=5).json().get("workers"):
                return
        except (requests.ConnectionError, requests.Timeout):
            pass  # not there yet
        time.sleep(0.2)
    raise AssertionError(f"no worker after {READY_WITHIN_S:g} s: {log.read_text(errors='replace')[-2000:]}")


def test_behind_sglangs_gateway(shared: Running, tmp_path: Path) -> None:
    """What it forwards whole (completions), the SLO travels in; receipts and refusals come back, streaming too.

    Of `/generate` and chat it forwards only the fields it knows, and `custom_params` is none of them: those are served
    as requests without an SLO.
    """
    with gateway(shared.url, tmp_path / "gateway.log") as url:

        def post(slo: dict[str, Any]) -> requests.Response:
            body = {"model": str(shared.model), "prompt": "Hello", "max_tokens": 5, "ignore_eos": True, "stream": True}
            return requests.post(
                f"{url}/v1/completions", json=body | {"custom_params": staged("gateway", slo)}, timeout=60
            )

        answered = post(SLO)
        assert answered.status_code == 200, answered.text
        *events, done = [line[6:] for line in answered.text.splitlines() if line.startswith("data: ")]
        assert done == "[DONE]"
        (receipt,) = [event["metadata"]["slo"] for event in map(json.loads, events) if event.get("metadata")]
        assert (receipt["tier"], receipt["attained"]) == ("standard", True)
        for slo, status, says in ((SPENT, 429, "declined"), ({"tpot_mss": 5}, 400, "tpot_ms")):
            refused = post(slo)
            assert (refused.status_code, says in refused.text) == (status, True), refused.text

        sampling = {"max_new_tokens": 5, "ignore_eos": True, "custom_params": staged("native", SLO)}
        body = {"text": "Hello", "stream": True, "sampling_params": sampling}
        native = requests.post(f"{url}/generate", json=body, timeout=60)
        last = [line[6:] for line in native.text.splitlines() if line.startswith("data: {")][-1]
        assert json.loads(last)["meta_info"]["completion_tokens"] == 5
    assert [event.tier for event in arrived(shared, "gateway")][:1] == ["standard"]
