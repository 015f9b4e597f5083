"""The launcher without SGLang: a stand-in takes the server's place."""

import sys
import time

import psutil
import pytest

from slos_sglang.engine import launch

SERVES = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self): self.answer(b"{}")
    def do_POST(self): self.rfile.read(int(self.headers["Content-Length"])); self.answer(b'{"text": "x"}')
    def answer(self, body):
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(monkeypatch):
    def put(program):
        monkeypatch.setattr(launch, "_command", lambda scheduler, config: [sys.executable, "-c", program])

    return put


def test_nothing_is_left_behind(stand_in, tmp_path):
    stand_in(SERVES)
    with pytest.raises(KeyError), launch.server("model", log=tmp_path / "log") as running:
        assert running.url == f"http://127.0.0.1:{running.port}"
        child = int(running.log_path.read_text().split()[1])
        assert psutil.pid_exists(child)
        raise KeyError("the caller's own trouble")
    deadline_s = time.monotonic() + 10  # the kernel may take a moment
    while not (ended(running.pid) and ended(child)):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def ended(pid: int) -> bool:
    """Gone, or an orphan that waits for its new parent to notice."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_an_early_death_shows_the_last_lines_of_the_log(stand_in, tmp_path):
    stand_in("print('first'); [print('line', n) for n in range(99)]; raise SystemExit('no such model')")
    with pytest.raises(RuntimeError, match=r"(?s)status 1.*line 98.*no such model") as caught, launch.server("model"):
        pass
    assert "first" not in str(caught.value)


def test_waiting_has_an_end(stand_in):
    stand_in("import time; time.sleep(600)")
    with pytest.raises(RuntimeError, match=r"not ready after 0\.5 s"), launch.server("model", timeout_s=0.5):
        pass


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"scheduler.*'fast'"), launch.server("model", scheduler="fast"):
        pass
    with pytest.raises(ValueError, match="config"), launch.server("model", scheduler="stock", config="slo.yaml"):
        pass
