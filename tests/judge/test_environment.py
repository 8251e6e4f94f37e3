"""Environments of the user's own code: the documented examples, and hostile ones."""

from pathlib import Path

import jax
import numpy as np
import pytest
from documented import programs

from dpo_jax.data.rows.messages import Message
from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.errors import InputError
from dpo_jax.judge.rewards.environment import Environment, Failed, Step
from dpo_jax.processes import distributed


def row(prompt: str, **columns) -> Prompt:
    return Prompt((Message("user", prompt),), prompt, columns)


def user(text: str) -> Message:
    return Message("user", text)


def said(*texts: str) -> list[Message]:
    return [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


def test_the_documented_examples_play(tmp_path: Path) -> None:
    for name, code in programs("environments.md").items():
        (tmp_path / name).write_text(code)
    tool = Environment(f"{tmp_path / 'calculator.py'}:Calculator")
    first = tool.reset([row("What is 2 times 21?", answer=42), row("And 7 less 9?", answer=-2)])
    assert [messages[0].content.splitlines()[0] for messages in first] == ["What is 2 times 21?", "And 7 less 9?"]
    found = tool.step([(0, said("", "<calc>2 * 21</calc>")), (1, said("", "I do not know"))])
    assert found[0] == Step((user("= 42"),), 0.0, False)
    assert found[1] == Step((user("That was neither a <calc> nor an answer."),), -0.1, False)
    ends = tool.step([(0, said("", "", "", "answer: 42")), (1, said("", "answer: 2"))])
    assert ends == [Step((), 1.0, True), Step((), 0.0, True)], "each episode has an object of its own"
    game = Environment(f"{tmp_path / 'twenty_questions.py'}:TwentyQuestions")
    game.reset([row("What am I?", word="whale")])
    for text, step in {
        "Is it alive?": Step((user("Yes."),), 0.0, False),
        "hard?": Step((user("No."),), 0.0, False),
        "Is it a cat?": Step((user("No, guess again."),), -0.1, False),
        "A WHALE!": Step((), 1.0, True),
    }.items():
        assert game.step([(0, said("", text))]) == [step]


HOSTILE = """
class Hostile:
    def reset(self, row):
        self.how = row["prompt"]
        own = [{"role": "assistant", "content": "b"}]
        return {"no list": 3, "no message": ["a"], "bytes": b"x", "its own": own}.get(
            self.how, [{"role": "user", "content": "go"}])

    def step(self, messages):
        more = [{"role": "user", "content": "more"}]
        if self.how == "raises":
            return undefined
        if self.how == "exits":
            raise SystemExit(1)
        if self.how == "hangs":
            import time
            time.sleep(60)
        role = [{"role": "x", "content": ""}]
        return {"nan": (more, float("nan"), False), "text": (more, "1", False),
                "big": (more, 10**400, False), "huge": (more, 1e39, False), "none": None, "two": (more, 1.0),
                "done": (more, 1.0, "yes"), "silent": ([], 1.0, False), "role": (role, 0, False),
                "object": (more, object(), False), "bool": (more, True, True)}[self.how]
"""


def test_hostile_environments_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "hostile.py"
    path.write_text(HOSTILE)
    hostile = Environment(f"{path}:Hostile", timeout=2.0)
    for how, message in {
        "no list": "reset gave int 3 in place of a list of messages",
        "no message": "reset: 'reset' holds something that is no message",
        "its own": "reset gave a message of the assistant last",
        "bytes": "reset gave bytes in place of",
    }.items():
        (found,) = hostile.reset([row(how)])
        assert isinstance(found, Failed)
        assert message in found.why
    expected = {
        "raises": "hostile.py, line 12: NameError: name 'undefined'",
        "exits": "SystemExit: 1",
        "nan": "step gave nan for a reward, which is no finite number",
        "text": "step gave '1' for a reward",
        "big": "for a reward, which is no finite number",
        "huge": "step gave 1e+39 for a reward, which is no finite number of float32",
        "none": "step gave None in place of (messages, reward, done)",
        "two": "in place of (messages, reward, done)",
        "done": "step gave str 'yes' for done",
        "silent": "'step' is an empty list",
        "role": "unknown role in 'step'",
        "object": "for a reward, which is no finite number",
    }
    hostile.reset([row(how) for how in (*expected, "bool")])
    found = hostile.step([(i, said("go", "x")) for i in range(len(expected) + 1)])
    for answer, message in zip(found[:-1], expected.values(), strict=True):
        assert isinstance(answer, Failed)
        assert message in answer.why
        assert "\n" not in answer.why
    assert found[-1] == Step((user("more"),), 1.0, True)
    hostile.reset([row("hangs")])
    with pytest.raises(InputError, match=r"--environment .*step of 1 episodes took longer than 2 seconds"):
        hostile.step([(0, said("go", "x"))])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.py:E", "is no file"),
        ("env.txt:E", "is no file of Python; write FILE.py:NAME"),
        ("env.py", "is no file of Python; write FILE.py:NAME"),
        ("env.py:Absent", r"has no class Absent with reset\(row\) and step\(messages\)"),
        ("broken.py:E", r"broken.py, line 1: SyntaxError"),
    ],
)
def test_files_that_cannot_be_used(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text("class E: pass\n")
    (tmp_path / "env.txt").write_text("class E: pass\n")
    (tmp_path / "broken.py").write_text("class E pass\n")
    with pytest.raises(InputError, match=message):
        Environment(str(tmp_path / name))


def test_of_several_processes_one_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first sends is all that the others know: answers, what went wrong in one, and a call's end."""
    (tmp_path / "hostile.py").write_text(HOSTILE)
    sent: list[np.ndarray] = []
    found = []
    for me in (0, 1):
        environment = Environment(f"{tmp_path / 'hostile.py'}:Hostile", timeout=2.0)
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: 2)
            patch.setattr(jax, "process_index", lambda me=me: me)
            if me:
                patch.setattr(environment._worker, "ask", None)
                patch.setattr(distributed, "from_main", lambda mine: _of_one_shape(sent.pop(0), mine))
            else:
                patch.setattr(distributed, "from_main", lambda mine: sent.append(mine) or mine)
            told = [environment.reset([row("bool"), row("none"), row("no list")])]
            told.append(environment.step([(0, said("go", "\ud800 é")), (1, said("go", "x"))]))
            environment.reset([row("hangs")])
            with pytest.raises(InputError, match="took longer than 2 seconds") as ended:
                environment.step([(0, said("go", "x"))])
        found.append((told, str(ended.value)))
    assert found[0] == found[1]
    assert sent == []
    assert [type(answer) for answer in found[0][0][1]] == [Step, Failed]


def _of_one_shape(sent: np.ndarray, mine: np.ndarray) -> np.ndarray:
    assert (sent.shape, sent.dtype) == (mine.shape, mine.dtype)
    return sent
