"""One model and one server that most of these tests share; SGLang's own memory checks run after every step."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from slos_sglang.engine.launch import Server, server
from slos_sglang.telemetry.events import Event, read_events
from slos_sglang.tiny_model import make_tiny_model

# A leak then ends the scheduler, busy or idle, and with it the server.
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
# Small, so that long prompts are computed piece by piece beside the decoders.
CHUNKS = ("--chunked-prefill-size", "96")
IDLE_WITHIN_S = 30.0


@dataclass(frozen=True)
class Running:
    """A server with the SLO scheduler, its model, and the events it writes."""

    server: Server
    model: Path
    events_path: Path

    @property
    def url(self) -> str:
        return self.server.url

    def post(self, path: str, body: dict[str, Any] | None = None) -> requests.Response:
        return requests.post(self.url + path, json=body or {}, timeout=120)

    def loads(self) -> dict[str, Any]:
        """What the scheduler says of itself."""
        return requests.get(f"{self.url}/v1/loads", timeout=30).json()["loads"][0]

    def events(self, rank: int = 0) -> list[Event]:
        return read_events(str(self.events_path).format(rank=rank))

    def assert_nothing_is_left(self) -> None:
        """Idle, nothing queued or parked, all memory free after a flush, no error logged, and it still answers."""
        deadline_s = time.monotonic() + IDLE_WITHIN_S
        while not (flushed := self.post("/flush_cache")).ok:
            assert time.monotonic() < deadline_s, f"not idle: {self.loads()}"
            time.sleep(0.1)
        assert flushed.ok
        load = self.loads()
        assert (load["num_running_reqs"], load["num_waiting_reqs"], load["num_used_tokens"]) == (0, 0, 0), load
        log = self.server.log_path.read_text(encoding="utf-8", errors="replace")
        assert "Traceback" not in log, log[log.index("Traceback") :][:4000]
        answer = self.post("/generate", {"text": "Hello", "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}})
        assert answer.json()["meta_info"]["completion_tokens"] == 3


@contextmanager
def slo_server(folder: Path, model: Path, *flags: str, **env: str) -> Iterator[Running]:
    """A server with strict memory checks, where each tensor-parallel rank writes its own events."""
    events, config = folder / "events-{rank}.jsonl", folder / "slo.yaml"
    config.write_text(json.dumps({"events": str(events)}), encoding="utf-8")
    with server(model, *flags, config=config, log=folder / "server.log", env=STRICT | env) as started:
        yield Running(server=started, model=model, events_path=events)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the embedded model."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Running]:
    """The server that the tests share."""
    with slo_server(tmp_path_factory.mktemp("shared"), tiny_model, *CHUNKS) as running:
        yield running


@pytest.fixture(scope="session")
def slos_server(shared: Running) -> Server:
    return shared.server


@pytest.fixture(scope="session")
def stock_server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """Stock scheduling on the same platform, with the same flags."""
    log = tmp_path_factory.mktemp("stock") / "server.log"
    with server(tiny_model, "--enable-mixed-chunk", *CHUNKS, scheduler="stock", log=log) as running:
        yield running
