"""`dpo-jax recipe llama3`: its words and errors, and the whole of it on a tiny random model, killed and not."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import tiny
from safetensors.numpy import load_file

from dpo_jax import cli, mesh
from dpo_jax.commands import generate
from dpo_jax.commands.recipes import judged_answers, llama3
from dpo_jax.config import SET_BY_RECIPE
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import read_lines
from dpo_jax.judge import loading
from dpo_jax.train import session

ROOT = Path(__file__).resolve().parents[2]
GIVEN = ["--model", "m", "--prompts", "p", "--judge", "vader", "--out", "o"]


def test_the_recipe_parses() -> None:
    words = [str(ROOT / "configs" / "llama3_rounds.py"), *GIVEN, "--sft_data", "s"]
    run = cli.parse("recipe llama3", [*words, "--average_over", "train.seed=1", "dpo.nll_coefficient=0.1", "pairs=all"])
    short = [str(ROOT / "configs" / "llama3_rounds_dpo.py"), *GIVEN]
    asked = "--rejection.sample.top_p .9 --rejection.data.template zephyr --rejection.train.dtype float32".split()
    for one in (run, cli.parse("recipe llama3", [*GIVEN, "--stages", "dpo"]), cli.parse("recipe llama3", short)):
        assert {one.sft.model, one.reward.data.files, one.rejection.reward, one.dpo.out} == {SET_BY_RECIPE}
        assert (one.dpo.dpo.beta, one.dpo.dpo.nll_coefficient, one.dpo.dpo.mask_format_tokens) == (0.1, 0.2, True)
        assert (one.dpo.optimizer.learning_rate, one.reward.reward.margin, one.rounds) == (1e-5, "none", 6)
    assert run.rejection.rejection.samples == 10
    assert cli.parse("recipe llama3", [*short, *asked]).rejection.sample.top_p == 0.9
    (seed, _), (nll, _), (same, every) = [run.variant(name) for name in run.average_over]
    assert (seed.train.seed, nll.dpo.nll_coefficient, every) == (1, 0.1, True)
    assert (seed.train.batch_size, same) == (128, run.dpo)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --sft_data DIALOGUES"),
        (["--stages", "dpo", "--sft_data", "s"], "--sft_data has no effect with --stages dpo"),
        (["--stages", "dpo", "--reward.train.steps", "3"], "--reward.* has no effect with --stages dpo"),
        (["--sft_data", "s", "--reward.reward.margin", "small"], "--reward.reward.margin has no effect"),
        (["--sft_data", "s", "--rejection.rejection.student", "x"], "--rejection.rejection.student has no effect"),
        (["--sft_data", "s", "--average_over", "seed=1"], "--average_over seed=1: write OPTION=VALUE"),
        (["--sft_data", "s", "--average_over", "train.sed=1"], "--average_over train.sed=1: no such option"),
        (["--sft_data", "s", "--average_over", "dpo.beta=0.1"], "--average_over dpo.beta=0.1: is what --dpo.dpo.beta"),
        (["--sft_data", "s", "--average_over", "dpo.beta=-1"], "--average_over dpo.beta=-1: --dpo.beta -1.0 must be"),
        (["--sft_data", "s", "--average_over", "train.seed=1", "train.seed=1"], "names train.seed=1 twice"),
        (
            ["--sft_data", "s", "--average_over", "train.seed=1", "train.seed=01"],
            "names train.seed=1 twice, as train.se",
        ),
        *(
            (["--sft_data", "s", "--average_over", spec], f"--average_over {spec}: {message}")
            for spec, message in {
                "dpo.loss=foo": "invalid choice 'foo' for argument '--dpo.loss'",
                "optimizer.name=foo": "invalid choice",
                "optimizer.schedule=foo": "invalid choice",
                "dpo.nll_normalization=zzz": "invalid choice",
                "dpo.nll_normalization=sequence": "is what --dpo.dpo.nll_normalization is already",
                "train.dtype=int8": "invalid choice",
                "train.seed=abc": "--train.seed: invalid literal",
                "train.seed=1.5": "--train.seed: invalid literal",
                "optimizer.learning_rate=true": "--optimizer.learning_rate: could not convert",
                "optimizer.learning_rate=inf": "--optimizer.learning_rate inf must be finite",
                "optimizer.learning_rate=nan": "--optimizer.learning_rate nan must be positive",
                "train.eval_every=5": "changes nothing in the model",
                "train.remat=full": "changes nothing in the model",
                "optimizer.decay=0.5": "--optimizer.decay has no effect with --optimizer.name adamw",
            }.items()
        ),
        (["--stages", "dpo", "--rejection.optimizer.learning_rate", "1"], "--rejection.optimizer.learning_rate has no"),
        (["--stages", "dpo", "--rejection.train.epochs", "2"], "--rejection.train.epochs has no effect with --stages"),
        (["--stages", "dpo", "--rejection.rejection.samples", "5"], "--rejection.rejection.samples has no effect with"),
        (["--sft_data", "s", "--rejection.rejection.pool", "latest"], "--rejection.rejection.pool has no effect"),
        (["--sft_data", "s", "--rejection.reward_memory", "5"], "--rejection.reward_memory has no effect"),
        (["--sft_data", "s", "--heldout", "1"], "--heldout 1.0 must lie in (0, 1)"),
    ],
)
def test_one_line_errors(words, message, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipe", "llama3", *GIVEN, *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_an_edit_ranks_above_the_chosen_response() -> None:
    row = {"prompt": "p", "chosen": "b", "rejected": "c", "rating": "better"}
    assert llama3.ranked(row | {"edited": "a"}, "f", 1) == {"prompt": "p", "responses": ["a", "b", "c"]}
    assert llama3.ranked(row | {"edited": None}, "f", 1) == row
    with pytest.raises(InputError, match=r"f: row 7: 'edited' stands beside 'chosen' and 'rejected'"):
        llama3.ranked({"prompt": "p", "chosen": ["b"], "rejected": "c", "edited": "a"}, "f", 7)


def test_answers_without_a_score_are_left_out(tmp_path: Path, monkeypatch, caplog) -> None:
    calls: list[int] = []

    def judge(prompts, responses):
        calls.append(len(responses))
        return [None if text == "?" else len(text) for text in responses]

    judge.everywhere = True
    monkeypatch.setattr(judged_answers, "make_mesh", runs.small_mesh)
    monkeypatch.setattr(judged_answers, "open_reward", lambda *words, **setting: judge)
    like = cli.parse("recipe llama3", [*GIVEN, "--stages", "dpo"]).rejection
    prompts = {i: judged_answers.Prompt((), str(i)) for i in range(90)}
    rows = [{"row": i, "response": "?" if (i, k) == (1, 1) else "a" * k} for i in prompts for k in range(3)]
    found = judged_answers.judge_answers(rows, prompts, "judge:F.yaml", like, "o")
    assert found == [row | {"score": len(row["response"])} for row in rows if row["response"] != "?"]
    assert calls == [258, 12]  # 256 would have cut the answers to one prompt
    assert "--judge judge:F.yaml: 1 of 270 answers got no score and are left out" in caplog.text
    with pytest.raises(InputError, match=r"--judge judge:F.yaml: none of 1 answers got a score"):
        judged_answers.judge_answers(rows[4:5], prompts, "judge:F.yaml", like, "o")


def test_cut_answers_are_in_no_pair(tmp_path: Path) -> None:
    run = cli.parse("recipe llama3", [*GIVEN, "--stages", "dpo", "--heldout", "0.5"])
    recipe = llama3.Llama3(run, tmp_path)
    ends = ["stop", "stop", "length", "stop", "length"]
    texts = list(zip("abcde", (1.0, 2.0, 3.0, 0.5, 0.0), ends, strict=True))
    rows = [
        {"row": i, "prompt": f"p{i}", "response": text, "score": score * (1 + i), "finish_reason": end}
        for i in range(20)
        for text, score, end in texts
    ]
    (tmp_path / "v0").mkdir()
    (tmp_path / "v0" / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert recipe._pairs(0)["answers cut"] == 40
    made = [row for name in ("learnt", "heldout") for row in read_lines(tmp_path / "v0" / f"{name}.jsonl")]
    assert {(row["chosen"], row["rejected"]) for row in made} == {("b", "d")}
    assert len(made) == 20
    cut = [row | {"finish_reason": "length"} for row in rows]
    (tmp_path / "v0" / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in cut))
    with pytest.raises(InputError, match=r"for 0 prompts.*\(100 of 100 answers are cut\).*max_new_tokens"):
        recipe._pairs(0)


# ---- the whole recipe ----------------------------------------------------------------------------------------------


def inputs(folder: Path) -> None:
    tiny.folder(folder / "model", hidden=16, heads=2, kv_heads=1, layers=1)
    rng = random.Random(0)
    prompts = [{"prompt": f"{i}: {tiny.sentence(rng, 2)}"} for i in range(24)]
    given = [{"prompt": f"given {i}", "chosen": "a good", "rejected": "bad"} for i in range(16)]
    given = [row | {"edited": "quite a good"} if i % 2 else row for i, row in enumerate(given)]
    files = {
        "prompts": prompts,
        "sft": [row | {"response": tiny.sentence(rng, 2)} for row in prompts],
        "given": given,
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(
        "def letters(prompts, responses):\n    return [sum(c.islower() for c in text) / 6 for text in responses]\n"
    )


def words(folder: Path, out: Path) -> list[str]:
    """Two rounds, everything tiny."""
    found = f"recipe llama3 --model {folder}/model --prompts {folder}/prompts.jsonl --judge {folder}/mine.py:letters"
    found += f" --sft_data {folder}/sft.jsonl --preferences {folder}/given.jsonl --out {out} --rounds 2"
    found += " --average_over train.seed=1 --pair_samples 3 --batch_size 16 --heldout 0.25"
    found += " --rejection.rejection.samples 2 --rejection.sample.max_new_tokens 6 --rejection.sample_batch_size 16"
    found += (
        " --rejection.sample.stop_strings e o r t"  # of random text most would be cut, and cut texts are in no pair
    )
    for stage in ("sft", "reward", "rejection", "dpo"):
        found += f" --{stage}.train.steps 2 --{stage}.train.batch_size 4 --{stage}.data.max_length 56"
        found += f" --{stage}.data.buckets 1 --{stage}.optimizer.learning_rate 1e-2 --{stage}.checkpoint.every 1"
        found += f" --{stage}.mesh.data 1 --{stage}.mesh.fsdp 1 --{stage}.mesh.tensor 1"
    for stage in ("reward", "dpo"):
        found += f" --{stage}.data.max_prompt_length 40"
    return found.split()


@pytest.mark.slow
@pytest.mark.usefixtures("cheaply")
def test_the_whole_recipe_killed_and_not(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    for module in (session, generate, judged_answers):
        monkeypatch.setattr(module, "make_mesh", runs.small_mesh)
    small = SimpleNamespace(make_mesh=runs.small_mesh, batch_parts=mesh.batch_parts)
    monkeypatch.setattr(loading, "meshes", small)
    inputs(tmp_path)
    out = tmp_path / "out"
    run = words(tmp_path, out)
    assert cli.main(run) == 0
    assert "2 models a round were averaged" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert [row["version"] for row in summary["versions"]] == [0, 1, 2]
    config = {
        name: json.loads((out / "round-2" / name / "config.json").read_text()) for name in ("reward", "rejection")
    }
    assert config["reward"]["model"] == config["rejection"]["rejection"]["student"] == str(tmp_path / "model")
    best = summary["versions"][2]["written_by"]
    scores = [row["score"] for row in summary["versions"][:2]]
    assert scores[best] == max(scores)
    assert config["rejection"]["model"] == str(out / ("round-1/average" if best else "sft"))
    # Reward model 2 has learnt from all that came before; DPO from the newest pairs of the upper two grades.
    learnt = [row for name in ("given", "v0", "v1") for row in read_lines(out / name / "learnt.jsonl")]
    assert read_lines(out / "round-2" / "comparisons.jsonl") == learnt
    assert any(row.get("responses") == ["quite a good", "a good", "bad"] for row in learnt)
    taught = read_lines(out / "round-2" / "dpo.jsonl")
    assert taught == [r for r in read_lines(out / "v1" / "learnt.jsonl") if r["rating"] in llama3.RATINGS[2:]]
    held = {row["prompt"] for row in read_lines(out / "v1" / "heldout.jsonl")}
    assert held
    assert not held & {row["prompt"] for row in learnt}
    dpo = [json.loads((out / "round-2" / name / "config.json").read_text()) for name in ("dpo", "dpo-2")]
    assert [one["train"]["seed"] for one in dpo] == [0, 1]
    assert {one["model"] for one in dpo} == {str(out / "round-2" / "rejection")}
    one, two, mean = (
        load_file(out / "round-2" / name / "model.safetensors") for name in ("dpo/model", "dpo-2/model", "average")
    )
    for name, values in mean.items():
        np.testing.assert_allclose(values, (one[name] + two[name]) / 2, atol=1e-6)

    # The same again, killed in every stage: the same bits.
    before = tmp_path / "before"
    out.rename(before)
    killed = runs.killed_everywhere(tmp_path / "killed", "rows", run, tmp_path / "cache")
    assert killed == runs.stages_below(before) == runs.stages_below(out)
    for path in [*sorted(before.rglob("*.jsonl")), before / "summary.json"]:
        again = out / path.relative_to(before)
        if path.name == "metrics.jsonl":
            assert runs.metrics(path.parent) == runs.metrics(again.parent), path
        else:
            assert path.read_bytes() == again.read_bytes(), path
    again = load_file(out / "round-2" / "average" / "model.safetensors")
    assert all((again[name] == mean[name]).all() for name in mean)
