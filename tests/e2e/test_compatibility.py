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
    """The SLO goes through in the body, the receipt and a decline come back."""

    def body(slo: dict[str, Any]) -> dict[str, Any]:
        sampling = {"max_new_tokens": 5, "ignore_eos": True, "custom_params": staged("gateway", slo)}
        return {"text": "Hello", "stream": True, "sampling_params": sampling}

    with gateway(shared.url, tmp_path / "gateway.log") as url:
        with requests.post(f"{url}/generate", json=body(SLO), stream=True, timeout=60) as response:
            assert response.status_code == 200
            events = [line[6:] for line in response.iter_lines() if line.startswith(b"data: ")]
        assert events.pop() == b"[DONE]"
        metas = [json.loads(event)["meta_info"] for event in events]
        assert [meta["completion_tokens"] for meta in metas] == [1, 2, 3, 4, 5]
        assert [bool(meta.get("slo")) for meta in metas] == [False] * 4 + [True]
        assert metas[-1]["slo"]["attained"]
        declined = requests.post(f"{url}/generate", json=body(SPENT), timeout=60)
        assert declined.status_code == 429
        assert "declined" in declined.text
        malformed = requests.post(f"{url}/generate", json=body({"tpot_mss": 5}), timeout=60)
        assert malformed.status_code == 400
        assert "tpot_ms" in malformed.text
    assert [event.tier for event in arrived(shared, "gateway")][:1] == ["standard"]
