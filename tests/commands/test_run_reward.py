"""`dpo-jax reward`, `score` and `eval` of a reward model, from end to end on a tiny model."""

import json
import random
import re

import chex
import numpy as np
import pytest
import tiny
from runs import small_mesh

import dpo_jax
from dpo_jax import cli
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.errors import InputError
from dpo_jax.judge.reward_model import RewardModel
from dpo_jax.judge.rewards.functions import ModelReward

MESH = ["--mesh.data", "8", "--mesh.fsdp", "1"]
SMALL = ["--data.max_length", "48", "--data.buckets", "1", "--data.workers", "0", *MESH]


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> None:
    """Pictures are drawn here."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("model") / "tiny", layers=1)


def judge(folder):
    """A reward model as PPO has it."""
    return ModelReward(str(folder), raw=False, mesh=small_mesh(1, 1, 1), batch_size=8)


def asked(*texts):
    return [Prompt((Message("user", text),), text) for text in texts]


def ratings(path, rows=48, seed=0, **columns):
    """Pairs of which the better says "kind" and the worse "rude", rated."""
    rng = random.Random(seed)
    lines = [
        {
            "prompt": f"{i // 2}: {tiny.sentence(rng, 3)}",
            "chosen": tiny.sentence(rng, rng.randint(1, 4)) + " kind",
            "rejected": tiny.sentence(rng, rng.randint(1, 4)) + " rude",
            "rating": rng.choice(["better", "slightly better"]),
            "labels": {"safety": ["safe", "unsafe"]},
            **columns,
        }
        for i in range(rows)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished run with everything: margins, a mixture, an auxiliary head, prompts held out."""
    out = tmp_path_factory.mktemp("run")
    first, second = ratings(out / "kind.jsonl"), ratings(out / "more.jsonl", rows=24, seed=1, source="other")
    args = ["reward", "--model", folder, "--data", first, "--mix_data", second, "--mix", "0.2", "--out", out / "rm"]
    args += ["--holdout", "0.25", "--reward.margin", "small", "--reward.multi_class", "safety:0.5=safe,unsafe"]
    args += [
        "--reward.centering",
        "0.01",
        "--optimizer.learning_rate",
        "2e-2",
        "--train.steps",
        "12",
        "--lora.rank",
        "2",
    ]
    assert cli.main([*map(str, args), *SMALL]) == 0
    return out


def test_a_run_learns_and_reports(run):
    rows = [json.loads(line) for line in (run / "rm" / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    assert last["accuracy"] > 0.8
    assert last["eval_accuracy"] > 0.8
    assert last["eval_safety/recall/unsafe"] > 0.5
    assert {"margin", "mean_reward", "min_reward", "max_reward", "rewards/margins", "safety/loss"} <= last.keys()
    assert {"eval_accuracy/rating/better", "eval_accuracy/source/kind", "eval_accuracy/source/other"} <= last.keys()
    assert "Held-out accuracy by group" in (run / "rm" / "report.html").read_text()
    raw = json.loads((run / "rm" / "model" / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForSequenceClassification"]
    _, variables = dpo_jax.load_pretrained(run / "rm")
    assert variables["heads"].keys() == {"score", "safety"}
    assert (run / "rm" / "adapter" / "adapter_config.json").is_file()


def test_the_checkpoint_is_the_model(run):
    """An unfinished run's newest checkpoint loads as the reward model that it is."""
    steps = sorted((run / "rm" / "checkpoints").iterdir(), key=lambda p: p.name)
    final, there = judge(run / "rm"), judge(steps[-1])
    texts = (asked("a film", "a book"), ["kind", "rude"])
    np.testing.assert_allclose(there(*texts), final(*texts), atol=1e-4)


@pytest.mark.slow
def test_a_stopped_run_ends_like_one_that_was_not(folder, tmp_path, monkeypatch):
    data = ratings(tmp_path / "rows.jsonl", rows=24)

    def train(out, code=0):
        args = ["reward", "--model", folder, "--data", data, "--out", tmp_path / out, "--train.steps", "6"]
        args += ["--reward.multi_class", "safety=safe,unsafe", "--optimizer.learning_rate", "1e-2"]
        assert cli.main([*map(str, args), *SMALL]) == code

    train("whole")
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr("dpo_jax.train.loop.StopRequest.here", lambda self: calls.append(0) or len(calls) >= 3)
        train("stopped", 143)
    assert not (tmp_path / "stopped" / "model").exists()
    train("stopped")
    metrics = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    ]
    whole, stopped = ([(row["step"], row["loss"]) for row in rows] for rows in metrics)
    assert whole == stopped
    ends = [dpo_jax.load_pretrained(tmp_path / name)[1] for name in ("whole", "stopped")]
    chex.assert_trees_all_equal(*ends)


def scored(run, data, out, *more):
    args = ["score", "--model", run / "rm", "--data", data, "--out", out, "--batch_size", "8", *more]
    assert cli.main([*map(str, args), "--data.max_length", "48", *MESH]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_score(run, tmp_path):
    data = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": "a film", "chosen": "kind", "rejected": "rude"},
        {"prompt": "a film", "responses": ["rude", "rude", "kind"], "id": 7},
        {"prompt": "a film", "completion": "kind"},
    ]
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    rows = scored(run, data, tmp_path / "out.jsonl")
    assert [row["row"] for row in rows] == [1, 2, 3]
    assert rows[0]["rewards"] == [rows[0]["chosen_reward"], rows[0]["rejected_reward"]]
    assert len(rows[1]["rewards"]) == 3
    assert rows[0]["chosen_reward"] > rows[0]["rejected_reward"]
    kind, rude = rows[0]["labels"]["safety"]
    assert kind["safe"] > rude["safe"]
    assert kind["safe"] + kind["unsafe"] == pytest.approx(1)
    assert [len(row["labels"]["safety"]) for row in rows] == [2, 3, 1]
    np.testing.assert_allclose(rows[1]["rewards"], [rows[0]["rejected_reward"]] * 2 + [rows[2]["reward"]], atol=1e-4)

    copied = scored(run, data, tmp_path / "copied.jsonl", "--copy")
    assert copied[1] == {**lines[1], **rows[1]}

    # Interrupted after two rows: the file is gone on with, and comes out the same.
    whole = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "out.jsonl").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_jax.files.jsonl.RowsFile.finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        args = ["score", "--model", run / "rm", "--data", data, "--out", tmp_path / "out.jsonl", "--batch_size", "8"]
        assert cli.main([*map(str, args), "--data.max_length", "48", *MESH]) == 130
    part = tmp_path / "out.jsonl.part"
    part.write_text("".join(part.read_text().splitlines(keepends=True)[:3]))
    assert [row["row"] for row in scored(run, data, tmp_path / "out.jsonl")] == [1, 2, 3]
    assert (tmp_path / "out.jsonl").read_text() == whole


def test_reward_functions_of_texts_and_tokens(run):
    texts = judge(run / "rm")
    prompts, answers = ["a film", "a film", "the book was"], ["kind", "rude", "not kind"]
    scores = texts(asked(*prompts), answers)
    assert scores.dtype == np.float32
    assert scores[0] > scores[1]
    np.testing.assert_allclose(scores[::-1], texts(asked(*prompts[::-1]), answers[::-1]), atol=1e-5)

    tokens = RewardModel.load(str(run / "rm"), batch_size=2)
    tokenizer = dpo_jax.load_tokenizer(run / "rm")
    ids = [tokenizer(f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n")["input_ids"] for p in prompts]
    replies = [tokenizer(f"{a}<|im_end|>\n")["input_ids"] for a in answers]
    np.testing.assert_allclose(tokens.score_tokens(ids, replies), scores, atol=1e-4)
    assert tokens.score_tokens([], []).shape == (0,)
    with pytest.raises(InputError, match="text 0: prompt of 0"):
        tokens.score_tokens([[]], [[1]])


def test_eval_of_a_reward_model(run, tmp_path, capsys):
    data = ratings(tmp_path / "held.jsonl", rows=16, seed=5)
    args = ["eval", "--model", run / "rm", "--judge", run / "rm" / "adapter", "--data", data]
    args += ["--out", tmp_path / "eval.json", "--report", tmp_path / "eval.html", "--data.max_length", "48"]
    assert cli.main([*map(str, args), "--batch_size", "8", *MESH]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["pairs"] == 16
    assert result["eval_accuracy"] > 0.7
    assert result["judge/agreement"] == 1  # the adapters with their base are the merged model
    assert {"rating", "length_difference"} <= result["tables"].keys()
    page = (tmp_path / "eval.html").read_text()
    assert "Reliability" in page
    assert page.count("<svg") == 4
    assert "by rating" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "--model", "{folder}", "--data", "{data}", "--out", "x"], r"has no reward head .*dpo-jax reward"),
        (["eval", "--model", "{rm}", "--data", "{data}", "--samples", "2"], "--reference and --samples have no effect"),
        (["eval", "--model", "{folder}", "--data", "{data}", "--judge", "{rm}"], "is no reward model"),
        (["eval", "--model", "{rm}", "--data", "{data}", "--judge", "{folder}"], "has no reward head"),
        (["generate", "--model", "{rm}", "--prompt", "a"], "this model is a reward model"),
        (
            ["reward", "--model", "{folder}", "--data", "{data}", "--out", "{out}", "--train.eval_every", "2"],
            "--train.eval_every has no effect",
        ),
        (
            ["reward", "--model", "{folder}", "--data", "{data}", "--out", "{out}", "--mix", "0.2"],
            "--mix has no effect without --mix_data",
        ),
        (
            ["reward", "--model", "{folder}", "--data", "{data}", "--out", "{out}", "--reward.margin", "agreement"],
            "no agreement for --reward.margin agreement",
        ),
    ],
)
def test_one_line_errors(words, message, folder, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"folder": folder, "rm": run / "rm", "data": run / "kind.jsonl", "out": tmp_path / "out"}
    args = [word.format(**names) for word in words] + (["--batch_size", "8"] if words[0] in ("score", "eval") else [])
    assert cli.main(args) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dpo-jax: error:")
    assert re.search(message, error), error
