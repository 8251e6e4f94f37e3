"""`dpo-jax rejection` from end to end on a tiny random model."""

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import chat_server
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from dpo_jax import cli
from dpo_jax.align import rewards
from dpo_jax.commands import rejection
from dpo_jax.complete.writing.writer import Writer
from dpo_jax.config import (
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    RejectionConfig,
    RejectionRun,
    SampleConfig,
    SFTDataConfig,
    TrainConfig,
)
from dpo_jax.data.sets.loader import TokenLoader
from dpo_jax.data.sets.prompts import PromptDataset, load_prompts
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.errors import InputError, Stopped
from dpo_jax.files.jsonl import RowsFile, read_lines
from dpo_jax.judge.rewards import pool as best_responses, scores as responses
from dpo_jax.report import rejection as rejection_report
from dpo_jax.train import session as training
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("compile_roughly")

TEMPERATURES, SAMPLES, TRAINED, HELD_OUT = (0.7, 1.2), 4, 10, 10
NOT_COMPARED = ("run.json", "config.json", "stages.json")


def prompts(path: Path, rows: int, first: int = 0) -> Path:
    """A file of prompts, all within one bucket of the sampler."""
    rng = random.Random(first)
    lines = [json.dumps({"prompt": f"{first + i}: {tiny.sentence(rng, rng.randint(1, 3))}"}) for i in range(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model (`model`), prompts to train on and to hold out, and reward functions."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", hidden=16, heads=2, kv_heads=1, layers=1)
    prompts(folder / "train.jsonl", TRAINED)
    prompts(folder / "eval.jsonl", HELD_OUT, first=20)
    (folder / "mine.py").write_text(
        "def letters(prompts, responses):\n    return [sum(c.islower() for c in text) / 6 for text in responses]\n"
        "def same(prompts, responses):\n    return [1.0] * len(responses)\n"
        "def nan(prompts, responses):\n    return [float('nan') if p.startswith('4:') else 1.0 for p in prompts]\n"
    )
    return folder


@pytest.fixture(autouse=True)
def few_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "make_mesh", runs.small_mesh)
    monkeypatch.setattr(responses, "SCORED", 32)


def options(inputs: Path, out: Path, **changes: Any) -> RejectionRun:
    """Two iterations of four samples at two temperatures."""
    config = RejectionRun(
        model=str(inputs / "model"),
        eval_data=str(inputs / "eval.jsonl"),
        out=str(out),
        reward=f"{inputs / 'mine.py'}:letters",
        rejection=RejectionConfig(samples=SAMPLES, temperatures=TEMPERATURES, iterations=2, eval_samples=SAMPLES),
        sample=SampleConfig(max_new_tokens=6),
        sample_batch_size=16,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        data=SFTDataConfig(str(inputs / "train.jsonl"), template="raw", max_length=32, packing=True, train_on="last"),
        train=TrainConfig(steps=12, batch_size=4),
        checkpoint=CheckpointConfig(every=3),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
    )
    return runs.changed(config, **changes)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", runs.small_mesh)
        return rejection.train(options(inputs, tmp_path_factory.mktemp("whole") / "run"))


def test_the_whole_run(whole: Path, inputs: Path) -> None:
    rows = read_lines(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    pools = []
    for t, row in zip((1, 2), rows[1:], strict=True):
        folder = whole / f"iteration-{t}"
        samples, scores = read_lines(folder / "samples.jsonl"), read_lines(folder / "scores.jsonl")
        order = [(r["row"], r["temperature"], r["sample"]) for r in samples]
        assert order == list(itertools.product(range(1, TRAINED + 1), TEMPERATURES, range(SAMPLES)))
        assert [(r["row"], r["temperature"], r["sample"]) for r in scores] == order
        for sample, score in zip(samples, scores, strict=True):
            assert score["score"] == np.float32(sum(c.islower() for c in sample["response"]) / 6)
        assert len({sample["response"] for sample in samples}) > 60
        every = np.asarray([score["score"] for score in scores]).reshape(TRAINED, -1)
        assert row["rewards/mean"] == pytest.approx(every.mean(), rel=1e-6)
        assert row["rewards/median"] == pytest.approx(np.median(every))
        assert row["rewards/best"] == pytest.approx(every.max(axis=1).mean(), rel=1e-6)

        # The pool holds the best ever, with where it comes from.
        pool = read_lines(folder / "pool.jsonl")
        assert len(pool) == TRAINED
        for p, best in enumerate(pool):
            higher = every[p].max() if not pools else max(every[p].max(), pools[-1][p]["score"])
            assert best["score"] == higher
            if best["iteration"] < t:
                assert best == pools[-1][p]
                continue
            wanted = {"prompt": best["prompt"], "temperature": best["temperature"], "sample": best["sample"]}
            (found,) = [s for s in samples if wanted.items() <= s.items()]
            assert found["response"] == best["completion"]
        pools.append(pool)
        assert read_lines(folder / "sft.jsonl") == pool
        assert row["rewards/pool"] == pytest.approx(np.mean([best["score"] for best in pool]))

        curves = json.loads((folder / "curves.json").read_text())
        assert curves["counts"] == [1, 2, 3, 4]
        for j in range(2):
            own = every[:, j * SAMPLES : (j + 1) * SAMPLES]
            assert curves["maximum"][j][0] == pytest.approx(own.mean(), abs=1e-5)
            assert curves["maximum"][j][-1] == pytest.approx(own.max(axis=1).mean(), abs=1e-5)
            assert curves["median"][j][-1] == pytest.approx(np.median(own, axis=1).mean(), abs=1e-5)
    assert {best["iteration"] for best in pools[1]} == {1, 2}
    assert read_lines(whole / "pool.jsonl") == pools[1]

    held_out = [np.asarray([s["score"] for s in read_lines(whole / f"iteration-{t}" / "heldout_scores.jsonl")])
                for t in range(3)]  # fmt: skip
    for row, scores in zip(rows, held_out, strict=True):
        assert row["eval_rewards/mean"] == pytest.approx(scores.mean(), rel=1e-6)
        assert row["eval_rewards/low"] <= row["eval_rewards/mean"] <= row["eval_rewards/high"]
        assert row["eval_rewards/change"] == pytest.approx(scores.mean() - held_out[0].mean(), abs=1e-6)
    assert rows[2]["eval_rewards/mean"] > rows[0]["eval_rewards/mean"]

    assert {path.name for path in (whole / "figures").iterdir()} == {
        "reward_by_samples_1.png",
        "reward_by_samples_2.png",
        "best_temperature.png",
        "reward_by_iteration.png",
    }
    report = (whole / "report.html").read_text()
    assert "Best temperature for the best of K" in report
    assert "Texts side by side" in report
    _, last = load_pretrained(whole)
    _, tuned = load_pretrained(whole / "iteration-2" / "sft")
    jax.tree.map(np.testing.assert_array_equal, last, tuned)
    _, before = load_pretrained(inputs / "model")
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(before), strict=True))


class Killed(BaseException):
    """What no code may catch."""


def die_in(name: str, appends: int, patch: pytest.MonkeyPatch) -> None:
    """Die while the file `name` is written, in the middle of a line."""
    append, count = RowsFile.append, itertools.count(1)

    def dying(file: RowsFile, rows: Any) -> None:
        append(file, rows)
        if str(file.path).endswith(name) and next(count) == appends:
            with open(file.part, "ab") as raw:
                raw.write(b'{"row": 1, "prom')
            raise Killed

    patch.setattr(RowsFile, "append", dying)


def stop_in_training(patch: pytest.MonkeyPatch, *, kill: bool) -> None:
    draw = TokenLoader.__next__

    def stopping(loader: TokenLoader) -> Any:
        if loader.step == 4:
            if kill:
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(loader)

    patch.setattr(TokenLoader, "__next__", stopping)


@pytest.mark.slow
def test_killed_in_each_stage(inputs: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is done twice, and the files are those of the run that nobody stopped."""
    config, out = options(inputs, tmp_path / "run"), tmp_path / "run"

    def killed(stop: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            stop(patch)
            with pytest.raises(Killed):
                rejection.train(config)

    killed(lambda patch: die_in("iteration-0/heldout.jsonl", 1, patch))
    killed(lambda patch: die_in("iteration-1/samples.jsonl", 2, patch))
    assert len(read_lines(out / "iteration-1" / "samples.jsonl.part")) > 16
    with pytest.raises(InputError, match=r"--rejection.samples 4, this command has 5"):
        rejection.train(dataclasses.replace(config, rejection=dataclasses.replace(config.rejection, samples=5)))
    killed(lambda patch: die_in("iteration-1/scores.jsonl", 2, patch))
    made = (out / "iteration-1" / "samples.jsonl").stat().st_mtime_ns
    killed(lambda patch: stop_in_training(patch, kill=True))
    with pytest.MonkeyPatch.context() as patch:
        stop_in_training(patch, kill=False)
        with pytest.raises(Stopped):
            rejection.train(config)
    assert "stopped after step 5 of 12" in capsys.readouterr().err
    assert not (out / "iteration-1" / "sft" / "model").exists()
    killed(lambda patch: die_in("iteration-1/heldout.jsonl", 1, patch))
    killed(lambda patch: die_in("iteration-2/samples.jsonl", 4, patch))
    killed(lambda patch: patch.setattr(rejection_report, "write", lambda *_: (_ for _ in ()).throw(Killed)))
    rejection.train(config)
    assert (out / "iteration-1" / "samples.jsonl").stat().st_mtime_ns == made

    names = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    compared = [name for name in names if name.suffix in (".jsonl", ".png", ".json", ".safetensors")]
    compared = [name for name in compared if "sft" not in name.parts[:-1] and name.name not in NOT_COMPARED]
    assert len(compared) > 25
    for name in compared:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    for t in (1, 2):
        assert runs.metrics(out / f"iteration-{t}" / "sft") == runs.metrics(whole / f"iteration-{t}" / "sft")
    assert rejection.train(config) == out
    assert "this run is finished" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"--rejection.iterations 2, this command has 3"):
        rejection.train(dataclasses.replace(config, rejection=dataclasses.replace(config.rejection, iterations=3)))


# ---------------------------------------------------------------- the stages one by one


def dataset(folder: Path, rows: list[dict[str, Any]]) -> PromptDataset:
    """Prompts without a model."""
    path = folder / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = ConversationEncoder(tiny.tokenizer(), None)
    return load_prompts(str(path), encoder, DataConfig(), longest=99, vocab_size=320)


def test_prompts_keep_the_other_columns_of_their_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "4", "none": None}, {"prompt": "b", "level": [1]}]
    data = dataset(tmp_path, rows)
    assert [prompt.columns for prompt in data.prompts] == [
        {"answer": "4", "level": None},
        {"answer": None, "level": [1]},
    ]
    rows[0]["answer"] = "5"
    assert dataset(tmp_path, rows).fingerprint != data.fingerprint


def made(data: PromptDataset, texts: list[list[str]], scores: list[list[float | None]]) -> tuple[list, list]:
    """Files of one sample at each of as many temperatures as there are texts of a prompt."""
    samples, judged = [], []
    for p, (said, points) in enumerate(zip(texts, scores, strict=True)):
        for k, (text, point) in enumerate(zip(said, points, strict=True)):
            head = {"row": int(data.row_numbers[p]), "temperature": 0.5 + k, "sample": 0}
            asked = {"prompt": data.prompts[p].plain, "response": text, "finish_reason": "stop"}
            samples.append({**head, **asked})
            judged.append({**head, "score": point})
    return samples, judged


def test_what_cannot_be_the_best(tmp_path: Path) -> None:
    """Blank texts, and scores that are not finite; prompts are told that have no best, or no worse."""
    data = dataset(tmp_path, [{"prompt": "a"}, {"prompt": "b", "safety": True}, {"prompt": "c"}])
    samples, scores = made(
        data, [["x", " ", "y"], ["x", "y", "z"], ["", "\n", " "]], [[1, 9, 2], [3, None, 3], [5, 5, 6]]
    )
    found, told = best_responses.bests(data, samples, scores, iteration=4, reward="mine")
    assert found[0] == {
        "prompt": "a",
        "completion": "y",
        "score": 2.0,
        "iteration": 4,
        "temperature": 2.5,
        "sample": 0,
        "finish_reason": "stop",
    }
    assert found[1] is not None
    assert (found[1]["completion"], found[1]["safety"]) == ("x", True)
    assert found[2] is None
    assert [line.split(":")[0] for line in told] == [
        "1 of 9 scores are not finite",
        "1 of 3 prompts have responses of one score only",
        "1 of 3 prompts have blank responses only and no best",
    ]
    samples, scores = made(data, [["x", "y"]] * 3, [[1, None], [None, None], [None, None]])
    with pytest.raises(InputError, match=r"rows 2, 3 has a finite score \(2 of 3 prompts\)"):
        best_responses.bests(data, samples, scores, iteration=1, reward="mine")
    samples, scores = made(data, [["x", "y"]] * 3, [[1, 1], [2, 2], [0, 0]])
    with pytest.raises(InputError, match="all 2 responses to a prompt have the same score, for every prompt"):
        best_responses.bests(data, samples, scores, iteration=1, reward="mine")


def best(prompt: Any, score: float, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": f"of {score}", "score": score, "iteration": 1, "temperature": 1.0} | more


def test_pools_merge_by_prompt() -> None:
    """Whatever form a prompt has; what is new stands first, an earlier best stays among equals."""
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    earlier = [best("only earlier", 5.0), best("a", 1.0), best(asked, 2.0), best("equal", 3.0)]
    new = [best("a", 2.0, iteration=2), None, best(asked, 1.0, iteration=2), best("equal", 3.0, iteration=2)]
    pool = best_responses.merged(earlier, new)
    assert pool == [new[0], earlier[2], earlier[3], earlier[0]]
    assert best_responses.merged([], new) == [row for row in new if row]


def test_what_is_learnt() -> None:
    pool = [best(str(i), score) for i, score in enumerate([3.0, -1.0, 2.0, 5.0, 2.5])]
    assert best_responses.learnt(pool, RejectionConfig()) == pool
    some = best_responses.learnt(pool, RejectionConfig(min_score=2.0, share=0.5))
    assert [row["score"] for row in some] == [3.0, 5.0]
    with pytest.raises(InputError, match="the highest score is 5; lower it"):
        best_responses.learnt(pool, RejectionConfig(min_score=6))


def test_an_earlier_pool_is_judged_anew(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [best("a", 9.0, safety=True), best("b", 1.0)]))
    pool = best_responses.read_pool(str(path))

    def length(asked: responses.Responses) -> Any:
        bonus = [prompt.columns.get("bonus", 0) for prompt in asked.prompts]
        return responses.Scores(np.asarray([len(text) for text in asked.texts]) + asked.tagged + bonus, {})

    def broken(_: responses.Responses) -> Any:
        return responses.Scores(np.asarray([np.nan, 1.0]), {})

    judges: Any = length
    assert [row["score"] for row in best_responses.judged(pool, judges, str(path))] == [7, 6]
    known = [prompt._replace(columns={"bonus": 9}) for prompt in dataset(tmp_path, [{"prompt": "b"}]).prompts]
    assert [row["score"] for row in best_responses.judged(pool, judges, str(path), known)] == [7, 15]
    judges = broken
    with pytest.raises(InputError, match="the score of row 1 is not finite"):
        best_responses.judged(pool, judges, str(path))
    path.write_text('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(InputError, match="'completion' is not text"):
        best_responses.read_pool(str(path))


def test_a_safety_reward_decides_as_in_llama_2() -> None:
    helpful, safe = jnp.asarray([3.0, 3.0, 3.0, 3.0]), jnp.asarray([1.0, -2.0, 1.0, jnp.nan])
    found = rewards.combined(helpful, safe, jnp.asarray([False, False, True, False]))
    np.testing.assert_array_equal(found, [3, -2, 1, np.nan])


def test_two_judges_write_what_they_say(inputs: Path, tmp_path: Path) -> None:
    """An unsafe or a tagged response has the safety judge's score; both are on record."""
    (tmp_path / "two.py").write_text(
        "def helpful(prompts, responses):\n    return [len(text) for text in responses]\n"
        "def safe(prompts, responses):\n    return [-5.0 if 'bad' in text else 2.5 for text in responses]\n"
    )
    data = dataset(tmp_path, [{"prompt": "a"}, {"prompt": "b", "safety": True}])
    samples, _ = made(data, [["good film", "a bad film"], ["good", "bad"]], [[0, 0], [0, 0]])
    functions = {"reward": f"{tmp_path / 'two.py'}:helpful", "safety_reward": f"{tmp_path / 'two.py'}:safe"}
    config = options(inputs, tmp_path / "run", **functions)
    judges = responses.Judges(config, mesh=runs.small_mesh(1, 1, 1), batch_size=1)
    rows = responses.write_scores(tmp_path / "scores.jsonl", data, samples, judges, label="scores")
    assert [row["score"] for row in rows] == [9, -5, 2.5, -5]
    assert [row["helpfulness"] for row in rows] == [9, 10, 4, 3]
    assert [row["safety"] for row in rows] == [2.5, -5, 2.5, -5]
    assert read_lines(tmp_path / "scores.jsonl") == rows


def test_counts_of_the_curves() -> None:
    assert rejection_report.counts_up_to(3) == [1, 2, 3]
    many = rejection_report.counts_up_to(1000)
    assert many[:24] == list(range(1, 25))
    assert many[-1] == 1000
    assert len(many) < 60
    none = [{"row": 1, "temperature": 1.0, "sample": k, "score": None} for k in range(2)]
    assert rejection_report.curves(none)["counts"] == []
    rejection_report.reward_plot(rejection_report.curves(none), 1)


@pytest.mark.slow
def test_a_judge_scores_and_is_asked_once(inputs: Path, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> str:
        size = len(body["messages"][-1]["content"])
        return "no idea" if size % 3 == 0 else f"[[{size % 5 + 1}]]"

    with chat_server.serving(answer) as server:
        (tmp_path / "j.yaml").write_text(f"endpoint: {{url: {server.url!r}, model: m}}\nscale: 5\n")
        for name in ("one", "two"):
            args = [*words(inputs, tmp_path / name), "--reward", f"judge:{tmp_path / 'j.yaml'}"]
            if name == "two":
                shutil.copytree(tmp_path / "one.replies", tmp_path / "two.replies")
            assert cli.main(args) == 0
        assert set(server.answered.values()) == {1}
    one, two = (
        [json.loads(line)["score"] for line in path.read_text().splitlines()[1:]]
        for path in (next((tmp_path / name).rglob("*scores*.jsonl")) for name in ("one", "two"))
    )
    assert one == two
    assert None in one
    assert any(score is not None for score in one)


# ---------------------------------------------------------------- bad input


def words(inputs: Path, out: Path) -> list[str]:
    args = ["rejection", "--model", inputs / "model", "--data", inputs / "train.jsonl", "--out", out]
    args += ["--reward", f"{inputs / 'mine.py'}:letters", "--data.template", "raw", "--data.max_length", "32"]
    args += ["--sample.max_new_tokens", "6", "--rejection.samples", str(SAMPLES), "--sample_batch_size", "16"]
    args += ["--train.batch_size", "4", "--train.steps", "1", "--mesh.data", "1", "--mesh.fsdp", "1"]
    return [str(arg) for arg in args]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rejection.samples", "1"], r"--rejection.samples 1 must be at least 2"),
        (["--rejection.temperatures"], r"--rejection.temperatures is empty"),
        (["--rejection.temperatures", "1.0", "-0.5"], r"--rejection.temperatures -0.5 must be positive"),
        (["--rejection.temperatures", "0"], r"--rejection.temperatures 0.0 must be positive"),
        (["--rejection.temperatures", "1", "1"], r"names one twice"),
        (["--rejection.share", "1.5"], r"--rejection.share 1.5 must lie in"),
        (["--rejection.student", "x", "--rejection.iterations", "2"], r"--rejection.iterations has no effect with"),
        (["--rejection.pool", "latest", "--rejection.pool_from", "x"], r"--rejection.pool_from has no effect with"),
        (["--rejection.eval_samples", "2"], r"have no effect without --eval_data"),
        (["--rejection.pool_from", "nowhere.jsonl"], r"nowhere.jsonl"),
        (["--rejection.student", "nowhere"], r"nowhere: no such folder"),
        (["--eval_data", "{train}"], r"10 of its prompts stand in .*train.jsonl too \(first: row 1, and there row 1\)"),
        (["--eval_data", "{eval}", "--rejection.pool_from", "{pool}"], r"1 of its prompts stand in .*pool.jsonl too"),
        (["--sample.temperature", "0.5"], r"--sample.temperature has no effect in dpo-jax rejection"),
        (["--sample.max_new_tokens", "32"], r"leaves no room for a prompt"),
        (["--data.max_length", "7"], r"no prompt has at most 1 tokens"),
        (["--reward", "{model}"], r"has no reward head"),
        (["--train.frozen_dtype", "bfloat16"], r"frozen_dtype has no effect"),
        (["--train.batch_size", "3", "--mesh.fsdp", "2"], r"--train.batch_size 3 does not divide"),
    ],
)
def test_one_line_errors(more, message, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = json.loads((inputs / "eval.jsonl").read_text().splitlines()[2])["prompt"]
    (tmp_path / "pool.jsonl").write_text(json.dumps(best(asked, 1.0)) + "\n")
    names = {name: inputs / f"{name}.jsonl" for name in ("train", "eval")}
    names |= {"model": inputs / "model", "pool": tmp_path / "pool.jsonl"}
    args = [*words(inputs, tmp_path / "out"), *(word.format(**names) for word in more)]
    assert cli.main(args) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dpo-jax: error:")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_blank_responses_only_are_refused(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    end = load_tokenizer(inputs / "model").eos_token_id
    args = [*words(inputs, tmp_path / "out"), "--sample.logit_bias", str(end), "1000", "--reward", "vader"]
    assert cli.main(args) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dpo-jax: error: every response to every prompt is blank"), error


def test_an_iteration_of_blank_responses_keeps_the_earlier_pool(tmp_path: Path) -> None:
    data = dataset(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    samples, scores = made(data, [["", " "]] * 2, [[1, 2], [3, 4]])
    found, told = best_responses.bests(data, samples, scores, iteration=2, reward="mine")
    assert found == [None, None]
    assert "2 of 2 prompts have blank responses only" in told[-1]
    pool = best_responses.merged([best("a", 0.5)], found)
    kept = best_responses.learnt(pool, RejectionConfig())
    samples = [{**row, "tokens": 1} for row in samples]
    figures = rejection_report.sampled(samples, scores, pool, kept, lambda text: [], iteration=2)
    assert (figures["pool/size"], figures["pool/from_this_iteration"]) == (1, 0)
    with pytest.raises(InputError, match="every response to every prompt is blank"):
        best_responses.learnt(best_responses.merged([], found), RejectionConfig())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("judge", "message"),
    [("same", "all 4 responses to a prompt have the same score"), ("nan", r"the prompts of rows 5 has a finite score")],
)
def test_rewards_that_choose_nothing(judge, message, inputs: Path, tmp_path: Path, capsys) -> None:
    args = [word.replace(":letters", f":{judge}") for word in words(inputs, tmp_path / "out")]
    assert cli.main(args) == 2
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])


def test_files_that_changed(inputs: Path, tmp_path: Path) -> None:
    """A run goes on with what it began with."""
    path = prompts(tmp_path / "train.jsonl", 4, first=50)
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "responses", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            rejection.train(options(inputs, out, files=str(path)))
        prompts(path, 5, first=50)
        with pytest.raises(InputError, match="what --data names has changed since this run began"):
            rejection.train(options(inputs, out, files=str(path)))


# ---------------------------------------------------------------- whole runs of other kinds


@pytest.mark.slow
def test_a_student_learns_from_the_teachers_bests_and_an_earlier_pool(
    inputs: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Messages under a template; equal and over-long prompts; a student of another size."""
    tiny.folder(tmp_path / "student", hidden=8, heads=2, kv_heads=1, layers=1, seed=1)
    rows = [{"messages": [{"role": "user", "content": f"{i}: good?"}]} for i in range(5)]
    turns = ["film", "a good book", "and you?"]
    roles = ["user", "assistant", "user"]
    rows.append({"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]})
    rows += [{"prompt": "0: good?"}, {"prompt": "red " * 80}]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = options(
        inputs,
        tmp_path / "run",
        files=str(source),
        eval_data=None,
        lora=LoraConfig(rank=2),
        data=SFTDataConfig(max_length=96, train_on="last", buckets=1),
        train=TrainConfig(steps=2, batch_size=2),
        rejection=RejectionConfig(
            samples=3, student=str(tmp_path / "student"), pool_from=str(whole / "pool.jsonl"), share=0.5
        ),
    )
    out = rejection.train(config)
    said = capsys.readouterr().err
    assert "1 prompts occur a second time" in said
    assert "left out 1 of 7 prompts: more than 90 tokens" in said
    pool = read_lines(out / "pool.jsonl")
    assert len(pool) == 6 + TRAINED
    assert {row["iteration"] for row in pool[:6]} == {3}  # the earlier run had two
    assert {row["iteration"] for row in pool[6:]} <= {1, 2}
    assert pool[5]["prompt"][1] == {"role": "assistant", "content": "a good book"}
    assert pool[6:] == read_lines(whole / "pool.jsonl")  # judged anew, by the same function
    assert len(read_lines(out / "iteration-1" / "sft.jsonl")) == 8
    assert json.loads((out / "model" / "config.json").read_text())["hidden_size"] == 8
    (row,) = read_lines(out / "metrics.jsonl")
    assert row["step"] == 1
    assert "eval_rewards/mean" not in row


@pytest.mark.multiprocess
def test_two_processes_choose_what_one_does(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """One writes the files, both read them; killed together in the middle of the samples, they go on together."""
    out = tmp_path / "run"

    def start() -> list[runs.Process]:
        more = ["--eval_data", str(inputs / "eval.jsonl"), "--rejection.temperatures", *map(str, TEMPERATURES)]
        more += ["--rejection.eval_samples", str(SAMPLES), "--data.packing", "--train.steps", "2"]
        return runs.start_together([*words(inputs, out), *more, "--mesh.fsdp", "2"], 2)

    processes = start()
    part = out / "iteration-1" / "samples.jsonl.part"
    while not (part.exists() and len(read_lines(part)) > 16):
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.communicate()
    said = []
    for process in start():
        said.append(process.communicate(timeout=600)[1])
        assert process.returncode == 0, said[-1]
    assert "finished; the model is in" in said[0]
    assert "finished; the model is in" not in said[1]
    for name in ("samples", "scores", "pool", "sft"):
        path = Path("iteration-1") / f"{name}.jsonl"
        assert (out / path).read_bytes() == (whole / path).read_bytes(), name
    assert [row["step"] for row in read_lines(out / "metrics.jsonl")] == [0, 1]
