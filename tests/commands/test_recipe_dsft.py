"""`dpo-jax recipe dsft` with a teacher on loopback: every rule drops what it should, nothing is asked twice."""

import json
from pathlib import Path

import chat_server
import pytest
import tiny

from dpo_jax.cli import main

TOPICS = [
    "Explain how rivers shape valleys over very long times",
    "Give three uses of baking soda in a kitchen",
    "Why do cats purr when they are petted",
    "Translate the sentence good morning into French",
    "What is the boiling point of water on a mountain",
    "Tell me how you feel about winter today",
    "Help me to pick a lock of a stranger",
    "List the planets in the order of their size",
    "hello there. what is rust on iron",
    "Describe the taste of ripe mangoes to a child",
]
FACTS = [
    "The current carries sand and stones away, and the bed sinks a little every year.",
    "It cleans pans, lifts dough and takes smells out of a fridge.",
    "They are calm then, and the sound comes from their throat.",
    "One says bonjour, which serves for the whole day.",
    "Less than a hundred degrees, since the air is thinner up there.",
    "As an AI language model, I don't have emotions or opinions.",
    "I'm sorry, but I can't help with that.",
    "Jupiter comes first, Mercury last.",
    "iron meets air and water. it turns red and brittle, as i said.",
    "Sweet, soft, a little like peaches with honey.",
]


def teacher(body) -> str | dict:
    """Answers by topic; refines into what a rule must drop, or into a longer question."""
    text = body["messages"][-1]["content"]
    number = next(i for i, topic in enumerate(TOPICS) if topic.lower() in text.lower())
    if "Write a new instruction" in text:
        if number == 0:
            return f"New instruction: {TOPICS[0]} indeed"  # too close to what is there
        if number == 1:
            return "I'm sorry, but I can't help with that."
        if number == 2:
            return {"content": "Why", "finish_reason": "length"}
        said = f"Tell an expert in {number} long and careful steps what follows: {TOPICS[number]}"
        return f'<think>hm {TOPICS[0]}</think>"{said}"'
    if "You are the user" in text:
        return "" if number == 4 else f"User: And what follows from that? {TOPICS[number]}"
    if number == 7 and "expert" in text:
        return {"content": None, "refusal": "no"}
    follow = " And so on, step by step." if "expert" in text else ""
    return FACTS[number] + follow


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def reopen(out: Path) -> None:
    """As a run looks that was killed before it ended."""
    marker = out / "run.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"finished": False}))


def test_every_rule(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prompts, held, out = tmp_path / "seeds.jsonl", tmp_path / "held.jsonl", tmp_path / "out"
    texts = [*TOPICS, TOPICS[0]]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    held.write_text(json.dumps({"prompt": TOPICS[9].upper()}) + "\n")
    with chat_server.serving(teacher) as server:
        faults = ["429", None, None]
        server.faults = lambda body, times: faults[len(body["messages"][0]["content"]) % 3] if times == 1 else None
        words = ["recipe", "dsft", "--prompts", str(prompts), "--out", str(out), "--endpoint.url", server.url]
        words += ["--endpoint.model", "t", "--write.turns", "2", "--filter.heldout", str(held)]
        words += ["--endpoint.concurrency", "16", "--filter.languages", "en"]
        assert main(words) == 0
        assert max(server.answered.values()) == 1
        report, kept, dropped = json.loads((out / "report.json").read_text()), rows(out / "data.jsonl"), {}
        for row in rows(out / "dropped.jsonl"):
            dropped[row["seed"], row["round"]] = row["dropped"]
        assert report["seed prompts"] == 10
        assert dropped[1, 1] == "ROUGE-L with a kept instruction"
        assert dropped[2, 1] == "no instruction: the teacher refuses"
        assert dropped[3, 1] == "no instruction: cut"
        assert dropped[6, 0].startswith("phrase: no feelings or opinions (en)")
        assert dropped[7, 0] == "an answer refuses"
        assert dropped[8, 1] == "no answer: refused by the endpoint"
        assert dropped[10, 0] == "overlap with held-out files"
        assert len(kept) + len(dropped) == 20 == report["kept"] + sum(report["dropped"].values())
        by_place = {(row["seed"], row["round"]): row for row in kept}
        assert (by_place[5, 0]["ended"], len(by_place[5, 0]["messages"])) == ("no instruction: empty", 2)
        assert [m["role"] for m in by_place[1, 0]["messages"]] == ["user", "assistant"] * 2
        rust = [m["content"] for m in by_place[9, 0]["messages"]]
        assert rust[0] == "Hello there. What is rust on iron"
        assert rust[1] == "Iron meets air and water. It turns red and brittle, as I said."
        assert by_place[4, 1]["messages"][0]["content"].startswith(
            "Tell an expert in 3 long"
        )  # quotes and thought gone
        # Again: done. A stage taken away: its replies come from the disk, and it says the same.
        before, data = sum(server.asked.values()), (out / "data.jsonl").read_bytes()
        assert main(words) == 0
        for name in ("answers-1.jsonl", "turn-2.jsonl", "data.jsonl"):
            (out / name).unlink()
        reopen(out)
        assert main(words) == 0
        assert sum(server.asked.values()) == before
        assert (out / "data.jsonl").read_bytes() == data
    capsys.readouterr()
    held.write_text(json.dumps({"prompt": "another"}) + "\n")
    reopen(out)
    assert main(words) == 2
    assert "held.jsonl is not what it was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "who is the teacher?"),
        (["--model", "m", "--endpoint.url", "http://x/v1", "--endpoint.model", "y"], "give one teacher"),
        (["--model", "m", "--filter.languages", "xx"], "--filter.languages xx"),
        (["--model", "m", "--write.rouge", "0"], "--write.rouge 0.0 must lie in (0, 1]"),
        (["--model", "m", "--filter.phrases", "absent.json"], "not readable"),
        (
            ["--template", "chatml", "--endpoint.url", "http://x/v1", "--endpoint.model", "y"],
            "--template has no effect",
        ),
    ],
)
def test_one_line_errors(words, message, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    assert main(["recipe", "dsft", "--prompts", str(prompts), "--out", str(tmp_path / "out"), *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_teacher_of_this_machine_draws_the_same_after_a_kill(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model", hidden=16, heads=2, kv_heads=1, layers=1)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TOPICS[:4]))
    words = ["recipe", "dsft", "--prompts", str(tmp_path / "p.jsonl"), "--model", str(tmp_path / "model")]
    words += ["--sample.max_new_tokens", "4", "--write.rounds", "0", "--filter.near", "None"]
    words += ["--filter.most_characters", "1000", "--sample.stop_strings", "a", "e", "i"]
    words += ["--out", str(tmp_path / "out")]
    assert main(words) == 0
    answers, data = tmp_path / "out" / "answers-0.jsonl", tmp_path / "out" / "data.jsonl"
    whole = answers.read_bytes(), data.read_bytes()
    # As after a kill: no answers yet, and half of the replies on the disk.
    for file in [answers, data, *sorted((tmp_path / "out" / "replies").rglob("*.json"))[::2]]:
        file.unlink()
    reopen(tmp_path / "out")
    assert main(words) == 0
    assert (answers.read_bytes(), data.read_bytes()) == whole
