"""`dpo-jax serve`, asked by the official `openai` client and by clients that misbehave; `dpo-jax chat`."""

import asyncio
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tiny
import uvicorn

from dpo_jax import cli
from dpo_jax.commands.serve import TOKEN, talker_of
from dpo_jax.complete.serving.openai_api import application
from dpo_jax.complete.serving.talker import Talker
from dpo_jax.config import ServeRun

MESSAGES: list[Any] = [{"role": "user", "content": "the film was good"}]
ASKED: Any = {"model": "tiny", "messages": MESSAGES, "seed": 3, "max_completion_tokens": 12}
MAX_BODY = 20_000


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talker]:
    folder = tiny.folder(tmp_path_factory.mktemp("served") / "policy", layers=1)
    talker = talker_of(str(folder), ServeRun(model=(str(folder),), batch_size=4), waiting=64)
    talker.model = "tiny"
    yield talker
    talker.close()
    assert not talker.is_alive()


@contextlib.contextmanager
def served(talker: Talker, token: str | None = None) -> Iterator[str]:
    """The address of a running server."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = application({"tiny": talker}, token=token, max_body=MAX_BODY)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def address(talker: Talker) -> Iterator[str]:
    with served(talker) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


def test_plain_streamed_and_again(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**ASKED)
    (choice,) = plain.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert plain.usage is not None
    assert plain.usage.completion_tokens <= 12
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
    chunks = list(client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == choice.finish_reason
    assert chunks[-1].usage == plain.usage
    assert not chunks[-1].choices
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_logprobs_and_choices(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(**ASKED, n=3, logprobs=True, top_logprobs=5)
    assert [c.index for c in found.choices] == [0, 1, 2]
    assert len({c.message.content for c in found.choices}) == 3
    assert found.choices[0].message.content == client.chat.completions.create(**ASKED).choices[0].message.content
    for choice in found.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        text = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
        assert text.decode(errors="replace").removesuffix("<|im_end|>") == choice.message.content
        for token in choice.logprobs.content:
            assert len({top.token for top in token.top_logprobs}) == 5
            order = [top.logprob for top in token.top_logprobs]
            assert order == sorted(order, reverse=True)
            assert token.logprob <= order[0]
    old = client.completions.create(model="tiny", prompt=[[260], [40, 41]], logprobs=2, max_tokens=4, temperature=0)
    assert [c.index for c in old.choices] == [0, 1]
    logprobs = old.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    for logp, tops in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert logp == max(tops.values())  # greedy


def test_stop_strings_are_cut_off(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="the good", max_tokens=24, seed=1).choices[0].text
    stop = whole[5:8]
    cut = client.completions.create(model="tiny", prompt="the good", max_tokens=24, seed=1, stop=["absent", stop])
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    pieces = client.completions.create(model="tiny", prompt="the good", max_tokens=24, seed=1, stop=stop, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == whole[: whole.index(stop)]


def test_64_at_once_say_what_each_says_alone(client: openai.OpenAI, address: str) -> None:
    async def all_of_them() -> list[str | None]:
        many = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)
        asked = [many.chat.completions.create(**(ASKED | {"seed": i})) for i in range(64)]
        return [(await reply).choices[0].message.content for reply in asyncio.as_completed(asked)]

    together = asyncio.run(all_of_them())
    alone = [client.chat.completions.create(**(ASKED | {"seed": i})).choices[0].message.content for i in (0, 17, 63)]
    assert len(together) == 64
    assert set(alone) <= set(together)


def test_connections_that_are_dropped_free_their_rows(client: openai.OpenAI, address: str, talker: Talker) -> None:
    long = ASKED | {"max_completion_tokens": 200, "n": 4, "temperature": 2}
    body = long | {"stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=120) as stream:  # it compiles first
        next(stream.iter_lines())
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/chat/completions", json=long, timeout=0.05)
    assert client.chat.completions.create(**ASKED).choices
    end = time.monotonic() + 20
    while len(talker._live.free) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(talker._live.free) == 4


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages", "king"),
        ({"messages": [{"role": "user", "content": "the " * 300}]}, "messages", "is served with 256"),
        ({"max_completion_tokens": 250}, "max_completion_tokens", "ask for at most"),
        ({"temperature": -1}, "temperature", "from 0 to 2"),
        ({"temperature": 10**400}, "temperature", "from 0 to 2"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"n": True}, "n", "whole number"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"temprature": 1}, "temprature", "not known"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ],
)
def test_what_cannot_be_honoured_is_refused(address: str, change: dict[str, Any], param: str, message: str) -> None:
    reply = httpx.post(f"{address}/v1/chat/completions", json=ASKED | change)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_other_errors_have_their_status(address: str, client: openai.OpenAI, talker: Talker) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here; there are tiny"):
        client.chat.completions.create(**(ASKED | {"model": "gpt-4"}))
    for body in (b"", b"[1", b"[]", b"\xff", b"[" * 10_000):
        assert httpx.post(f"{address}/v1/chat/completions", content=body).status_code == 400
    assert httpx.post(f"{address}/v1/completions", content=b"x" * (MAX_BODY + 1)).status_code == 413
    assert httpx.get(f"{address}/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "stopped": []}
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="tiny", prompt=["a"] * 100, max_tokens=200)  # 64 may wait
    assert client.chat.completions.create(**ASKED).choices, "it goes on"


def test_a_token_is_asked_for(talker: Talker) -> None:
    with served(talker, "secret") as address:
        wrong = openai.OpenAI(base_url=f"{address}/v1", api_key="other", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        with pytest.raises(openai.AuthenticationError):
            wrong.chat.completions.create(**ASKED)
        right = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        assert [m.id for m in right.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], f"set {TOKEN}"),
        (["--host", "here"], "no IP address"),
        (["--model", "twice"], "given twice"),
        (["--port", "70000"], "--port"),
    ],
)
def test_serve_options(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert cli.main(["serve", "--model", "twice", *words]) == 2
    assert message in capsys.readouterr().err


def test_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = str(tiny.folder(tmp_path / "policy", layers=1)), tmp_path / "said.jsonl"
    lines = ["the film", "/undo", "/system be kind", "was it good", "and bad", f"/save {out}", "/reset", "/quit", "no"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    words = ["chat", "--model", folder, "--against", folder, "--seed", "1", "--sample.max_new_tokens", "8"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    first, second = (json.loads(line)["messages"] for line in out.read_text().splitlines())
    assert [m["role"] for m in first] == ["system", "user", "assistant", "user", "assistant"]
    assert first == second, "one model and seed says the same in both dialogues"
    assert first[1]["content"] == "was it good"
    assert first[2]["content"].strip() in shown


def test_chat_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/sytem x\n"))
    assert cli.main(["chat", "--model", str(tiny.folder(tmp_path / "policy", layers=1))]) == 2
    assert "/sytem is no command" in capsys.readouterr().err
