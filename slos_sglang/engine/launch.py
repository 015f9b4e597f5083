"""Starts a server for tests, the demo and benchmarks, and never leaves one behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import requests

HOST = "127.0.0.1"
LOG_TAIL_LINES = 30
STOP_S = 10.0


@dataclass(frozen=True)
class Server:
    """A running server: where it answers, the process group it leads, and its log."""

    url: str
    port: int
    pid: int
    log_path: Path


@contextmanager
def server(
    model: str | Path,
    *flags: str,
    scheduler: Literal["slos", "stock"] = "slos",
    config: str | Path | None = None,
    log: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300,
) -> Iterator[Server]:
    """Serve `model` on a free local port while the context lasts; entered once a first token has come.

    scheduler  "slos": `slos-sglang serve`; "stock": SGLang's own scheduling on the same platform
    flags      any flags of `sglang serve`
    config     the operator's configuration file, for "slos" only
    log        where the server's output goes; a temporary file by default
    env        set on top of this process's environment

    Raises `RuntimeError` with the log's last lines where the server dies early or is not ready after `timeout_s`.
    """
    if scheduler not in ("slos", "stock"):
        raise ValueError(f"scheduler must be 'slos' or 'stock', not {scheduler!r}")
    if config is not None and scheduler == "stock":
        raise ValueError(f"config ({str(config)!r}) is for scheduler='slos' only")
    port = free_port()
    command = [*_command(scheduler, config), "--model-path", str(model), "--host", HOST, "--port", str(port)]
    with _open_log(log) as output:
        process = subprocess.Popen(
            [*command, *flags],
            env=_environment(scheduler, env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        running = Server(url=f"http://{HOST}:{port}", port=port, pid=process.pid, log_path=Path(output.name))
        try:
            _wait_until_ready(running, process, timeout_s)
            yield running
        finally:
            _stop(process)


def free_port() -> int:
    """A local TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _command(scheduler: str, config: str | Path | None) -> list[str]:
    if scheduler == "stock":
        return [sys.executable, "-m", "sglang.launch_server"]
    command = [sys.executable, "-c", "from slos_sglang.cli.main import main; main()", "serve"]
    return command if config is None else [*command, "--slo-config", str(config)]


def _environment(scheduler: str, env: Mapping[str, str] | None) -> dict[str, str]:
    result = {name: value for name, value in os.environ.items() if not name.startswith("SLOS_SGLANG")}
    if scheduler == "stock":
        result["SGLANG_PLUGINS"] = "torch_cpu"
    return result | dict(env or {})


def _open_log(log: str | Path | None) -> IO[Any]:
    if log is not None:
        return open(log, "wb")
    return tempfile.NamedTemporaryFile(prefix="slos-server-", suffix=".log", delete=False)


def _wait_until_ready(running: Server, process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Poll until the server has generated a token; the first one also compiles and warms what comes lazily."""
    body: dict[str, Any] = {"text": "Hello", "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}:\n{_tail(running.log_path)}")
        try:
            if requests.get(f"{running.url}/v1/models", timeout=5).ok:
                answer = requests.post(f"{running.url}/generate", json=body, timeout=60)
                if answer.ok and "text" in answer.json():
                    return
        except (requests.ConnectionError, requests.Timeout, json.JSONDecodeError):
            pass  # not there yet
        time.sleep(0.2)
    raise RuntimeError(f"the server was not ready after {timeout_s:g} s:\n{_tail(running.log_path)}")


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the leader to shut down, then end the whole group: a child may outlive it.

    The leader alone is asked: it would take the end of a child for a crash and collect diagnostics.
    """
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOP_S)
    with suppress(ProcessLookupError):  # all gone
        os.killpg(process.pid, signal.SIGKILL)  # the leader of a new session leads a group of the same number
    process.wait()
