"""`dpo-jax ppo` from end to end on a tiny random model."""

import itertools
import json
import os
import random
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import tiny
from safetensors.numpy import load_file

from dpo_jax import cli
from dpo_jax.commands import ppo as run_ppo
from dpo_jax.config import (
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    PPOLossConfig,
    PPORun,
    SampleConfig,
    TrainConfig,
)
from dpo_jax.data.sets.prompts import Prompt, PromptLoader, load_prompts
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.errors import InputError, Stopped
from dpo_jax.files.log import read_metrics
from dpo_jax.files.sample_log import SampleLog
from dpo_jax.judge.rewards.scores import Responses, part_figures, scored, short_names, summed
from dpo_jax.judge.rewards.shipped import OfText
from dpo_jax.sample import generate
from dpo_jax.train import session as training
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("compile_roughly", "few_devices")

STEPS, BATCH = 10, 64


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model (`model`), prompts, and a reward function of the user's own."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", hidden=16, heads=2, kv_heads=1, layers=1)
    rng = random.Random(0)
    lines = [json.dumps({"prompt": f"{i}: {tiny.sentence(rng, rng.randint(1, 3))}"}) for i in range(10)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "mine.py").write_text(
        "def letters(prompts, responses):\n    return [sum(c.islower() for c in text) / 6 for text in responses]\n"
        "def nan(prompts, responses):\n    return [float('nan') if p.startswith('4:') else 1.0 for p in prompts]\n"
        "def broken(prompts, responses):\n    return [undefined_name for _ in responses]\n"
        "def needs(prompts, responses, answer):\n    return [0.0 for _ in responses]\n"
    )
    return folder


def options(inputs: Path, out: Path, **changes) -> PPORun:
    """Ten iterations of 64 responses under LoRA, with a controller of the KL coefficient, and checkpoints on the way.

    All prompts fit into one bucket of the sampler.
    """
    config = PPORun(
        model=str(inputs / "model"),
        out=str(out),
        reward=f"{inputs / 'mine.py'}:letters",
        lora=LoraConfig(rank=4),
        ppo=PPOLossConfig(epochs=2, kl_target=4.0, kl_horizon=256, kl_coefficient=0.02),
        sample=SampleConfig(max_new_tokens=6, temperature=0.7),
        optimizer=OptimizerConfig(learning_rate=2e-2),
        data=DataConfig(str(inputs / "prompts.jsonl"), template="raw", max_length=22, max_prompt_length=16),
        train=TrainConfig(steps=STEPS, batch_size=BATCH, seed=1),
        checkpoint=CheckpointConfig(every=2, keep=5),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
    )
    return runs.changed(config, **changes)


def assert_same_run(a: Path, b: Path) -> None:
    assert runs.metrics(a) == runs.metrics(b)
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    for path in sorted(b.glob("*/*.safetensors")):
        left, right = load_file(a / path.relative_to(b)), load_file(path)
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key], err_msg=key)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", runs.small_mesh)
        return run_ppo.train(options(inputs, tmp_path_factory.mktemp("whole") / "run"))


def test_the_policy_learned(whole: Path, inputs: Path) -> None:
    """More letters in 2,560 responses, enough to tell it from luck: the standard error of each mean is 0.01."""
    means = []
    for folder in (inputs / "model", whole / "model"):
        (model, variables), tokenizer = load_pretrained(str(folder)), load_tokenizer(str(folder))
        rows = [json.loads(line)["prompt"] for line in (inputs / "prompts.jsonl").read_text().splitlines()]
        prompts = [tokenizer(text)["input_ids"] for text in rows]
        config = SampleConfig(6, temperature=0.7, stop_tokens=model.config.eos_token_ids)
        out = generate(model, variables, prompts, jax.random.key(1), config=config, samples=256)
        texts = [
            tokenizer.decode(r[m], skip_special_tokens=True)
            for r, m in zip(np.asarray(out.tokens), np.asarray(out.mask), strict=True)
        ]
        means.append(np.mean([sum(c.islower() for c in text) / 6 for text in texts]))
    assert means[1] > means[0] + 0.05


def test_the_whole_run(whole: Path, inputs: Path) -> None:
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)  # at temperature 0.7
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in rows)
    assert all(row["policy/clipfrac_avg"] > 0 for row in rows[1:])
    assert rows[-1]["epoch"] == pytest.approx(STEPS * BATCH / 10)
    scores = [row["objective/scores"] for row in rows]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.1

    # The controller moves the coefficient by the divergence of the rollout before.
    for row, following in itertools.pairwise(rows):
        error = np.clip(row["objective/kl"] / 4 - 1, -0.2, 0.2)
        expected = row["kl_coefficient"] * (1 + error * BATCH / 256)
        assert following["kl_coefficient"] == pytest.approx(expected, rel=1e-5)

    samples = read_metrics(whole / "samples.jsonl")
    assert len(samples) == STEPS * BATCH
    assert all(row["score"] == np.float32(sum(c.islower() for c in row["response"]) / 6) for row in samples)
    for row in rows:
        own = [sample for sample in samples if sample["step"] == row["step"]]
        assert np.mean([sample["score"] for sample in own]) == pytest.approx(row["objective/scores"], abs=1e-5)
        assert np.mean([sample["kl"] for sample in own]) == pytest.approx(row["objective/kl"], abs=1e-4)
        assert sum(sample["ended"] for sample in own) == row["val/num_eos_tokens"]
    texts = [[sample["response"] for sample in samples if sample["step"] == step] for step in (1, 2)]
    assert texts[0] != texts[1]
    assert len(set(texts[0])) > 8

    report = (whole / "report.html").read_text()
    assert "Samples" in report
    assert "Score" in report
    raw = json.loads((whole / "model" / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLM"]
    assert not (whole / "model" / "heads.safetensors").exists()
    assert (whole / "adapter" / "adapter_config.json").is_file()
    _, last = load_pretrained(whole / "checkpoints" / str(STEPS))  # as an unfinished run is loaded, without its values
    assert last.keys() == {"params", "adapters"}


def stopped_at(step: int, config: PPORun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until SIGTERM comes while the prompts of iteration `step` + 1 are taken."""
    take = PromptLoader.__next__

    def stopping(loader):
        if loader.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(loader)

    with monkeypatch.context() as patch:
        patch.setattr(PromptLoader, "__next__", stopping)
        with pytest.raises(Stopped):
            run_ppo.train(config)


def test_stopped_and_gone_on(inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a signal; then it is as if it had been killed later: texts and figures behind the last checkpoint."""
    config, out = options(inputs, tmp_path / "run"), tmp_path / "run"
    stopped_at(4, config, monkeypatch)
    assert len(runs.metrics(out)) == 5
    assert not (out / "model").exists()
    assert (out / "checkpoints" / "5").is_dir()
    written = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    assert len(written) == 5 * BATCH
    with open(out / "samples.jsonl", "a") as file:
        file.write(written[-1].replace('"step": 5', '"step": 6') + '{"step": 6, "row"')
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 0.0}\n{"st')
    run_ppo.train(config)
    assert_same_run(out, whole)


def test_held_out_prompts_and_an_end_without_gain(inputs: Path, tmp_path: Path, monkeypatch) -> None:
    """A step too small to move any draw: the same texts in every evaluation, so that nothing is gained."""
    lines = [json.dumps({"prompt": f"{i}: new"}) for i in range(5)]
    (tmp_path / "eval.jsonl").write_text("\n".join(lines) + "\n")
    config = options(
        inputs,
        tmp_path / "run",
        eval_data=str(tmp_path / "eval.jsonl"),
        eval_samples=2,
        eval_pass=0.5,
        optimizer=OptimizerConfig(learning_rate=1e-12),
        train=TrainConfig(steps=STEPS, batch_size=BATCH, seed=1, eval_every=1, stop_after=2),
        checkpoint=CheckpointConfig(every=100, keep=1, best="eval_reward"),
    )
    out = tmp_path / "run"
    stopped_at(1, config, monkeypatch)
    run_ppo.train(config)
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]  # the first, and two without gain
    texts = [read_metrics(out / "eval_samples" / f"{step}.jsonl") for step in range(4)]
    assert all([row["response"] for row in some] == [row["response"] for row in texts[0]] for some in texts)
    assert len({row["response"] for row in texts[0]}) > 1
    for row, some in zip(rows, texts, strict=True):
        assert [(sample["row"], sample["sample"]) for sample in some] == [(i, j) for i in range(1, 6) for j in (0, 1)]
        right = np.asarray([sample["score"] >= 0.5 for sample in some]).reshape(5, 2)
        assert (row["eval_pass@1"], row["eval_pass@2"]) == pytest.approx((right.mean(), right.any(axis=1).mean()))
        assert row["eval_pass@1_low"] <= row["eval_pass@1"] <= row["eval_pass@2"] <= row["eval_pass@2_high"]
        for name, column in (("reward", "score"), ("kl", "kl"), ("length", "tokens")):
            assert row[f"eval_{name}"] == pytest.approx(np.mean([sample[column] for sample in some]), abs=1e-6)
            assert row[f"eval_{name}_low"] <= row[f"eval_{name}"] <= row[f"eval_{name}_high"]
        assert row["eval_reward_low"] < row["eval_reward_high"]
        assert row["eval_kl"] == pytest.approx(0, abs=1e-4)
        assert row["eval_ended"] == np.mean([sample["ended"] for sample in some])
        assert 0 < row["eval_distinct_1"] <= 1
    assert "Held-out prompts: " in (out / "report.html").read_text()


def test_samples_that_a_checkpoint_counts_must_be_there(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "samples.jsonl", writes=True)
    log.append(1, [{"score": 1.0}])
    log.append(2, [{"score": 2.0}])
    SampleLog(tmp_path / "samples.jsonl", writes=True).append(2, [{"score": 3.0}])
    assert [row["score"] for row in read_metrics(tmp_path / "samples.jsonl")] == [1.0, 3.0]
    with pytest.raises(InputError, match="does not hold steps 1 to 3"):
        SampleLog(tmp_path / "samples.jsonl", writes=True).append(4, [])


@pytest.mark.slow
def test_full_fine_tuning_without_values(inputs: Path, tmp_path: Path) -> None:
    """At temperature 1.3 too the policy begins as its reference; sampled in pieces, in groups."""
    config = options(
        inputs,
        tmp_path / "run",
        lora=LoraConfig(),
        sample=SampleConfig(max_new_tokens=6, temperature=1.3),
        train=TrainConfig(steps=1, batch_size=16),
        ppo=PPOLossConfig(advantage="rloo", group_size=2, epochs=1, kl_coefficient=0.02),
        rollout_batch_size=8,
    )
    run_ppo.train(config)
    (row,) = runs.metrics(tmp_path / "run")
    assert row["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert row["sampling/sampling_logp_difference/max"] < 1e-4
    assert row["val/ratio"] == pytest.approx(1, abs=1e-5)
    samples = read_metrics(tmp_path / "run" / "samples.jsonl")
    assert [s["row"] for s in samples[::2]] == [s["row"] for s in samples[1::2]]
    assert len({s["response"] for s in samples}) > 8
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_eight_devices_make_the_same_run(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Whole iterations, sampling and all."""
    config = options(
        inputs,
        tmp_path / "run",
        train=TrainConfig(steps=2, batch_size=BATCH, seed=1),
        # The schedule is constant: the length of the run changes nothing.
        mesh=MeshConfig(data=2, fsdp=4, tensor=1),
    )
    run_ppo.train(config)
    for row, other in zip(runs.metrics(tmp_path / "run"), runs.metrics(whole)[:2], strict=True):
        assert row == pytest.approx({**other, "epoch": row["epoch"]}, rel=1e-3, abs=1e-4)
    texts = [
        [s["response"] for s in read_metrics(out / "samples.jsonl")][: 2 * BATCH] for out in (tmp_path / "run", whole)
    ]
    assert texts[0] == texts[1]


@pytest.mark.multiprocess
def test_two_processes_make_the_same_iteration(inputs: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = f"""
        ppo --model {inputs / "model"} --data {inputs / "prompts.jsonl"} --out {out}
        --reward {inputs / "mine.py"}:letters --lora.rank 4
        --ppo.epochs 2 --ppo.kl_target 4 --ppo.kl_horizon 256 --ppo.kl_coefficient 0.02
        --sample.max_new_tokens 6 --sample.temperature 0.7 --optimizer.learning_rate 2e-2
        --data.template raw --data.max_length 22 --data.max_prompt_length 16
        --train.steps 1 --train.batch_size {BATCH} --train.seed 1 --mesh.data 1 --mesh.fsdp 2
    """.split()
    for process in runs.start_together(words, 2):
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
    (row,), first = runs.metrics(out), runs.metrics(whole)[0]
    assert row == pytest.approx({**first, "epoch": row["epoch"]}, rel=1e-3, abs=1e-4)
    texts = [[s["response"] for s in read_metrics(folder / "samples.jsonl")][:BATCH] for folder in (out, whole)]
    assert texts[0] == texts[1]


def test_prompts_come_in_groups_and_without_end(inputs: Path) -> None:
    encoder = ConversationEncoder(load_tokenizer(inputs / "model"), "raw")
    config = DataConfig(template="raw")
    data = load_prompts(str(inputs / "prompts.jsonl"), encoder, config, longest=5, vocab_size=320)
    assert data.ids.lengths.max() == 5
    loader = PromptLoader(data, batch_size=6, group=2, seed=3, steps=10)
    batches = list(loader)
    assert all((batch.rows[::2] == batch.rows[1::2]).all() for batch in batches)
    seen = np.concatenate([batch.rows[::2] for batch in batches])
    for epoch in np.split(seen, 3):
        assert sorted(epoch) == list(range(1, 11))
    assert (seen[:10] != seen[10:20]).any()
    again = PromptLoader(data, batch_size=6, group=2, seed=3, steps=10)
    again.set_state(loader.get_state() | {"step": 4})
    np.testing.assert_array_equal(next(again).prompts, batches[4].prompts)


def test_rewards_of_llama_2(inputs: Path) -> None:
    """Two judges as one: the safety judge where the prompt is tagged or the response looks unsafe."""
    judges = [
        OfText(name, function)
        for name, function in (("helpful", lambda text: len(text)), ("safe", lambda text: -9.0 if "bad" in text else 9))
    ]
    texts, tagged = ["abc", "bad", "abcd", "a"], np.asarray([False, False, True, False])
    asked = Responses([Prompt((), "p")] * 4, texts, np.arange(4), tagged)
    scores, parts, _ = scored(judges, ("helpful", "safe"), asked, whiten=True, finite=True)
    chosen = np.asarray([3.0, -9, 9, 1])
    np.testing.assert_allclose(scores, (chosen - chosen.mean()) / chosen.std(ddof=1), rtol=1e-5)
    assert parts["helpfulness"].tolist() == [3, 3, 4, 1]


def test_several_rewards() -> None:
    judges = [OfText("a", len), OfText("b", lambda text: None if "b" in text else 1.0)]
    texts, rows = ["abc", "c", "bb", "bbb"], np.arange(4)
    asked = Responses([Prompt((), "p")] * 4, texts, rows, np.zeros(4, bool))
    every = (judges, ("vader", "m.py:score"), (1.0, 10.0), asked)
    scores, parts, _ = summed(*every, group=None, finite=True)
    assert scores.tolist() == [3, 11, 2, 3]
    assert list(parts) == ["vader", "score_"]
    found = part_figures(parts)
    assert (found["rewards/vader/mean"], found["rewards/score_/mean"], found["rewards/score_/std"]) == (2.25, 1, 0)
    scores, _, _ = summed(*every, group=2, finite=True)
    np.testing.assert_allclose(scores, [2**-0.5, -(2**-0.5), -(2**-0.5), 2**-0.5], rtol=3e-4)
    assert short_names(["a_2", "x.py:a", "y.py:a", "http://a/b", "runs/rm"]) == ["a_2", "a", "a_3", "url", "rm"]
    silent = [OfText("b", lambda text: None if "b" in text else 1.0)] * 2
    with pytest.raises(InputError, match="each gave None for responses to rows 0, 2, 3 of the prompts"):
        summed(silent, ("b", "c"), (1, 1), asked, group=None, finite=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", "vader", "--reward", "vader"], "vader: stands there twice"),
        (["--reward", "vader", "length", "--reward_weights", "1"], "1 for 2 of --reward; one number each"),
        (["--reward", "vader", "--reward_weights", "1"], "no effect with one --reward"),
        (["--reward", "vader", "--reward_aggregation", "normalize_then_sum"], "no effect with one --reward"),
        (["--reward", "vader", "length", "--safety_reward", "vader"], "not with several"),
        (["--reward", "vader", "length", "--reward_aggregation", "normalize_then_sum"], "it needs --ppo.group_size"),
        (["--reward", "{mine}:nan"], "the score of responses to row 5 of the prompts is not finite"),
        (["--reward", "{mine}:absent"], "has no function absent"),
        (["--reward", "{mine}:broken"], r"mine.py, line 6: NameError: name 'undefined_name'"),
        (["--reward", "{mine}:needs"], r"takes 'answer', which is no column of the prompts; they have none beside"),
        (["--reward", "vader", "--eval_samples", "2"], "--eval_samples has no effect without --eval_data"),
        (["--reward", "vader", "--sample.top_k", "5"], r"--sample.top_k does not go with PPO"),
        (["--reward", "no.py:f"], "no.py is no file"),
        (["--reward", "regex:("], "--reward regex"),
        (["--reward", "language:xx"], "no language that is told apart"),
        (["--reward", "exact:answer"], "'answer' is no column of the prompts; they have none beside"),
        (["--reward", "vader", "--reward_memory", "9"], "no judge is run:COMMAND"),
        (["--reward", "http://me:secret@host/"], "leave the password out"),
        (["--reward", "{model}"], "has no reward head"),
        (["--reward", "vader", "--sample.temperature", "0"], "PPO learns from samples"),
        (["--reward", "vader", "--ppo.group_size", "3"], "not made of groups of 3"),
        (["--reward", "vader", "--ppo.minibatches", "3"], "does not split into --ppo.minibatches 3"),
        (["--reward", "vader", "--train.accumulate", "4", "--ppo.minibatches", "32"], "does not divide by 128"),
        (["--reward", "vader", "--train.eval_every", "2"], "--train.eval_every has no effect without --eval_data"),
        (["--reward", "vader", "--reward_timeout", "3"], "no judge is a URL, a function"),
        (["--reward", "vader", "--rollout_batch_size", "5"], "that divides --train.batch_size 64"),
        (["--reward", "vader", "--sample.max_new_tokens", "22"], "leaves no room for a prompt"),
        (["--reward", "vader", "--value_model", "{model}"], "has no reward head"),
        ([], "missing --reward"),
    ],
)
def test_one_line_errors(words, message, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = {"mine": inputs / "mine.py", "model": inputs / "model"}
    args = ["ppo", "--model", inputs / "model", "--data", inputs / "prompts.jsonl", "--out", tmp_path / "out"]
    args += ["--train.batch_size", str(BATCH), "--data.max_length", "22", "--data.max_prompt_length", "16"]
    args += ["--sample.temperature", "0.7", "--ppo.epochs", "2"]  # compiled for the whole run already
    args += ["--sample.max_new_tokens", "6", "--data.template", "raw", "--train.steps", "1"]
    args += ["--mesh.data", "1", "--mesh.fsdp", "1", "--lora.rank", "4" if "--value_model" not in words else "0"]
    args += [word.format(**names) for word in words]
    assert cli.main([str(arg) for arg in args]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dpo-jax: error:")
    assert re.search(message, error), error


def test_bad_prompts(inputs: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    with pytest.raises(InputError, match=r"row 2: .*missing field 'prompt'|missing field 'prompt'.*row 2"):
        run_ppo.train(options(inputs, tmp_path / "run", files=str(bad)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["dapo", "remax"])
def test_grpo_is_a_word_of_its_own(inputs: Path, tmp_path: Path, preset: str) -> None:
    """Groups without variance are sampled again, and greedy responses scored; a second call says that it is done."""
    code = "def some(prompts, responses):\n    return [float(len(t) % 3 == 0) for t in responses]\n"
    code += "def row(completions, **kwargs):\n    return [None if len(t) % 3 else 0.0 for t in completions]\n"
    (tmp_path / "r.py").write_text(code)
    args = ["grpo", "--model", inputs / "model", "--data", inputs / "prompts.jsonl", "--out", tmp_path / "out"]
    args += ["--reward", f"{tmp_path / 'r.py'}:some", "--ppo.preset", preset, "--train.steps", "2"]
    args += ["--train.batch_size", "8", "--sample.max_new_tokens", "6", "--data.template", "raw"]
    args += ["--data.max_length", "22", "--optimizer.learning_rate", "1e-3"]
    if preset == "dapo":
        args += ["--ppo.group_size", "2", "--reward", f"{tmp_path / 'r.py'}:row", "--reward_weights", "2", "7"]
    narrow = ["--sample.weights", "int8", "--ppo.sampler_correction", "token_truncate"]
    args += narrow if preset == "remax" else []
    assert cli.main([str(word) for word in args]) == 0
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 <= row["frac_reward_zero_std"] <= 1 for row in rows)
    assert all(("rollout/resampled" in row) == (preset == "dapo") for row in rows)
    if preset == "dapo":
        drawn = read_metrics(tmp_path / "out" / "samples.jsonl")
        assert all(s["score"] == 2 * s["some"] and s["row_"] == (0 if s["some"] else None) for s in drawn)
        assert rows[0]["rewards/some/mean"] == np.mean([s["some"] for s in drawn if s["step"] == 1])
        assert rows[0]["rewards/row_/mean"] == rows[0]["rewards/row_/std"] == 0 < rows[0]["rewards/some/std"]
        assert all(row["frac_reward_zero_std"] <= row["rollout/resampled"] for row in rows)
        assert any(row["frac_reward_zero_std"] < row["rollout/resampled"] for row in rows)
        assert all(row["rollout/learned"] == 1 - row["frac_reward_zero_std"] for row in rows)
    apart = [row["sampling/sampling_logp_difference/max"] for row in rows]
    assert all((x > 1e-4) == (preset == "remax") for x in apart)
    assert all(("sampling/importance_sampling_ratio/mean" in row) == (preset == "remax") for row in rows)
    assert {"entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "completions/clipped_ratio"} <= set(rows[0])
    assert cli.main([str(word) for word in args]) == 0
