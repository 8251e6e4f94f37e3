"""What judges texts: built-in functions, the user's own, a server, a reward model."""

import datetime
import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
import tiny

from dpo_jax import mesh
from dpo_jax.config import DataConfig, PPORun
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.errors import InputError
from dpo_jax.judge.rewards import functions as reward_functions
from dpo_jax.judge.rewards.functions import Endpoint, ModelReward, open_reward, scores_of
from dpo_jax.model import heads
from dpo_jax.weights.huggingface.heads import as_reward_model
from dpo_jax.weights.pretrained import load_pretrained, save_pretrained
from dpo_jax.weights.tokenizer import load_tokenizer

ASK = Prompt((Message("user", "the film?"),), "the film?")
TALK = Prompt((Message("user", "a"), Message("assistant", "b"), Message("user", "c")), None)


def one_device() -> jax.sharding.Mesh:
    return mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def scores(judge: str, responses: list[str]) -> list[float]:
    config = PPORun(model="m", out="o", reward=judge, data=DataConfig("d", template="raw"))
    function = open_reward(judge, config, mesh=one_device(), batch_size=2)
    return scores_of(function, [ASK] * len(responses), responses, np.arange(1, len(responses) + 1), judge).tolist()


@pytest.mark.parametrize(
    ("judge", "responses", "expected"),
    [
        ("length", ["", "a" * 50], [0, 0.5]),
        (r"regex:^\d+$", ["12", "1 2"], [1, 0]),
        ("language:zh", ["你好 world", "你好,123", "..."], [2 / 7, 1, 0]),
        ("language:ja", ["ひらカタ漢", "abc"], [1, 0]),
        ("language:ru", ["да ok"], [0.5]),
    ],
)
def test_functions_of_a_response(judge, responses, expected) -> None:
    np.testing.assert_allclose(scores(judge, responses), expected, rtol=1e-6)


def test_sentiment() -> None:
    good, bad, neutral = scores("vader", ["This is wonderful!", "I hate it.", "It is a table."])
    assert good > 0.5 > neutral == 0 > bad


def test_a_function_of_the_user(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def f(prompts, responses):\n    return [len(p) + len(r) for p, r in zip(prompts, responses)]\n")
    assert scores(f"{path}:f", ["", "ab"]) == [9, 11]
    function = reward_functions.PythonFunction(f"{path}:f")
    assert function([TALK], ["x"]) == [3 + 1]  # three messages
    path.write_text(path.read_text() + "def g(prompts, responses):\n    raise ValueError('not today')\n")
    with pytest.raises(InputError, match="ValueError: not today"):
        scores(f"{path}:g", ["a"])
    before = function.identity
    path.write_text(path.read_text() + "\n")
    assert reward_functions.PythonFunction(f"{path}:f").identity != before


def rows_with(*answers: str | None) -> list[Prompt]:
    """Prompts of rows that have the columns `answer` and `level`."""
    return [ASK._replace(columns={"answer": answer, "level": 1}) for answer in answers]


CODE = """
def named(prompts, responses, answer):
    return [float(a == r) for a, r in zip(answer, responses)]

def some(prompts, responses, *, answer, level=None, absent=None):
    assert absent is None
    return [float(a == r) * n for a, r, n in zip(answer, responses, level)]

def every(prompts, responses, **columns):
    assert sorted(columns) == ["answer", "level"]
    return [float(a == r) for a, r in zip(columns["answer"], responses)]

def neither(prompts, responses):
    return [2.0 for _ in responses]

def optional(prompts, responses, rubric="x"):
    return [3.0 for _ in responses]

def one(responses):
    return [0.0]

def deep(prompts, responses):
    def inner(text):
        return 1 / (len(text) - len(text))  # line 24
    return [inner(text) for text in responses]

def elsewhere(prompts, responses):
    import json
    return [json.loads("{") for text in responses]  # line 29

def empty_only(prompts, responses):
    return [1 / len(text) for text in responses]
"""


def test_a_function_of_the_user_is_given_the_columns_that_it_names(tmp_path) -> None:
    (path := tmp_path / "mine.py").write_text(CODE)
    rows, texts = rows_with("a", None, "c"), ["a", "b", "d"]
    for name, expected in (
        ("named", [1, 0, 0]),
        ("some", [1, 0, 0]),
        ("every", [1, 0, 0]),
        ("neither", [2, 2, 2]),
        ("optional", [3, 3, 3]),
    ):
        function = reward_functions.PythonFunction(f"{path}:{name}")
        reward_functions.try_out(function, rows, np.arange(1, 4), "mine")
        assert function(rows, texts) == expected, name
    with pytest.raises(InputError, match=r"one\(responses\) cannot be called; write one\(prompts, responses\)"):
        reward_functions.PythonFunction(f"{path}:one")
    other, named = [ASK._replace(columns={"other": 1})], reward_functions.PythonFunction(f"{path}:named")
    with pytest.raises(InputError, match=r"takes 'answer', which is no column of the prompts; they have other$"):
        reward_functions.try_out(named, other, np.asarray([1]), "mine")


def test_limits_of_a_command_that_judges_safety() -> None:
    run = PPORun(model="m", out="o", reward="vader", safety_reward="run:true", reward_memory=9, data=DataConfig("d"))
    assert run.reward_memory == 9


def test_one_number_for_a_whole_batch_is_refused_before_anything_is_sampled(tmp_path) -> None:
    (path := tmp_path / "mine.py").write_text("def mean(prompts, responses): return [sum(map(len, responses)) / 9]\n")
    function = reward_functions.PythonFunction(f"{path}:mean")
    with pytest.raises(InputError, match=r"gave scores of shape \[1\] for 2 responses; one number each"):
        reward_functions.try_out(function, rows_with("a", "b", "c"), np.arange(1, 4), "mine")


def test_an_exception_of_the_user_names_file_and_line_before_anything_is_sampled(tmp_path) -> None:
    (path := tmp_path / "mine.py").write_text(CODE)
    for name, message in (
        ("deep", r"mine\.py, line 24: ZeroDivisionError: "),
        ("elsewhere", r"mine\.py, line 29: JSONDecodeError: "),
    ):
        function = reward_functions.PythonFunction(f"{path}:{name}")
        with pytest.raises(InputError, match=message) as caught:
            reward_functions.try_out(function, rows_with("a"), np.asarray([1]), "mine")
        assert "\n" not in str(caught.value)
    reward_functions.try_out(reward_functions.PythonFunction(f"{path}:empty_only"), [ASK], np.asarray([1]), "mine")
    for text, message in (
        ("x = 1\nraise KeyError('key')\n", r"bad\.py, line 2: KeyError: 'key'"),
        ("x = 1\n\ndef f(:\n", r"bad\.py, line 3: SyntaxError: "),
        ("import sys\nsys.exit(3)\n", r"bad\.py, line 2: SystemExit: 3"),
    ):
        (bad := tmp_path / "bad.py").write_text(text)
        with pytest.raises(InputError, match=message):
            reward_functions.PythonFunction(f"{bad}:f")


@pytest.mark.parametrize("found", [[1.0], [[1.0], [2.0]], ["good", "bad"], None, {"a": 1}, [0, 10**400]])
def test_anything_but_numbers_is_refused(found) -> None:
    def judge(prompts, responses):
        return found

    judge.everywhere = False
    with pytest.raises(InputError, match=r"--reward mine: gave"):
        scores_of(judge, [ASK] * 2, ["a", "b"], np.asarray([3, 4]), "mine")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e39, None])
def test_scores_that_are_not_finite_are_named(bad) -> None:
    def judge(prompts, responses):
        return [1.0, bad, 2, bad]

    judge.everywhere = False
    with pytest.raises(InputError, match="responses to rows 4, 9 of the prompts is not finite"):
        scores_of(judge, [ASK] * 4, list("abcd"), np.asarray([3, 9, 5, 4]), "mine")


class _Server(BaseHTTPRequestHandler):
    """Answers with the lengths of the responses, after as many failures as `failures` lists."""

    failures: ClassVar[list[int]] = []
    seen: ClassVar[list[dict]] = []
    answer: ClassVar[str | None] = None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({**body, "token": self.headers["Authorization"]})
        status = self.failures.pop(0) if self.failures else 200
        found = self.answer or json.dumps({"scores": [len(text) for text in body["responses"]]})
        self.send_response(status)
        if status == 307:
            self.send_header("Location", "https://elsewhere/score")
        self.end_headers()
        self.wfile.write(found.encode())

    def log_message(self, *args) -> None:
        """Nothing is said."""


@pytest.fixture
def server():
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    _Server.failures, _Server.seen, _Server.answer = [], [], None
    yield f"http://127.0.0.1:{http.server_port}/score"
    http.shutdown()
    thread.join()
    http.server_close()


def test_a_server_is_asked_again_and_gets_its_token(server, monkeypatch) -> None:
    monkeypatch.setenv(reward_functions.TOKEN, "secret")
    _Server.failures = [503, 429]
    assert Endpoint(server, 5, first_wait=0.001)([ASK, TALK], ["a", "bc"]) == [1, 2]
    assert len(_Server.seen) == 3
    asked = _Server.seen[0]
    assert asked["token"] == "Bearer secret"
    assert asked["prompts"][0] == "the film?"
    assert asked["prompts"][1][-1] == {"role": "user", "content": "c"}


def test_a_server_that_fails_is_one_line(server) -> None:
    ask = Endpoint(server, 5, first_wait=0.001)
    _Server.failures = [503] * 5
    with pytest.raises(InputError, match=r"no answer after 5 attempts \(HTTP 503"):
        ask([ASK], ["a"])
    _Server.failures = [404]
    with pytest.raises(InputError, match="HTTP 404"):
        ask([ASK], ["a"])
    _Server.failures = [307]
    with pytest.raises(InputError, match="HTTP 307: moved to https://elsewhere/score; give that address"):
        ask([ASK], ["a"])
    _Server.answer = "[1, 2"
    with pytest.raises(InputError, match="the answer is not"):
        ask([ASK], ["a"])
    with pytest.raises(InputError, match="no answer after 5 attempts"):
        Endpoint("http://127.0.0.1:9/", 0.2, first_wait=0.001)([ASK], ["a"])


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A reward model of random weights."""
    folder = tiny.folder(tmp_path_factory.mktemp("model") / "tiny", layers=1)
    model, variables = as_reward_model(*load_pretrained(folder))
    variables["heads"] = heads.init_heads(model, jax.random.key(3), {heads.SCORE: 1})
    save_pretrained(folder.parent / "rm", model, variables, load_tokenizer(folder))
    return str(folder.parent / "rm")


def test_a_reward_model_judges_texts(reward_model, caplog) -> None:
    judge = ModelReward(reward_model, raw=False, mesh=one_device(), batch_size=2)
    found = judge([ASK, TALK], ["very good", "bad"])
    one_by_one = [judge([prompt], [text])[0] for prompt, text in ((ASK, "very good"), (TALK, "bad"))]
    np.testing.assert_allclose(found, one_by_one, atol=1e-5)
    # A policy may write anything: nothing, a control token, more than the context holds.
    odd = judge([ASK] * 3, ["", "<|im_end|>", "good " * 300])
    assert "holds the end only of 1 of 3 texts" in caplog.text
    assert np.isfinite(odd).all()
    assert len(set(odd.tolist())) == 3
    raw = ModelReward(reward_model, raw=True, mesh=one_device(), batch_size=2)
    assert np.isfinite(raw([ASK], [" was good"])).all()


HOSTILE = """
import os, signal, time, datetime

def hang(prompts, responses):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True: pass

def dies(prompts, responses): os._exit(7)
def words(prompts, responses): return ["1.5"] * len(responses)
def short(prompts, responses): return [0.0]
def raises(prompts, responses): raise KeyError("no")
def nan(prompts, responses): return [float("nan")] * len(responses)
def none(prompts, responses): print("said"); return None

def child(prompts, responses):
    import subprocess, sys
    heard = subprocess.run([sys.executable, "-c", "import sys; print(len(sys.stdin.read()))"], capture_output=True)
    return [float(heard.stdout)] * len(responses)

def told(prompts, responses): print("seen"); os._exit(7)

def trl(completions, answer, prompts=None, **kwargs):
    assert sorted(kwargs) == ["day"] and kwargs["day"][0] == datetime.date(2026, 1, 2)
    assert prompts[0] == "the film?" and prompts[1] == [{"role": "user", "content": "the film?"}]
    assert completions[1] == [{"role": "assistant", "content": "b"}]
    return [float(a == (c if isinstance(c, str) else c[0]["content"])) for a, c in zip(answer, completions)]

def own(prompts, completions, completion_ids): return []
"""


def test_hostile_functions_end_in_one_line_that_names_rows(tmp_path) -> None:
    (path := tmp_path / "mine.py").write_text(HOSTILE)
    for name, message in (
        ("hang", r"took longer than 0\.5 seconds and was ended .* \(responses to rows 3, 4 of the prompts\)$"),
        ("dies", r"ended with the exit code 7 \(responses to rows 3, 4"),
        ("words", r"no list of numbers: '1\.5' for responses to rows 3, 4"),
        ("short", r"of shape \[1\] for 2 responses; one number each \(responses to rows 3, 4"),
        ("raises", r"line 11: KeyError: 'no' \(responses to rows 3, 4"),
        ("nan", r"responses to rows 3, 4 of the prompts is not finite"),
        ("none", r"gave scores of shape \[\] for 2 responses; one number each \(responses to rows 3, 4"),
    ):
        function = reward_functions.PythonFunction(f"{path}:{name}", 0.5 if name == "hang" else None)
        with pytest.raises(InputError, match=message) as caught:
            scores_of(function, [ASK] * 2, ["a", "b"], np.asarray([3, 4]), "mine")
        assert "\n" not in str(caught.value)
        if name == "hang":
            with pytest.raises(InputError, match="its process was ended before"):
                function([ASK], ["a"])


def test_the_environment_of_a_function_is_the_one_that_it_is_given(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    (path := tmp_path / "mine.py").write_text(
        "import os\ndef f(prompts, responses): return [float('SECRET' in os.environ)] * len(responses)\n"
    )
    assert reward_functions.PythonFunction(f"{path}:f")([ASK], ["a"]) == [1]
    assert reward_functions.PythonFunction(f"{path}:f", environment={})([ASK], ["a"]) == [0]


def test_what_a_function_starts_reads_nothing_and_what_it_prints_is_not_lost(tmp_path, capfd) -> None:
    (path := tmp_path / "mine.py").write_text(HOSTILE)
    assert reward_functions.PythonFunction(f"{path}:child", 20)([ASK], ["a"]) == [0]
    with pytest.raises(InputError, match="ended with the exit code 7"):
        reward_functions.PythonFunction(f"{path}:told")([ASK], ["a"])
    assert "seen\n" in capfd.readouterr().err


ORPHANING = """
import os, signal, sys, threading
from dpo_jax.judge.rewards.user_code import PythonFunction

function = PythonFunction(sys.argv[1] + ":stuck")
print(function._worker._process.pid, flush=True)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
function([], ["a"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends it")
def test_it_ends_with_what_started_it_inside_of_c_too(tmp_path) -> None:
    (path := tmp_path / "mine.py").write_text(
        "import re\ndef stuck(prompts, responses): return [float(bool(re.match('(a+)+b', 'a' * 60)))]\n"
    )
    started = subprocess.run([sys.executable, "-c", ORPHANING, str(path)], stdout=subprocess.PIPE, check=False)
    assert started.returncode == -signal.SIGKILL
    process, until = Path(f"/proc/{int(started.stdout)}/stat"), time.monotonic() + 10
    while process.exists() and process.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, "it outlived what started it"
        time.sleep(0.01)


def test_a_function_that_is_written_for_trl_is_called_as_trl_calls_it(tmp_path) -> None:
    (path := tmp_path / "mine.py").write_text(HOSTILE)
    asked = ASK._replace(columns={"answer": "a", "day": datetime.date(2026, 1, 2)})
    function = reward_functions.PythonFunction(f"{path}:trl")
    assert function([asked, asked._replace(conversational=True)], ["a", "b"]) == [1, 0]
    with pytest.raises(InputError, match="takes 'completion_ids', which TRL alone gives"):
        reward_functions.PythonFunction(f"{path}:own").check_columns([asked])
