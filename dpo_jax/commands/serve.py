"""`dpo-jax serve`: models behind an OpenAI-compatible endpoint."""

import ipaddress
import os
import socket
from collections.abc import Mapping

import uvicorn

from dpo_jax.complete.serving.openai_api import application
from dpo_jax.complete.serving.talker import Talker
from dpo_jax.config import ChatRun, ServeRun
from dpo_jax.errors import InputError
from dpo_jax.files.log import say
from dpo_jax.mesh import make_mesh
from dpo_jax.sample.live import Live
from dpo_jax.weights.opened import open_checkpoint
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import check_vocabulary, text_ids

TOKEN = "DPO_JAX_SERVE_TOKEN"
"""Environment variable with what clients must send as their API key."""


def talker_of(source: str, run: ServeRun | ChatRun, *, waiting: int = 1) -> Talker:
    """A running talker of the model `source`. Raises `InputError`."""
    place = open_checkpoint(source)
    tokenizer = place.tokenizer()
    check_vocabulary(tokenizer, place.architecture)
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    model, variables = load_pretrained(place, mesh=mesh, dtype=run.dtype)
    live = Live(
        model,
        variables,
        rows=run.batch_size,
        longest=run.max_length,
        vocabulary=text_ids(tokenizer, model.config),
        config=run.sample,
        mesh=mesh,
    )
    talker = Talker(source, live, tokenizer, run.template, waiting)
    talker.start()
    return talker


def _check_host(host: str, token: str | None) -> None:
    """A host that others can reach needs a token."""
    try:
        own = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError as problem:
        raise InputError(f"--host {host} is no IP address; write 127.0.0.1, say") from problem
    if not own and not token:
        raise InputError(
            f"--host {host} can be reached by others: set {TOKEN} to what their requests must send as the API key, or "
            "leave --host out"
        )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as problem:
        listener.close()
        raise InputError(f"--host {host} --port {port}: {problem.strerror}; take another --port") from problem
    return listener


def serve(run: ServeRun) -> None:
    """The `serve` command: until it is interrupted."""
    token = os.environ.get(TOKEN) or None
    _check_host(run.host, token)
    listener = _listen(run.host, run.port)
    talkers: Mapping[str, Talker] = {name: talker_of(name, run, waiting=run.queue) for name in run.model}
    app = application(talkers, token=token, max_body=run.max_body)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    host = f"[{run.host}]" if ":" in run.host else run.host
    say(f"serving {', '.join(run.model)} at http://{host}:{listener.getsockname()[1]}/v1 (Ctrl-C ends it)")
    try:
        server.run(sockets=[listener])
    finally:
        for talker in talkers.values():
            talker.close()
