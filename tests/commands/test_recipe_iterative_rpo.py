"""`dpo-jax recipe iterative_rpo`: its words and errors, and the whole of it on a tiny random model, killed and not."""

import json
import random
from pathlib import Path

import pytest
import runs
import tiny
from safetensors.numpy import load_file

from dpo_jax import cli
from dpo_jax.commands import generate
from dpo_jax.commands.recipes import iterative_rpo
from dpo_jax.config import SET_BY_RECIPE
from dpo_jax.files.jsonl import read_lines
from dpo_jax.report import iterative_rpo as report
from dpo_jax.train import session

ROOT = Path(__file__).resolve().parents[2]
GIVEN = ["--model", "m", "--prompts", "p.jsonl", "--out", "o"]


def test_the_recipe_parses() -> None:
    run = cli.parse("recipe iterative_rpo", [str(ROOT / "configs" / "iterative_rpo_rounds.py"), *GIVEN])
    assert (run.rounds, run.samples, run.pairs_per_prompt) == (4, 30, 10)
    assert [run.temperature(t) for t in (1, 2, 3, 4)] == [0.8, 0.8, 1.3, 1.3]
    short = cli.parse(
        "recipe iterative_rpo", [str(ROOT / "configs" / "iterative_rpo_rounds.py"), *GIVEN, "--rounds", "2"]
    )
    assert [short.temperature(t) for t in (1, 2)] == [0.8, 0.8]
    plain = cli.parse("recipe iterative_rpo", GIVEN)
    for dpo in (run.dpo, plain.dpo):
        assert {dpo.model, dpo.data.files, dpo.out} == {SET_BY_RECIPE}
        assert (dpo.dpo.beta, dpo.dpo.nll_coefficient, dpo.dpo.settled.nll_normalization) == (0.1, 1.0, "sequence")
        assert (dpo.optimizer.learning_rate, dpo.train.batch_size) == (7e-7, 16)
    assert [plain.temperature(t) for t in (1, 2, 3, 4, 9)] == [0.8, 0.8, 1.3, 1.3, 1.3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "1"], "--samples 1 must be at least 2"),
        (["--temperatures", "0"], "--temperatures 0.0 must be positive"),
        (["--rounds", "1", "--temperatures", "0.5", "1"], "--temperatures has 2 for --rounds 1"),
        (["--answer_pattern", "("], "--answer_pattern (: missing )"),
        (["--answer_pattern", "a"], "--answer_pattern a: has 0 groups"),
        (["--dpo.reference", "r"], "--dpo.reference has no effect in dpo-jax recipe iterative_rpo"),
        (["--sample.temperature", "0.5"], "--sample.temperature has no effect"),
        ([], "p.jsonl: row 2: --answer answer holds no answer (a number or a text); name the column, of prompt"),
        (["--answer", "why"], "p.jsonl: row 1: --answer why holds a text of 11 characters with none of ####"),
        (["--answer", "gold"], "p.jsonl: row 1: --answer gold holds no answer"),
        (["--answer", "lost"], "p.jsonl: row 1: --answer lost holds no answer"),
    ],
)
def test_one_line_errors(words, message, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "1+1", "answer": 2, "why": "one\\nand one", "lost": NaN}\n{"prompt": "1+2"}\n'
    )
    assert cli.main(["recipe", "iterative_rpo", *GIVEN, *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_sides_of_a_problem_by_hand() -> None:
    def sides(*answers: str) -> tuple[str, list[str], list[str]]:
        """An answer is right with a capital, and cut with a -."""
        rows = [
            {"response": text.rstrip("-"), "finish_reason": "length" if "-" in text else "stop"} for text in answers
        ]
        return iterative_rpo.sides(rows, [text[:1].isupper() for text in answers])

    all_right, all_wrong, no_winner, no_loser = report.REASONS
    assert sides("A", "b", "A", "c", "B-", "d-", "") == ("used", ["A"], ["b", "c"])
    assert sides("A", "A")[0] == sides("A-", "B")[0] == all_right
    assert sides("b", "a-", " ")[0] == sides("", " ")[0] == all_wrong  # blank answers are wrong
    assert sides("A-", "B-", "c") == (no_winner, [], ["c"])
    assert sides("A", " ", "b-") == (no_loser, ["A"], [])


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


@pytest.mark.slow
@pytest.mark.usefixtures("cheaply")
def test_the_whole_recipe_killed_and_not(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    for module in (session, generate):
        monkeypatch.setattr(module, "make_mesh", runs.small_mesh)
    # The user's own may hold log-probabilities of this reference that another version computed, to other roundings.
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache of the whole"))
    tiny.folder(tmp_path / "model", hidden=16, heads=2, kv_heads=1, layers=1)
    rng = random.Random(0)
    for name, count in (("p", 10), ("e", 6)):
        rows = [{"prompt": f"{i}: {tiny.sentence(rng, 2)}", "answer": rng.choice("abcd")} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = tmp_path / "whole"
    run = words(tmp_path, whole)
    assert cli.main(run) == 0
    assert "held-out problems" in capsys.readouterr().out

    summary = json.loads((whole / "summary.json").read_text())
    assert [row["model"] for row in summary["rounds"]] == ["M0", "M1", "M2"]
    known = {i + 1: row["answer"] for i, row in enumerate(read_lines(tmp_path / "p.jsonl"))}
    for t in (1, 2):
        row, folder = summary["rounds"][t], whole / f"round-{t}"
        assert row["problems"] == 10
        assert sum(row[name] for name in (*report.REASONS, "used")) == 10
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
            assert {(pair["row"], pair["chosen"]), (pair["row"], pair["rejected"])} <= finished
            assert [c for c in pair["rejected"] if c in "abcdefghijklm"][-1:] != [known[pair["row"]]]
        config = json.loads((folder / "dpo" / "config.json").read_text())
        before = tmp_path / "model" if t == 1 else whole / "round-1" / "dpo"
        assert (config["model"], config["reference"]) == (str(before), None)

    # The same again, killed in every stage: the same bits.
    one = tmp_path / "one"
    whole.rename(one)
    killed = runs.killed_everywhere(tmp_path / "killed", "rows", run, tmp_path / "cache")
    assert killed == runs.stages_below(one) == runs.stages_below(whole)
    for path in [*one.glob("*.jsonl"), *one.glob("round-*/*.jsonl"), one / "summary.json"]:
        assert path.read_bytes() == (whole / path.relative_to(one)).read_bytes(), path
    for name in ("round-1/dpo", "round-2/dpo"):
        assert runs.metrics(one / name) == runs.metrics(whole / name)
    weights = [load_file(out / "round-2" / "dpo" / "model" / "model.safetensors") for out in (whole, one)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0] | weights[1])
