"""An OpenAI-compatible server on loopback for tests: it answers as real ones do, with their faults."""

import contextlib
import email.utils
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], str | dict[str, Any]]
FAULTS = ("drop", "delay", "500", "503", "429", "429 date", "truncated", "trickle", "not json", "no choices")


class ChatServer:
    """What it saw and how it behaves; changed by tests while it runs.

    Attributes:
      answer: a request's body -> the text, or a message.
      faults: called with a request's body and how often that was asked -> one of `FAULTS`, or None for an answer.
      answered: how often each request (a hash of its body) was answered whole.
      keys: Authorization headers seen.
      pause: seconds before each answer.
    """

    def __init__(self, answer: Answer):
        self.answer = answer
        self.faults: Callable[[dict[str, Any], int], str | None] = lambda body, times: None
        self.finish_reason: Callable[[dict[str, Any]], str] = lambda body: "stop"
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.keys: set[str | None] = set()
        self.usage, self.pause = True, 0.0
        self.status: tuple[int, str] | None = None
        self.in_flight = self.most_in_flight = 0
        self.starts: list[float] = []
        self.lock = threading.Lock()
        self.url = ""


def identity(body: dict[str, Any]) -> str:
    """A request's own hash."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: ChatServer

    def log_message(self, *args) -> None:
        """Nothing is said."""

    def do_POST(self) -> None:
        state, body = self.state, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = identity(body)
        with state.lock:
            state.asked[key] += 1
            state.keys.add(self.headers["Authorization"])
            state.starts.append(time.monotonic())
            state.in_flight += 1
            state.most_in_flight = max(state.most_in_flight, state.in_flight)
            times = state.asked[key]
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._fault(state.faults(body, times), body, key)
        finally:
            with state.lock:
                state.in_flight -= 1

    def _send(self, status: int, payload: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def _fault(self, fault: str | None, body: dict[str, Any], key: str) -> None:
        state = self.state
        if state.status is not None:
            self._send(state.status[0], state.status[1].encode())
        elif fault == "drop":
            self.close_connection = True
        elif fault in ("500", "503"):
            self._send(int(fault), b"<html>overloaded</html>")
        elif fault == "429":
            self._send(429, b'{"error": {"message": "slow down"}}', Retry_After="0.05")
        elif fault == "429 date":
            self._send(429, b"{}", Retry_After=email.utils.formatdate(time.time() + 1, usegmt=True))
        elif fault == "not json":
            self._send(200, b"<html>a proxy's page</html>")
        elif fault == "no choices":
            self._send(200, b'{"choices": []}')
        else:
            self._answer(fault, body, key)

    def _answer(self, fault: str | None, body: dict[str, Any], key: str) -> None:
        state = self.state
        time.sleep(state.pause)
        found = state.answer(body)
        message = {"role": "assistant", "content": found} if isinstance(found, str) else dict(found)
        logprobs = message.pop("logprobs", None)
        finish = message.pop("finish_reason", state.finish_reason(body))
        usage = {"prompt_tokens": 10, "completion_tokens": 5} if state.usage else None
        kind = "application/json"
        if body.get("stream"):
            kind = "text/event-stream"
            text = message.get("content") or ""
            deltas = [{**message, "content": text[i : i + 7]} for i in range(0, max(len(text), 1), 7)]
            events: list[Any] = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
            events += [{"choices": [{"delta": {}, "finish_reason": finish}]}, {"choices": [], "usage": usage}]
            payload = "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode() + b"data: [DONE]\n\n"
        else:
            choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs}
            payload = json.dumps({"choices": [choice], "usage": usage}).encode()
        if fault == "delay":
            time.sleep(0.7)
        if fault == "truncated":
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload[: len(payload) // 2])
            self.close_connection = True
            return
        if fault == "trickle":
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            for byte in payload[:20]:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.06)
            self.close_connection = True
            return
        self._send(200, payload, Content_Type=kind)
        if fault != "delay":
            with state.lock:
                state.answered[key] += 1


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[ChatServer]:
    """A server that runs as long as the block; its `url` ends in /v1."""
    state = ChatServer(answer)
    handler = type("Handler", (_Handler,), {"state": state})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield state
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
