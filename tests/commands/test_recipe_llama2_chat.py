"""`dpo-jax recipe llama2_chat`: what passes between its stages, and the whole of it on a tiny random model."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import tiny

from dpo_jax import cli, mesh
from dpo_jax.commands import generate, ppo
from dpo_jax.commands.recipes import heldout_comparisons as comparisons, judged_answers, llama2_chat
from dpo_jax.config import (
    SET_BY_RECIPE,
    ChatRecipeConfig,
    DataConfig,
    Llama2ChatRun,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    PPOLossConfig,
    PPORun,
    RejectionConfig,
    RejectionRun,
    RewardLossConfig,
    RewardRun,
    SampleConfig,
    SFTDataConfig,
    SFTRun,
    TrainConfig,
)
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import read_lines
from dpo_jax.judge import loading
from dpo_jax.train import session as training

pytestmark = pytest.mark.usefixtures("compile_roughly")

ROOT = Path(__file__).resolve().parents[2]


# ---- what passes between the stages --------------------------------------------------------------------------------


def test_a_prompt_is_held_out_in_every_set_or_in_none() -> None:
    pairs = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(400)]
    learnt, heldout = comparisons.parted(pairs, 0.25, seed=0)
    assert len(learnt) + len(heldout) == 400
    assert 70 < len(heldout) < 130
    # Another layout, other answers, other prompts around it: the same prompts.
    other = [
        {"messages": [{"role": "user", "content": f"p{i}"}], "responses": ["c", "d"], "scores": [1, 2]}
        for i in range(0, 400, 3)
    ]
    _, again = comparisons.parted(other, 0.25, seed=0)
    held = {row["prompt"] for row in heldout}
    assert {row["messages"][0]["content"] for row in again} == {f"p{i}" for i in range(0, 400, 3)} & held
    assert comparisons.parted(pairs, 0.25, seed=1)[1] != heldout


def test_ratings_are_quarters_of_the_gaps() -> None:
    gaps = [0.1, 0.9, 0.5, 0.3, 0.2, 0.8, 0.7, 0.4]
    rated = comparisons.rated([{"score_chosen": gap, "score_rejected": 0.0} for gap in gaps])
    by_gap = [row["rating"] for row in sorted(rated, key=lambda row: -row["score_chosen"])]
    names = ("significantly better", "better", "slightly better", "negligibly better")
    assert by_gap == [name for name in names for _ in range(2)]
    assert comparisons.rated([]) == []


# ---- the command line ----------------------------------------------------------------------------------------------

GIVEN = ["--sft_data", "s", "--helpful_data", "h", "--prompts", "p", "--judge", "vader", "--out", "o"]


@pytest.mark.parametrize("name", ["llama2_chat", "smollm2_chat"])
def test_the_recipes_parse(name: str) -> None:
    words = [str(ROOT / "configs" / f"{name}.py"), *GIVEN]
    if name == "llama2_chat":
        words += ["--model", "m", "--safety_data", "s", "--safety_judge", "j"]
    run = cli.parse("recipe llama2_chat", words)
    assert run.recipe.rounds == (4 if name == "llama2_chat" else 2)
    assert {run.sft.model, run.helpful.data.files, run.rejection.reward, run.ppo.out} == {SET_BY_RECIPE}
    if name == "llama2_chat":
        assert (run.sft.train.epochs, run.sft.optimizer.learning_rate) == (2, 2e-5)
        assert (run.safety.mix, run.helpful.reward.margin, run.helpful.train.batch_size) == (0.1, "small", 512)
        assert (run.ppo.train.batch_size, run.ppo.ppo.kl_coefficient) == (512, 0.01)
    shorter = cli.parse("recipe llama2_chat", [*words, "--sft.train.steps", "3", "--ppo.ppo.clip", "0.1"])
    assert (shorter.sft.train.steps, shorter.sft.train.epochs, shorter.ppo.ppo.clip) == (3, None, 0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sft.model", "m"], "--sft.model has no effect in dpo-jax recipe llama2_chat"),
        (["--rejection.rejection.pool_from", "x"], "--rejection.rejection.pool_from has no effect"),
        (["--ppo.environment", "e.py:E"], "--ppo.environment has no effect in dpo-jax recipe llama2_chat"),
        (["--safety_judge", "vader"], "give --safety_data and --safety_judge together"),
        (["--safety.mix", "0.2"], "--safety.* has no effect without --safety_data"),
        (["--recipe.heldout", "1"], "--recipe.heldout 1.0 must lie in (0, 1)"),
        (["--judge", "regex:("], "--reward regex"),
    ],
)
def test_one_line_errors(words, message, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipe", "llama2_chat", "--model", "m", *GIVEN, *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


# ---- the whole recipe ----------------------------------------------------------------------------------------------

ONE = MeshConfig(data=1, fsdp=1, tensor=1)


ENDS = tuple(range(280, 320))
"""Of random text most would be cut, and cut texts are in no pair."""


def options(folder: Path, out: Path) -> Llama2ChatRun:
    """Two rounds with two judges, everything tiny."""
    tiny.folder(folder / "model", hidden=16, heads=2, kv_heads=1, layers=1)
    rng = random.Random(0)
    prompts = [{"prompt": f"{i}: {tiny.sentence(rng, 2)}", "safety": i % 2 == 1} for i in range(32)]
    dialogues = [{"prompt": row["prompt"], "response": tiny.sentence(rng, 2)} for row in prompts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues))
    for name in ("helpful", "safety"):
        rows = [{"prompt": f"{name} {i}", "chosen": "a good", "rejected": "bad", "rating": "better"} for i in range(16)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(
        "def letters(prompts, responses):\n    return [sum(c.islower() for c in text) / 6 for text in responses]\n"
        "def short(prompts, responses):\n    return [-len(text) / 6 for text in responses]\n"
    )
    shared: dict[str, Any] = {"model": SET_BY_RECIPE, "out": SET_BY_RECIPE, "mesh": ONE}
    shared |= {"optimizer": OptimizerConfig(learning_rate=1e-2), "lora": LoraConfig(rank=4)}
    train = TrainConfig(steps=2, batch_size=8)
    lengths: dict[str, Any] = {"files": SET_BY_RECIPE, "max_length": 56, "buckets": 1}
    comparing = RewardLossConfig(margin="small")
    judged: dict[str, Any] = shared | {
        "reward": comparing,
        "train": train,
        "data": DataConfig(**lengths, max_prompt_length=40),
    }
    return Llama2ChatRun(
        model=str(folder / "model"),
        sft_data=str(folder / "sft.jsonl"),
        helpful_data=str(folder / "helpful.jsonl"),
        prompts=str(folder / "prompts.jsonl"),
        judge=f"{folder / 'mine.py'}:letters",
        out=str(out),
        safety_data=str(folder / "safety.jsonl"),
        safety_judge=f"{folder / 'mine.py'}:short",
        recipe=ChatRecipeConfig(rounds=2, pair_samples=6, pair_batch_size=16, heldout=0.4),
        sft=SFTRun(**shared, train=train, data=SFTDataConfig(**lengths)),
        helpful=RewardRun(**judged),
        safety=RewardRun(**judged, mix_data=SET_BY_RECIPE, mix=0.2),
        rejection=RejectionRun(
            **shared,
            reward=SET_BY_RECIPE,
            rejection=RejectionConfig(samples=2),
            sample=SampleConfig(max_new_tokens=6, stop_tokens=ENDS),
            data=SFTDataConfig(**lengths, train_on="last"),
            train=train,
            sample_batch_size=16,
        ),
        ppo=PPORun(
            **shared,
            reward=SET_BY_RECIPE,
            ppo=PPOLossConfig(epochs=1, value="stopped"),
            sample=SampleConfig(max_new_tokens=6, stop_tokens=ENDS),
            data=DataConfig(SET_BY_RECIPE, max_length=56, max_prompt_length=40),
            train=train,
        ),
    )


@pytest.mark.slow
def test_the_whole_recipe_killed_and_not(tmp_path: Path, capsys, monkeypatch) -> None:
    for module in (training, generate, judged_answers):
        monkeypatch.setattr(module, "make_mesh", runs.small_mesh)
    small = SimpleNamespace(make_mesh=runs.small_mesh, batch_parts=mesh.batch_parts)
    monkeypatch.setattr(loading, "meshes", small)
    (tmp_path / "inputs").mkdir()
    run = options(tmp_path / "inputs", tmp_path / "out")
    out = llama2_chat.recipe(run)
    shown = capsys.readouterr()
    assert "highest at V" in shown.out
    summary = json.loads((out / "summary.json").read_text())
    assert [row["by"] for row in summary["versions"]] == ["SFT", "rejection sampling", "rejection sampling", "PPO"]
    # Every reward model on every distribution, before and after it has learnt from it.
    cells = {(row["kind"], row["reward_model"], row["distribution"]) for row in summary["accuracy"]}
    sets = ("given", "v0", "v1", "v2")
    wanted = {(kind, r, name) for kind in ("helpful", "safety") for r in (1, 2, 3) for name in sets}
    assert cells == wanted
    assert len(summary["accuracy"]) == len(cells)
    assert "Accuracy of the safety reward models" in (out / "report.html").read_text()
    # The pool is carried on, and rewarded by the newest models.
    config = json.loads((out / "rejection-2" / "config.json").read_text())
    assert config["rejection"]["pool_from"] == str(out / "rejection-1" / "pool.jsonl")
    assert (config["reward"], config["safety_reward"]) == tuple(
        str(out / "reward-2" / k) for k in ("helpful", "safety")
    )
    config = json.loads((out / "ppo" / "config.json").read_text())
    assert config["model"] == str(out / "rejection-2" / "model")
    assert config["reward"] == str(out / "reward-3" / "helpful")
    # Reward model 3 has learnt from all that came before, and from nothing that is held out.
    rows = read_lines(out / "reward-3" / "helpful.jsonl")
    assert rows == [row for name in sets for row in read_lines(out / name / "helpful.jsonl")]
    for name in sets:
        held = {row["prompt"] for row in read_lines(out / name / "helpful_heldout.jsonl")}
        assert held
        assert not held & {row["prompt"] for row in rows}
    # No answer that was cut is in a pair.
    judged = read_lines(out / "v1" / "judged.jsonl")
    whole = {row["response"].rstrip("\N{REPLACEMENT CHARACTER}") for row in judged if row["finish_reason"] == "stop"}
    for row in read_lines(out / "v1" / "helpful.jsonl"):
        assert {row["chosen"], row["rejected"]} <= whole
    tagged = {row["prompt"] for row in read_lines(Path(run.prompts)) if row["safety"]}
    assert {row["prompt"] for row in read_lines(out / "v1" / "safety.jsonl")} <= tagged

    # As if it had been killed after the second rejection sampling, and then in PPO: the same versions and accuracies.
    record = json.loads((out / "stages.json").read_text())
    kept = list(record)[: list(record).index("V2: rejection sampling") + 1]
    (out / "stages.json").write_text(json.dumps({name: record[name] for name in kept}))
    for name in set(record) - set(kept):
        shutil.rmtree(record[name]["output"], ignore_errors=True)
        Path(record[name]["output"]).unlink(missing_ok=True)
    for name in ("v2", "v3"):
        shutil.rmtree(out / name)
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "train", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            llama2_chat.recipe(run)
    assert not (out / "summary.json").exists()
    capsys.readouterr()
    llama2_chat.recipe(run)
    assert f"{len(record)} stages, {len(record) - 4} done" in capsys.readouterr().err
    assert json.loads((out / "summary.json").read_text()) == summary
    more = dataclasses.replace(run.ppo, train=TrainConfig(steps=3, batch_size=8))
    with pytest.raises(InputError, match=r"has --ppo.train.steps 2, this command has 3"):
        llama2_chat.recipe(dataclasses.replace(run, ppo=more))


def _interrupted(config) -> Path:
    raise KeyboardInterrupt
