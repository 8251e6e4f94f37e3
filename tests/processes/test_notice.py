"""The notice of a machine of Google's cloud, from a metadata server of the test's own."""

import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from dpo_jax.processes import notice

SAID: dict[str, str] = {}


class Metadata(BaseHTTPRequestHandler):
    """What Google's server answers: a word, to those who ask by its own header."""

    def do_GET(self) -> None:
        known = SAID.get(self.path.removeprefix("/computeMetadata/v1/instance/"))
        self.send_response(404 if known is None or self.headers["Metadata-Flavor"] != "Google" else 200)
        self.end_headers()
        self.wfile.write((known or "").encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    SAID.update({"preempted": "FALSE", "maintenance-event": "NONE"})
    with HTTPServer(("127.0.0.1", 0), Metadata) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{http.server_address[1]}")
        monkeypatch.setattr(notice, "PERIOD", 0.05)
        yield
        http.shutdown()


def test_what_is_announced(server: None) -> None:
    assert notice.announced() is None
    SAID["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"  # the machine goes on
    assert notice.announced() is None
    SAID["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert notice.announced() == "maintenance-event is TERMINATE_ON_HOST_MAINTENANCE"
    SAID["preempted"] = "TRUE"
    assert notice.announced() == "preempted is TRUE"
    SAID.clear()
    with pytest.raises(OSError, match="404"):
        notice.announced()


def test_it_becomes_sigterm(server: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    monkeypatch.setattr(notice, "_listening", threading.Lock())
    try:
        notice.listen()
        notice.listen()
        time.sleep(0.2)
        assert not heard
        SAID["preempted"] = "TRUE"
        until = time.monotonic() + 20
        while not heard and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert "this machine is about to be stopped (preempted is TRUE)" in capsys.readouterr().err


def test_elsewhere_nobody_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    product = tmp_path / "product_name"
    monkeypatch.setattr(notice, "_PRODUCT", product)
    assert not notice.on_google()
    product.write_text("Google Compute Engine\n")
    assert notice.on_google()
