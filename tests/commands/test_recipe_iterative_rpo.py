"""`dpo-jax recipe iterative_rpo`: its words and errors, and the whole of it on a tiny random model, killed and not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import tiny
from safetensors.numpy import load_file

from dpo_jax import cli
from dpo_jax.config import SET_BY_RECIPE
from dpo_jax.files.jsonl import read_lines

ROOT = Path(__file__).resolve().parents[2]
GIVEN = ["--model", "m", "--prompts", "p.jsonl", "--out", "o"]


def test_the_recipe_parses() -> None:
    run = cli.parse("recipe iterative_rpo", [str(ROOT / "configs" / "iterative_rpo_rounds.py"), *GIVEN])
    assert (run.rounds, run.samples, run.pairs_per_prompt) == (4, 30, 10)
    assert [run.temperature(t) for t in (1, 2, 3, 4)] == [0.8, 0.8, 1.3, 1.3]
    plain = cli.parse("recipe iterative_rpo", GIVEN)
    for dpo in (run.dpo, plain.dpo):
        assert {dpo.model, dpo.data.files, dpo.out} == {SET_BY_RECIPE}
        assert (dpo.dpo.beta, dpo.dpo.nll_coefficient, dpo.dpo.resolved("nll_normalization")) == (0.1, 1.0, "sequence")
        assert (dpo.optimizer.learning_rate, dpo.train.batch_size) == (7e-7, 16)
    assert [plain.temperature(t) for t in (1, 2, 3, 4, 9)] == [0.8, 0.8, 1.3, 1.3, 1.3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "1"], "--samples 1: a pair takes at least 2"),
        (["--temperatures", "0"], "--temperatures 0.0: must be positive"),
        (["--rounds", "1", "--temperatures", "0.5", "1"], "--temperatures has 2 for --rounds 1"),
        (["--answer_pattern", "("], "--answer_pattern (: missing )"),
        (["--answer_pattern", "a"], "--answer_pattern a: has 0 groups"),
        (["--dpo.reference", "r"], "--dpo.reference has no effect in dpo-jax recipe iterative_rpo"),
        (["--sample.temperature", "0.5"], "--sample.temperature has no effect"),
        ([], "p.jsonl: row 2: --answer answer holds no answer (a number or a text); name the column, of prompt"),
        (["--answer", "gold"], "p.jsonl: row 1: --answer gold holds no answer"),
    ],
)
def test_one_line_errors(words, message, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1", "answer": 2}\n{"prompt": "1+2"}\n')
    assert cli.main(["recipe", "iterative_rpo", *GIVEN, *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


# ---- the whole recipe ----------------------------------------------------------------------------------------------


def words(folder: Path, out: Path) -> list[str]:
    """Two rounds. An answer is right whose last letter is a vowel of its problem's: of random text, about a quarter."""
    found = f"recipe iterative_rpo --model {folder}/model --prompts {folder}/p.jsonl --eval_prompts {folder}/e.jsonl"
    found += f" --out {out} --rounds 2 --samples 8 --pairs_per_prompt 3 --temperatures 1.0 1.2 --batch_size 16"
    found += " --answer_pattern ([a-m]) --sample.max_new_tokens 8 --sample.stop_strings e o"
    found += " --dpo.train.batch_size 4 --dpo.train.steps 3 --dpo.optimizer.learning_rate 1e-2 --dpo.data.buckets 1"
    found += " --dpo.data.max_length 48 --dpo.data.max_prompt_length 32 --dpo.checkpoint.every 1"
    found += " --dpo.mesh.data 1 --dpo.mesh.fsdp 1 --dpo.mesh.tensor 1"
    return found.split()


def start(folder: Path, out: Path) -> subprocess.Popen[str]:
    """The recipe in a process of its own, on one device."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "DPO_JAX_CACHE": str(folder / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "dpo_jax", *words(folder, out)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_the_whole_recipe_killed_and_not(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model", hidden=16, heads=2, kv_heads=1, layers=1)
    rng = random.Random(0)
    for name, count in (("p", 10), ("e", 6)):
        rows = [{"prompt": f"{i}: {tiny.sentence(rng, 2)}", "answer": rng.choice("abcd")} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = tmp_path / "whole"
    process = start(tmp_path, whole)
    wait_for(whole / "round-2" / "dpo" / "checkpoints" / "1", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (whole / "summary.json").exists()
    said = finish(start(tmp_path, whole))
    assert "M1: DPO: done" in said
    assert "held-out problems" in said

    summary = json.loads((whole / "summary.json").read_text())
    assert [row["model"] for row in summary["rounds"]] == ["M0", "M1", "M2"]
    known = {i + 1: row["answer"] for i, row in enumerate(read_lines(tmp_path / "p.jsonl"))}
    for t in (1, 2):
        row, folder = summary["rounds"][t], whole / f"round-{t}"
        assert row["problems"] == 10
        assert sum(row[name] for name in ("all right", "all wrong", "right answers are cut or blank", "used")) == 10
        pairs = read_lines(folder / "pairs.jsonl")
        assert len(pairs) == row["pairs"] > 0
        assert len({(pair["row"], pair["chosen"], pair["rejected"]) for pair in pairs}) == len(pairs)
        assert max(sum(pair["row"] == number for pair in pairs) for number in known) <= 3
        finished = {
            (a["row"], a["response"]) for a in read_lines(folder / "answers.jsonl") if a["finish_reason"] == "stop"
        }
        for pair in pairs:
            last = [c for c in pair["chosen"] if c in "abcdefghijklm"][-1]
            assert last == known[pair["row"]]
            assert (pair["row"], pair["chosen"]) in finished
            assert [c for c in pair["rejected"] if c in "abcdefghijklm"][-1:] != [known[pair["row"]]]
        config = json.loads((folder / "dpo" / "config.json").read_text())
        before = tmp_path / "model" if t == 1 else whole / "round-1" / "dpo"
        assert (config["model"], config["reference"]) == (str(before), None)

    # Round 2 anew, without an interruption.
    one = tmp_path / "killed"
    one.mkdir()
    for name in ("round-2", "heldout-2.jsonl", "summary.json"):
        shutil.move(whole / name, one / name)
    record = json.loads((whole / "stages.json").read_text())
    kept = list(record)[: list(record).index("accuracy of M1") + 1]
    (whole / "stages.json").write_text(json.dumps({name: record[name] for name in kept}))
    (whole / "heldout-2-answers.jsonl").unlink()
    finish(start(tmp_path, whole))
    for name in ("round-2/answers.jsonl", "round-2/pairs.jsonl", "heldout-2.jsonl", "summary.json"):
        assert (one / name).read_bytes() == (whole / name).read_bytes()
    assert runs.metrics(one / "round-2" / "dpo") == runs.metrics(whole / "round-2" / "dpo")
    weights = [load_file(out / "round-2" / "dpo" / "model" / "model.safetensors") for out in (whole, one)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0] | weights[1])
