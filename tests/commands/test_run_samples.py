"""`--train.sample_every`: fixed prompts answered during training, in every command that trains a policy."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny

from dpo_jax import cli
from dpo_jax.errors import Stopped
from dpo_jax.files.jsonl import read_lines
from dpo_jax.report.compare import read_runs, sections
from dpo_jax.report.samples import TRAINING_SAMPLES, fixed_section, training_samples
from dpo_jax.train import fixed_prompts, session as training

pytestmark = pytest.mark.usefixtures("compile_roughly", "few_devices")

STEPS = [0, 2, 4, 5]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, dialogues of two turns, pairs (two of each prompt), prompts, documents, prompts of one's own."""
    folder, rng = tmp_path_factory.mktemp("inputs"), random.Random(0)
    tiny.folder(folder / "model", hidden=16, heads=2, kv_heads=1, layers=1)
    asked = [f"{i} {tiny.sentence(rng, 2)}" for i in range(8)]
    said = [tiny.sentence(rng, 3) for _ in range(8)]
    user, answer = (
        [{"role": role, "content": text} for text in texts] for role, texts in (("user", asked), ("assistant", said))
    )
    rows: dict[str, list[dict[str, Any]]] = {
        "dialogues": [{"messages": [u, a, user[0], answer[1]]} for u, a in zip(user, answer, strict=True)],
        "pairs": [{"prompt": asked[i // 2], "chosen": said[i], "rejected": said[i - 1] + " no"} for i in range(8)],
        "prompts": [{"prompt": text, "response": said[0]} for text in asked],
        "documents": [{"text": " ".join(said)} for _ in range(4)],
        "mine": [{"prompt": "good film"}, {"prompt": "bad book"}, {"prompt": "a good question"}],
        "many": [{"prompt": str(i)} for i in range(33)],
    }  # fmt: skip
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return folder


def words(inputs: Path, out: Path, command: str, *more: str) -> list[str]:
    data = "documents" if "text" in more else {"sft": "dialogues", "dpo": "pairs"}.get(command, "prompts")
    args = [*command.split(), "--model", inputs / "model", "--data", inputs / f"{data}.jsonl", "--out", out]
    args += ["--train.batch_size", "4", "--train.steps", "5", "--train.sample_every", "2", "--train.sample_tokens", "6"]
    args += ["--optimizer.learning_rate", "2e-2", "--checkpoint.every", "1", "--checkpoint.keep", "9"]
    return [*map(str, args), "--mesh.fsdp", "1", *more]


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `sft` that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", runs.small_mesh)
        assert cli.main(words(inputs, out, "sft")) == 0
    return out


def test_text_by_step(whole: Path) -> None:
    """The first four prompts are the first turns; the last answers are those of the finished model in transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rows = training_samples(whole)
    assert [row["step"] for row in rows] == [step for step in STEPS for _ in range(4)]
    prompts = [row["prompt"] for row in rows[:4]]
    assert [[row["prompt"] for row in rows if row["step"] == step] for step in STEPS] == [prompts] * 4
    assert [prompt.split()[1] for prompt in prompts] == ["0", "1", "2", "3"]
    assert all("assistant" in prompt and prompt.count("user") == 1 for prompt in prompts), prompts
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(whole / "model", dtype=torch.float32)
    for row in rows[-4:]:
        asked = row["prompt"].split("\n")[1]
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(written, skip_special_tokens=True) == row["response"]
        assert row["tokens"] == len(written)
        assert row["ended"] == (written[-1] == tokenizer.eos_token_id)
    assert {row["response"] for row in rows[:4]} != {row["response"] for row in rows[-4:]}


@pytest.mark.parametrize("step", [0, 4])
def test_killed_once_they_are_written_and_gone_on(
    step: int, inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither repeated nor lost, and the same bytes."""
    original = fixed_prompts.write_lines

    def then_stop(path: Path, rows: list[dict[str, Any]]) -> None:
        original(path, rows)
        if rows[-1]["step"] == step:
            raise Stopped(15)

    args = words(inputs, tmp_path / "run", "sft")
    with monkeypatch.context() as patch:
        patch.setattr(fixed_prompts, "write_lines", then_stop)
        assert cli.main(args) == 143
    assert cli.main(args) == 0
    for name in (TRAINING_SAMPLES, "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_they_change_nothing_that_is_learnt(inputs: Path, whole: Path, tmp_path: Path) -> None:
    args = words(inputs, tmp_path / "run", "sft")
    cut = args.index("--train.sample_every")
    assert cli.main([*args[:cut], *args[cut + 4 :]]) == 0
    name = "model/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
    assert not (tmp_path / "run" / TRAINING_SAMPLES).exists()


def test_in_the_reports(whole: Path, inputs: Path, tmp_path: Path) -> None:
    page = (whole / "report.html").read_text()
    assert "Samples during training" in page
    rows = training_samples(whole)
    table = fixed_section(rows).table
    assert table is not None
    assert [row[0] for row in table.rows] == ["", *STEPS]
    assert list(table.rows[-1][1:]) == [row["response"] for row in rows[-4:]]
    many = fixed_section([{**row, "step": step} for step in range(100) for row in rows[:4]]).table
    assert many is not None
    assert [row[0] for row in many.rows] == ["", 0, 14, 28, 42, 57, 71, 85, 99]
    other = tmp_path / "other"
    mine = str(inputs / "mine.jsonl")
    assert cli.main(words(inputs, other, "sft", "--lora.rank", "2", "--train.sample_prompts", mine)) == 0
    last = sections(read_runs([str(whole), str(other)]))[-1]
    assert last.table is not None
    assert last.table.head == ("prompt", "run", "other")
    assert [bool(row[1]) for row in last.table.rows] == [True] * 4 + [False] * 3
    assert "run: step 5, other: step 5" in last.note


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("dpo", []),
        ("dpo --online", ["--reward", "length", "--lora.rank", "2"]),
        ("ppo", ["--reward", "length", "--train.accumulate", "2"]),
        (
            "grpo",
            ["--reward", "length", "--ppo.group_size", "2", "--lora.rank", "2", "--eval_data", "{inputs}/mine.jsonl"],
        ),
        ("distill", ["--teacher", "{inputs}/model"]),
        ("sft", ["--data.kind", "text", "--data.max_length", "16"]),
    ],
)
def test_every_command_that_trains_a_policy(command: str, more: list[str], inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words_ = words(inputs, out, command, *(word.format(inputs=inputs) for word in more))
    if command not in ("dpo", "sft"):
        words_ += ["--sample.max_new_tokens", "6", "--data.max_length", "40"]
    assert cli.main(words_) == 0
    rows = training_samples(out)
    assert sorted({row["step"] for row in rows}) == STEPS
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    assert len(prompts) == (3 if command == "grpo" else 1 if "text" in more else 4), "different ones, or the held-out"
    assert all(0 < row["tokens"] <= 6 for row in rows)
    assert "Samples during training" in (out / "report.html").read_text()


@pytest.mark.slow
def test_on_a_mesh(inputs: Path, tmp_path: Path) -> None:
    """Three prompts over four devices."""
    args = words(inputs, tmp_path / "run", "sft", "--train.sample_prompts", str(inputs / "mine.jsonl"))
    assert cli.main([*args, "--mesh.fsdp", "4"]) == 0
    assert cli.main([*args, "--out", str(tmp_path / "one")]) == 0
    several, one = (read_lines(tmp_path / name / TRAINING_SAMPLES) for name in ("run", "one"))
    assert len(several) == 12
    assert several == one


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("reward", [], "--train.sample_every has no effect in dpo-jax reward"),
        ("sft", ["--train.sample_prompts", "{inputs}/many.jsonl"], "holds 33 prompts"),
        ("sft", ["--train.sample_prompts", "{inputs}/none.jsonl"], "none.jsonl"),
        ("sft", ["--train.sample_tokens", "256"], "leaves no room for a prompt in the model's context of 256"),
        ("sft", ["--train.sample_every", "0"], "--train.sample_every 0 must be at least 1"),
        ("sft", ["--train.sample_every", "None"], "--train.sample_tokens has no effect without --train.sample_every"),
    ],
)
def test_refused(
    command: str, more: list[str], message: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*words(inputs, tmp_path / "run", command), *(word.format(inputs=inputs) for word in more)]
    assert cli.main(args) == 2
    said = capsys.readouterr().err
    assert message in said
    assert not (tmp_path / "run").exists()


def test_other_prompts_when_it_goes_on(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "good"}\n')
    args = words(inputs, tmp_path / "run", "sft", "--train.sample_prompts", str(mine))
    original = fixed_prompts.write_lines

    def then_stop(path: Path, rows: list[dict[str, Any]]) -> None:
        original(path, rows)
        raise Stopped(15)

    with monkeypatch.context() as patch:
        patch.setattr(fixed_prompts, "write_lines", then_stop)
        assert cli.main(args) == 143
        assert cli.main(args) == 143
    mine.write_text('{"prompt": "bad"}\n')
    (tmp_path / "run" / TRAINING_SAMPLES).write_text('{"step": -1, "prompt": "good", "response": ""}\n')
    assert cli.main(args) == 2
    assert "holds answers to other prompts" in capsys.readouterr().err
