"""The client of OpenAI-compatible endpoints against a server with every fault: each question answered exactly once."""

import asyncio
import datetime
import gc
import json

import chat_server
import httpx
import pytest

from dpo_jax.complete.asking.chat_client import BudgetReached, ChatClient, Question, _reply
from dpo_jax.complete.asking.http import retry_after
from dpo_jax.complete.asking.reply_cache import ReplyCache
from dpo_jax.config.commands.judge import EndpointConfig
from dpo_jax.errors import InputError


def question(text, **more) -> Question:
    return Question(({"role": "user", "content": text},), **more)


def echo(body) -> str:
    return f"[[{body['messages'][-1]['content']}]]"


def client(server, folder, **options) -> ChatClient:
    config = EndpointConfig(url=server.url, model="m", **{"timeout": 0.5, "attempts": 8, **options})
    return ChatClient(config, ReplyCache(folder), first_wait=0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_every_question_is_answered_once_whatever_the_network_does(tmp_path, stream) -> None:
    with chat_server.serving(echo) as server:
        faults, server.pause = chat_server.FAULTS, 0.05
        server.faults = lambda body, times: (
            faults[(int(body["messages"][-1]["content"]) + times) % len(faults)]
            if times <= int(body["messages"][-1]["content"]) % 3
            else None
        )
        ask = client(server, tmp_path, concurrency=16, stream=stream)
        found = ask.ask([question(str(i)) for i in range(30)])
        assert [reply.text for reply in found] == [f"[[{i}]]" for i in range(30)]
        assert set(server.answered.values()) == {1}
        assert len(server.answered) == 30
        assert server.most_in_flight > 4
        assert (ask.prompt_tokens, ask.completion_tokens) == (300, 150)
        before = sum(server.asked.values())
        again = client(server, tmp_path, stream=not stream)
        assert again.ask([question(str(i)) for i in range(30)]) == found
        assert (again.asked, again.cached) == (0, 30)
        assert sum(server.asked.values()) == before
        # Another version of the prompt, or another seed, is another question; equal ones are asked once.
        server.faults = lambda body, times: None
        again.ask([question("1", version="2"), question("1", version="2"), question("1", seed=5)])
        assert again.asked == 2


def test_half_of_a_surrogate_pair_is_no_text() -> None:
    def said(text: str) -> str:
        return _reply({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).text

    assert said("cut \ud83d off") == "cut \ufffd off"
    assert said("\ud83d\ude00") == "\U0001f600"  # of a stream, whose two halves came apart


def test_refusals_cut_answers_and_reasoning(tmp_path) -> None:
    kinds = {
        "refusal": {"content": None, "refusal": "I can't."},
        "length": {"content": "Rating: 1", "finish_reason": "length"},
        "reasoning": {"content": "[[7]]", "reasoning_content": "perhaps [[2]]"},
        "empty": {"content": None},
    }
    with chat_server.serving(lambda body: kinds[body["messages"][-1]["content"]]) as server:
        refusal, cut, reasoned, empty = client(server, tmp_path).ask([question(kind) for kind in kinds])
    assert (refusal.text, refusal.whole) == ("I can't.", False)
    assert not cut.whole
    assert (reasoned.text, reasoned.reasoning, reasoned.whole) == ("[[7]]", "perhaps [[2]]", True)
    assert empty.text == ""


def test_the_key_stands_in_the_header_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with chat_server.serving(echo) as server:
        client(server, tmp_path, key_variable="MY_KEY").ask([question("1")])
        assert server.keys == {"Bearer sk-secret"}
        server.status = 401, '{"error": "wrong key sk-secret"}'
        with pytest.raises(InputError, match=r"HTTP 401: .*wrong key \*\*\*.*; MY_KEY is refused"):
            client(server, tmp_path, key_variable="MY_KEY").ask([question("2")])
        with pytest.raises(InputError, match="UNSET_KEY is not set"):
            client(server, tmp_path, key_variable="UNSET_KEY").ask([question("2")])
    assert "sk-secret" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    monkeypatch.setenv("MY_KEY", "sk-secret\nx")
    with pytest.raises(InputError, match="MY_KEY holds characters that no key has") as caught:
        client(server, tmp_path, key_variable="MY_KEY")
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="name of an environment variable"):
        EndpointConfig(url="http://a/v1", model="m", key_variable="sk-secret")
    with pytest.raises(InputError, match="leave the password out of the URL"):
        ChatClient(EndpointConfig(url="http://u:p@a/v1", model="m"), ReplyCache(tmp_path))


def test_a_budget_is_never_passed_and_the_run_goes_on_with_a_larger_one(tmp_path) -> None:
    questions = [question(str(i)) for i in range(20)]
    with chat_server.serving(echo) as server:
        # 15 an answer; no request is given up and asked again, however busy the machine is
        prices = {"price_in": 1e6, "price_out": 1e6, "max_tokens": 5, "timeout": 60}
        small = client(server, tmp_path, budget=100, **prices)
        with pytest.raises(
            BudgetReached, match=r"of 20 questions are answered for \d+\.\d+, and the next may go beyond"
        ):
            small.ask(questions)
        assert 30 <= small.cost <= 100
        first = len(server.answered)
        large = client(server, tmp_path, budget=1000, **prices)
        assert [reply.text for reply in large.ask(questions)] == [f"[[{i}]]" for i in range(20)]
        assert large.cached == first
        assert large.cost == 300
        assert set(server.answered.values()) == {1}
        server.usage = False
        with pytest.raises(InputError, match="does not count its tokens"):
            client(server, tmp_path / "other", budget=1000, **prices).ask(questions)


def test_what_will_not_pass_is_one_line(tmp_path) -> None:
    with chat_server.serving(echo) as server:
        for status, words in ((404, "no such model"), (400, "bad parameter")):
            server.status = status, words
            with pytest.raises(InputError, match=f"HTTP {status}: {words}"):
                client(server, tmp_path).ask([question("1")])
        server.status = 400, json.dumps({"error": {"code": "content_filter"}})
        assert client(server, tmp_path).ask([question("1")])[0].finish_reason == "content_filter"
        server.status = 503, "busy"
        with pytest.raises(InputError, match=r"no answer after 3 attempts \(HTTP 503: busy\)"):
            client(server, tmp_path, attempts=3).ask([question("2")])
        server.status = None
        server.faults = lambda body, times: "429 date"
        with pytest.raises(InputError, match=r"asks to wait .* longer than endpoint.longest_wait 0.01"):
            client(server, tmp_path, longest_wait=0.01).ask([question("2")])
    gone = ChatClient(
        EndpointConfig(url="http://127.0.0.1:9/v1", model="m", attempts=2), ReplyCache(tmp_path), first_wait=0.01
    )
    with pytest.raises(InputError, match=r"no answer after 2 attempts \(ConnectError"):
        gone.ask([question("3")])


def test_a_damaged_reply_on_the_disk_is_named(tmp_path) -> None:
    with chat_server.serving(echo) as server:
        ask = client(server, tmp_path)
        ask.ask([question("1")])
        next(iter(tmp_path.rglob("*.json"))).write_text("{")
        with pytest.raises(InputError, match="not readable as a reply that was kept"):
            ask.ask([question("1")])


def test_no_more_requests_a_minute_than_allowed(tmp_path) -> None:
    with chat_server.serving(echo) as server:
        client(server, tmp_path, per_minute=1200).ask([question(str(i)) for i in range(6)])
        gaps = [b - a for a, b in zip(sorted(server.starts), sorted(server.starts)[1:], strict=False)]
    assert sum(gaps) >= 5 * 0.05 * 0.9


def test_retry_after_is_seconds_or_a_date() -> None:
    now = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)
    for said, seconds in (
        ("7", 7),
        ("0.5", 0.5),
        ("Thu, 01 Jan 2026 12:00:09 GMT", 9),
        ("Thu, 01 Jan 2026 11:00:00 GMT", 0),
        ("soon", None),
        ("-3", None),
        ("nan", None),
    ):
        assert retry_after(httpx.Headers({"Retry-After": said}), now) == seconds
    assert retry_after(httpx.Headers({}), now) is None


def test_one_http_client_serves_every_call_of_a_loop_or_a_notebook(tmp_path, monkeypatch) -> None:
    made: list[httpx.AsyncClient] = []
    own = httpx.AsyncClient.__init__

    def counted(self: httpx.AsyncClient, *words, **options) -> None:
        made.append(self)
        own(self, *words, **options)

    monkeypatch.setattr(httpx.AsyncClient, "__init__", counted)
    with chat_server.serving(echo) as server:
        asker = client(server, tmp_path)
        assert asker.ask([question("1")])[0].text == "[[1]]"

        async def notebook(asker: ChatClient) -> str:
            return asker.ask([question("2")])[0].text

        assert asyncio.run(notebook(asker)) == "[[2]]"
        server.status = 404, "gone"
        with pytest.raises(InputError, match="HTTP 404"):
            asker.ask([question("3")])
        server.status = None
        assert asker.ask([question("4")])[0].text == "[[4]]"
        (one,) = made
        del asker
        gc.collect()
        assert one.is_closed

        async def dropped() -> None:
            client(server, tmp_path).ask([question("5")])
            gc.collect()

        asyncio.run(dropped())
        assert made[-1] is not one
        assert made[-1].is_closed
