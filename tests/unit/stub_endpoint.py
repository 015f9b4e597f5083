"""An HTTP server that answers like SGLang's `/generate` and keeps the bytes it was sent."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StubEndpoint(ThreadingHTTPServer):
    """`bodies` holds the raw bodies of /generate in order of arrival; `answer(request)` gives the text of a call.

    `aborted` holds the ids that were to be aborted; `an_abort` is set with the first.
    """

    daemon_threads = True

    def __init__(self, answer=lambda request: "x", delay_s: float = 0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[bytes] = []
        self.answer = answer
        self.delay_s = delay_s
        self.receipts = True
        self.status = 200
        self.aborted: list[str] = []
        self.an_abort = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def requests(self) -> list[dict]:
        return [json.loads(body) for body in self.bodies]

    @property
    def slos(self) -> list[dict | None]:
        """`custom_params.slo` of each request."""
        return [(r["sampling_params"].get("custom_params") or {}).get("slo") for r in self.requests]

    def slo(self, stage: str) -> dict:
        """The one SLO sent for a stage path."""
        (found,) = [slo for slo in self.slos if slo and slo.get("stage") == stage]
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._send(json.dumps({"model_path": "stub"}).encode())

    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/abort_request":
            server.aborted.append(json.loads(body)["rid"])
            server.an_abort.set()
            self._send(b"")
            return
        server.bodies.append(body)
        time.sleep(server.delay_s)
        request = json.loads(body)
        if server.status != 200:
            self._send(b'{"error": {"message": "declined"}}', server.status)
        elif request.get("stream"):
            text = server.answer(request)
            chunks = [self._one(request, text[: len(text) // 2], last=False), self._one(request, text, last=True)]
            lines = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
            self._send(b"".join([*lines, b"data: [DONE]\n\n"]))
        elif isinstance(many := request.get("text", request.get("input_ids")), list):
            self._send(json.dumps([self._one(request, "", index=i) for i in range(len(many))]).encode())
        else:
            self._send(json.dumps(self._one(request, server.answer(request))).encode())

    def _one(self, request: dict, text: str, *, last: bool = True, index: int = 0) -> dict:
        meta = {
            "prompt_tokens": 3,
            "completion_tokens": len(text),
            "input_token_logprobs": [[-1.0, 1, "t"], [-1.0 - index, 2, "u"]],
            "output_token_logprobs": [],
        }
        slo = (request["sampling_params"].get("custom_params") or {}).get("slo")
        if slo and last and self.server.receipts:
            meta["slo"] = {"tier": "standard", "declined": False, "attained": index == 0, "ttft_ms": 5.0 + index}
        return {"text": text, "meta_info": meta}

    def _send(self, body: bytes, status: int = 200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def stub_endpoint(**kwargs):
    server = StubEndpoint(**kwargs)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
