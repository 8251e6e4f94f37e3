"""`dpo-jax recipe zephyr` with a tiny student, teacher and judge on loopback, killed in two of its stages."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import chat_server
import pytest
import runs
import tiny

from dpo_jax import cli
from dpo_jax.cli import main
from dpo_jax.commands.recipes import zephyr
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import read_lines, write_lines
from dpo_jax.report import zephyr as report

ROOT = Path(__file__).resolve().parents[2]
GRADES = {"good": 5, "fair": 4, "poor": 2, "bad": 1}


def answer(body: dict[str, Any]) -> str:
    """A teacher, two writers and a judge."""
    text = body["messages"][-1]["content"]
    if body["model"] == "teacher":
        if "Write a new instruction" in text:
            return "Name a cousin of " + re.findall(r"animal (\w+)", text)[0]
        return f"Well, {text[:40]}."
    if body["model"] != "judge":
        return f"the {body['model']} one"
    if "<answer A>" in text:
        return "[[C]]" if "<answer A>\n</answer A>" in text else "[[A]]"
    said = []
    for number, part in enumerate(text.split("<Text ")[1:], 1):
        grade = next(grade for name, grade in GRADES.items() if f"the {name} one" in part)
        said.append(f"Text {number}\nRating: {grade}\nRationale: so it is")
    return "\n\n".join(said)


def words_of(folder: Path, url: str) -> list[str]:
    """Everything tiny."""
    tiny.folder(folder / "model", hidden=16, heads=2, kv_heads=1, layers=1)
    write_lines(folder / "seeds.jsonl", [{"prompt": f"Tell of the animal {tiny.WORDS[i]}"} for i in range(12)])
    prompts = [{"prompt": f"Where is {tiny.WORDS[i]}?"} for i in range(12)]
    write_lines(folder / "prompts.jsonl", prompts)
    write_lines(folder / "bad.jsonl", [{"prompt": p["prompt"], "response": "the bad one"} for p in prompts])
    pool = [f"- {{name: bad, responses: {folder / 'bad.jsonl'}}}"]
    for name in ("good", "fair", "poor"):
        pool.append(f"- {{name: {name}, endpoint: {{url: '{url}', model: {name}, concurrency: 1}}}}")
    (folder / "pool.yaml").write_text("\n".join(pool) + "\n")
    (folder / "judge.yaml").write_text(f"ask: list\nendpoint: {{url: '{url}', model: judge, concurrency: 1}}\n")
    words = ["--model", "model", "--seeds", "seeds.jsonl", "--prompts", "prompts.jsonl", "--pool", "pool.yaml"]
    words = [str(folder / word) if "." in word or word == "model" else word for word in words]
    words += ["--judge", f"judge:{folder / 'judge.yaml'}", "--out", str(folder / "out"), "--heldout", "0.3"]
    words += ["--batch_size", "4", "--sample.max_new_tokens", "4", "--dsft.endpoint.url", url]
    words += ["--dsft.endpoint.model", "teacher", "--dsft.endpoint.concurrency", "1", "--dsft.write.rouge", "1"]
    words += ["--dsft.filter.near", "None", "--aif.samples", "3", "--aif.principles", "none"]
    words += ["--aif.aspects", "helpfulness", "truthfulness", "--aif.no-critique"]
    words += ["--aif.beside", "length", "--sft.data.max_length", "96"]
    words += ["--dpo.data.max_length", "96", "--dpo.data.max_prompt_length", "64"]
    for name in ("sft", "dpo"):
        words += [f"--{name}.train.steps", "1", f"--{name}.train.batch_size", "4", f"--{name}.data.buckets", "1"]
        words += [f"--{name}.optimizer.learning_rate", "1e-2"]
    return words


@pytest.mark.slow
@pytest.mark.usefixtures("cheaply")
def test_killed_in_every_stage_it_asks_nothing_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with chat_server.serving(answer) as server:
        words = ["recipe", "zephyr", *words_of(tmp_path, server.url)]
        running: list[subprocess.Popen] = []
        kill_at: list[int] = []

        def faults(body: dict[str, Any], times: int) -> str | None:
            if kill_at and sum(server.asked.values()) == kill_at[0]:
                kill_at.pop()
                running[-1].send_signal(signal.SIGKILL)
                running[-1].wait()
                return "drop"
            return None

        server.faults = faults
        # Within the teacher's dialogues, and then once in each stage, those of the teacher and of the feedback too.
        kill_at.append(7)
        env = {**runs.one_device(), "DPO_JAX_CACHE": str(tmp_path / "cache")}
        with open(tmp_path / "said", "w") as said:
            running.append(subprocess.Popen([sys.executable, "-m", "dpo_jax", *words], env=env, stderr=said))
            assert running[-1].wait() == -signal.SIGKILL, (tmp_path / "said").read_text()[-3000:]
        killed = runs.killed_everywhere(tmp_path / "killed", "done", words, tmp_path / "cache")
        assert sorted([*killed, "seed prompts"]) == runs.stages_below(out), "that one was done before the first kill"
        assert {
            "dSFT",
            "dDPO",
            "AI feedback",
            "good writes",
            "judged: helpfulness",
            "a judge beside",
            "verdicts",
        } <= set(killed)
        assert max(server.answered.values()) == 1, "no request was answered twice"

        # What an uninterrupted run of the stages writes, from the start, is the same.
        server.answered.clear()
        own = [*words[words.index("--aif.samples") :]]
        own = [word.replace("--aif.", "--") for word in own[: own.index("--sft.data.max_length")]]
        files = words[words.index("--prompts") : words.index("--out")]
        assert main(["recipe", "aif", *files, *own, "--out", str(tmp_path / "again")]) == 0
        assert (tmp_path / "again" / "data.jsonl").read_bytes() == (out / "aif" / "data.jsonl").read_bytes()
    pairs, heldout = read_lines(out / "pairs.jsonl"), read_lines(out / "heldout.jsonl")
    assert sorted(row["row"] for row in pairs + heldout) == [row["row"] for row in read_lines(out / "aif/pairs.jsonl")]
    assert not {row["prompt"] for row in pairs} & {row["prompt"] for row in heldout}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["dialogues"] == len(read_lines(out / "dsft" / "data.jsonl")) == 24
    assert summary["held-out prompts"] == len(read_lines(out / "before.jsonl")) == len(heldout)
    # A judge that prefers what it sees first contradicts itself: all ties.
    assert summary["win_rate"]["win_rate"] == 0.5
    assert (summary["prompt"]["ask"], summary["prompt"]["published"]) == ("pair", False)
    assert "eval_kl" in summary["eval"]
    config = json.loads((out / "dpo" / "config.json").read_text())
    assert config["model"] == str(out / "sft")
    report = (out / "report.html").read_text()
    assert all(text in report for text in ("held-out prompts", "Distilled DPO", "Which model wins", "Two judges"))


def test_messages_name_options_of_this_command() -> None:
    """Those that the stage's command has; a model in the pool has none of a command's."""
    for section, said, told in (
        ("aif", "--samples 4 of --judge x; --mesh.data", "--aif.samples 4 of --judge x; --aif.mesh.data"),
        ("aif", "--batch_size 8 does not divide", "--batch_size 8 does not divide"),
        ("dsft", "--batch_size 8; --prompts p", "--dsft.batch_size 8; --seeds p"),
        ("dsft", "endpoint.url c; a--b /tmp/--out", "dsft.endpoint.url c; a--b /tmp/--out"),
    ):

        def work(said: str = said) -> None:
            raise InputError(said)

        with pytest.raises(InputError) as error:
            zephyr._named(section, work)
        assert str(error.value) == told


def test_the_outcome_says_what_the_judge_was_asked() -> None:
    summary = {"judge": "judge:j.yaml", "prompt": None, "win_rate": None, "held-out prompts": 3}
    assert report.verdict(summary) == "The judge judge:j.yaml gave no verdict on 3 pairs of answers."
    rate = {"win_rate": 0.5, "interval": (0.2, 0.8), "n": 2, "wins": 1, "ties": 0, "losses": 1}
    summary |= {"prompt": {"name": "ours (en, version 1)", "ask": "pair", "published": False}, "win_rate": rate}
    said = report.verdict(summary | {"without a verdict": 1})
    assert "(asked for: pair; this project's prompt: ours (en, version 1)) the answers" in said


GIVEN = ["--model", "m", "--seeds", "s", "--prompts", "p", "--pool", "pool.yaml", "--judge", "length", "--out", "o"]


def test_the_shipped_recipe_has_the_papers_numbers() -> None:
    run = cli.parse("recipe zephyr", [str(ROOT / "configs" / "zephyr.py"), *GIVEN])
    assert (run.sft.optimizer.learning_rate, run.sft.train.batch_size, run.sft.data.packing) == (2e-5, 512, True)
    assert (run.dpo.dpo.beta, run.dpo.train.epochs, run.aif.samples, run.aif.rule) == (0.1, 3, 4, "zephyr")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "who is the teacher? Give --dsft.endpoint.url URL and --dsft.endpoint.model M, or --dsft.model MODEL"),
        (["--dsft.model", "m"], "1 writers, and each prompt is answered by --aif.samples 4 different ones"),
        (["--dsft.endpoint.url", "http://a:b@c/v1", "--dsft.endpoint.model", "m"], "dsft.endpoint.url c: leave the"),
        (["--dsft.prompts", "x"], "--dsft.prompts has no effect in dpo-jax recipe zephyr"),
        (["--dpo.reference", "x"], "--dpo.reference has no effect in dpo-jax recipe zephyr"),
        (["--heldout", "1"], "--heldout 1.0 must lie in (0, 1)"),
    ],
)
def test_one_line_errors(words, message, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pool.yaml").write_text("- {name: a, model: m}\n")
    assert main(["recipe", "zephyr", *GIVEN, *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
