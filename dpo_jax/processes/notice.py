"""The notice that a machine of Google's cloud will be taken away, or stopped for maintenance, as SIGTERM.

A cluster's scheduler sends SIGTERM itself. A bare VM is told by its metadata server, a minute or half of one before it
stops: `instance/preempted` becomes TRUE, or `instance/maintenance-event` TERMINATE_ON_HOST_MAINTENANCE (that of TPUs,
which cannot move). https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
"""

import contextlib
import os
import signal
import threading
import urllib.request
from pathlib import Path

from dpo_jax.voice import say

PERIOD = 3.0
"""Seconds between two looks."""
_SIGNS = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_HOST = "GCE_METADATA_HOST"
"""Environment variable of Google's own libraries: host[:port] of the metadata server."""
_PRODUCT = Path("/sys/class/dmi/id/product_name")

_listening = threading.Lock()


def listen() -> None:
    """On a machine of Google's cloud, send this process SIGTERM once its end is announced. Elsewhere do nothing."""
    if on_google() and _listening.acquire(blocking=False):  # once a process
        threading.Thread(target=_listen, daemon=True).start()


def on_google() -> bool:
    """Whether there is a metadata server to ask, without asking it."""
    with contextlib.suppress(OSError):
        return _HOST in os.environ or _PRODUCT.read_text().startswith("Google")
    return False


def announced() -> str | None:
    """What the metadata server announces, in words; None while nothing is. Raises `OSError` without an answer."""
    for name, value in _SIGNS.items():
        place = f"http://{os.environ.get(_HOST, 'metadata.google.internal')}/computeMetadata/v1/instance/{name}"
        request = urllib.request.Request(place, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=PERIOD) as reply:
            if reply.read(100).decode(errors="replace").strip() == value:
                return f"{name} is {value}"
    return None


def _listen() -> None:
    wait = threading.Event()
    while not wait.wait(PERIOD):
        with contextlib.suppress(OSError):  # it answers again later, or there is none, and SIGTERM comes by itself
            if told := announced():
                say(f"this machine is about to be stopped ({told})", "warning")
                os.kill(os.getpid(), signal.SIGTERM)
                return
