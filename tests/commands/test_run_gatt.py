"""`dpo-jax gatt` from end to end on a tiny random model."""

import dataclasses
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
from safetensors.numpy import load_file

from dpo_jax import cli
from dpo_jax.commands import gatt
from dpo_jax.complete.writing import gatt_dialogues
from dpo_jax.complete.writing.writer import Writer
from dpo_jax.config import (
    CheckpointConfig,
    GattConfig,
    GattRun,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    SampleConfig,
    SFTDataConfig,
    TrainConfig,
)
from dpo_jax.data.sets.loader import TokenLoader
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.errors import InputError, Stopped
from dpo_jax.files.jsonl import read_lines
from dpo_jax.files.log import read_metrics
from dpo_jax.train import session as training
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import load_tokenizer

TEXTS = ("samples.jsonl", "sft.jsonl", "before.jsonl", "after.jsonl", "metrics.jsonl", "consistency.png")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model (`model`), prompts and instructions; compiled programs are kept."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", hidden=16, layers=1, max_position=512)
    rng = random.Random(0)
    rows: list[dict] = [{"prompt": f"{i} {tiny.sentence(rng, 2)}"} for i in range(16)]
    rows += [{"turns": [f"{i} a film", f"{i} a book"]} for i in range(16, 20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [
        {"instruction": "a good book", "check": "[aeiou]", "short": "good"},
        {"system_prompt": "be kind", "check": "keywords:good, bad, the, a, you"},
        {"instruction": "the film was red"},
    ]
    (folder / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    return folder


@pytest.fixture(autouse=True)
def few_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "make_mesh", runs.small_mesh)
    monkeypatch.setattr(gatt, "make_mesh", runs.small_mesh)


def options(inputs: Path, out: Path, **changes) -> GattRun:
    """Eight training answers and four of the evaluation, each of at most three tokens; few shapes to compile."""
    own = GattConfig(
        instructions=str(inputs / "instructions.jsonl"),
        dialogues=4,
        turns=2,
        train_turns="every",
        eval_dialogues=2,
    )
    config = GattRun(
        model=str(inputs / "model"),
        out=str(out),
        sample_batch_size=2,
        gatt=dataclasses.replace(own, **changes.pop("gatt", {})),
        sample=SampleConfig(max_new_tokens=3),
        lora=LoraConfig(rank=2),
        optimizer=OptimizerConfig(learning_rate=3e-2),
        data=SFTDataConfig(str(inputs / "prompts.jsonl"), max_length=512, buckets=1),
        train=TrainConfig(batch_size=4, steps=3),
        checkpoint=CheckpointConfig(every=1),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
    )
    return runs.changed(config, **changes)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", runs.small_mesh)
        patch.setattr(gatt, "make_mesh", runs.small_mesh)
        return gatt.gatt(options(inputs, tmp_path_factory.mktemp("whole") / "run"))


def test_the_whole_run(inputs: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, rows = read_lines(whole / "samples.jsonl"), read_lines(whole / "sft.jsonl")
    assert [(row["dialogue"], row["turn"]) for row in samples] == [(i, t) for i in range(4) for t in (1, 2)]
    assert {row["kept"] for row in samples if row["instruction"] == "the film was red"} == {None}
    shorts = 0
    for row in rows:
        answers = [s["answer"] for s in samples if s["dialogue"] == row["dialogue"]][: row["turn"]]
        users = [s["user"] for s in samples if s["dialogue"] == row["dialogue"]][: row["turn"]]
        instruction = next(s["instruction"] for s in samples if s["dialogue"] == row["dialogue"])
        roles, texts = zip(*((m["role"], m["content"]) for m in row["messages"]), strict=True)
        assert roles == ("user", "assistant") * row["turn"]
        assert list(texts[1::2]) == answers
        assert list(texts[2::2]) == users[1:], "only the first turn holds the instruction"
        assert texts[0] in (f"{instruction}\n\n{users[0]}", f"good\n\n{users[0]}")
        shorts += texts[0].startswith("good")
    assert shorts > 0
    resolved = json.loads((whole / "sft" / "config.json").read_text())
    assert resolved["data"]["train_on"] == "last"

    before, after = read_lines(whole / "before.jsonl"), read_lines(whole / "after.jsonl")
    for key in ("dialogue", "turn", "instruction", "user"):
        assert [row[key] for row in before] == [row[key] for row in after]
    assert [row["answer"] for row in before] != [row["answer"] for row in after], "training moved the model"
    assert not {row["user"] for row in before} & {row["user"] for row in samples}
    assert all(set(row["checks"]) <= {"pattern", "keywords"} and row["checks"] for row in before)

    metrics = read_metrics(whole / "metrics.jsonl")
    assert [row["turn"] for row in metrics] == [1, 2]
    for row in metrics:
        for name in ("before", "after"):
            low, high = row[f"consistency/{name}_low"], row[f"consistency/{name}_high"]
            assert 0 <= low <= row[f"consistency/{name}"] <= high <= 1
            assert row[f"answers/{name}"] == 2
    kept = [row["kept"] for row in before if row["turn"] == 2]
    assert metrics[1]["consistency/before"] == np.mean(kept)
    text = (whole / "report.html").read_text()
    for word in ("Consistency by turn", "before", "sampled with it in every turn", "learning rate", "be kind"):
        assert word.lower() in text.lower()
    assert (whole / "consistency.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "adapter" / "adapter_config.json").is_file()
    _, variables = load_pretrained(whole)
    assert "params" in variables
    assert load_tokenizer(whole).chat_template
    capsys.readouterr()
    assert gatt.gatt(options(inputs, whole)) == whole
    assert "this run is finished" in capsys.readouterr().err


def test_a_later_turn_is_asked_with_the_instruction_in_the_first_only(inputs: Path, whole: Path) -> None:
    """The answers of the evaluation are those of plain generation for the same prompt."""
    tokenizer = load_tokenizer(inputs / "model")
    rows = [row for row in read_lines(whole / "before.jsonl") if row["dialogue"] == 1]
    prompt = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": f"{rows[0]['instruction']}\n\n{rows[0]['user']}"},
            {"role": "assistant", "content": rows[0]["answer"]},
            {"role": "user", "content": rows[1]["user"]},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer.encode(str(prompt), add_special_tokens=False)
    mesh = runs.small_mesh(1, 1, 1)
    model, variables = load_pretrained(inputs / "model", mesh=mesh)
    found = {}
    encoder = ConversationEncoder(tokenizer, None)
    writer = Writer(lambda: (model, variables), tokenizer, encoder, SampleConfig(3), batch_size=2, mesh=mesh)
    for some in writer.responses([ids, ids], [(0, 0), (1, 0)], seed=gatt_dialogues.seed_of(0, "evaluation", 2)):
        found |= dict(some)
    assert found[1, 0].ids == rows[1]["ids"]


def stop_writing(purpose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break off after the first answers of the second turn of one file."""
    original = Writer.responses

    def breaks(*args, **kwargs):
        for some in original(*args, **kwargs):
            yield some
            if kwargs["seed"] == gatt_dialogues.seed_of(0, purpose, 2):
                raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "responses", breaks)


def stop_training(monkeypatch: pytest.MonkeyPatch) -> None:
    original = TokenLoader.__next__

    def draw(self):
        if self.step + 1 == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(TokenLoader, "__next__", draw)


@pytest.mark.slow
def test_stopped_in_every_stage_and_resumed_is_exact(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = options(inputs, tmp_path / "run")
    for purpose, name in (("training", "samples"), ("evaluation", "before")):
        with monkeypatch.context() as patch:
            stop_writing(purpose, patch)
            with pytest.raises(KeyboardInterrupt):
                gatt.gatt(run)
        part = tmp_path / "run" / f"{name}.jsonl.part"
        assert any(row["turn"] == 2 for row in read_lines(part)[1:])
        with open(part, "ab") as file:
            file.write(b'{"dialogue": 3, "tu')  # a line cut by a kill
    with monkeypatch.context() as patch:
        stop_training(patch)
        with pytest.raises(Stopped):
            gatt.gatt(run)
    assert "stopped after step 2 of 3" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()
    with monkeypatch.context() as patch:
        stop_writing("evaluation", patch)
        with pytest.raises(KeyboardInterrupt):
            gatt.gatt(run)
    assert (tmp_path / "run" / "after.jsonl.part").exists()
    gatt.gatt(run)
    said = capsys.readouterr().err
    assert "going on after step 2 of 3" in said
    assert "going on behind its" in said
    for name in TEXTS:
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name
    left, right = (load_file(out / "model" / "model.safetensors") for out in (tmp_path / "run", whole))
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.slow
def test_data_only_and_evaluation_only(inputs: Path, tmp_path: Path, whole: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from dpo_jax.config import *\n"
        "config = GattRun(model=ON_COMMAND_LINE, out=ON_COMMAND_LINE,"
        " sample=SampleConfig(max_new_tokens=3), mesh=MeshConfig(fsdp=1))\n"
    )
    words = ["gatt", str(recipe), "--model", str(inputs / "model"), "--data", str(inputs / "prompts.jsonl")]
    words += ["--gatt.instructions", str(inputs / "instructions.jsonl"), "--sample_batch_size", "2"]
    data = ["--gatt.train", "false", "--gatt.dialogues", "4", "--gatt.turns", "2", "--gatt.keep", "consistent"]
    assert cli.main([*words, "--out", str(tmp_path / "data"), *data]) == 0
    samples, rows = read_lines(tmp_path / "data" / "samples.jsonl"), read_lines(tmp_path / "data" / "sft.jsonl")
    assert {row["instruction"] for row in samples} == {"a good book", "be kind"}, "only those with a check"
    kept = [(row["dialogue"], row["turn"]) for row in samples if row["kept"] and row["turn"] == 2]
    assert [(row["dialogue"], row["turn"]) for row in rows] == kept
    assert not (tmp_path / "data" / "before.jsonl").exists()

    judged = ["--gatt.evaluate_only", "true", "--gatt.eval_dialogues", "2", "--gatt.eval_turns", "2"]
    assert cli.main([*words, "--out", str(tmp_path / "judged"), *judged]) == 0
    metrics = read_metrics(tmp_path / "judged" / "metrics.jsonl")
    assert [row["turn"] for row in metrics] == [1, 2]
    assert {"consistency/model", "answers/model"} < set(metrics[0])
    assert not (tmp_path / "judged" / "model").exists()


# ---------------------------------------------------------------- bad input


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gatt": {"turns": 16, "eval_turns": 2}},
            "16 turns with .* the model's context is 512: [1-9][0-9]* of them fit",
        ),
        ({"gatt": {"eval_turns": 99}}, "holds 6 different user turns, and a dialogue is to have 99"),
        ({"data": SFTDataConfig(max_length=60)}, "--data.max_length is 60: 1 of them fit"),
        ({"data": SFTDataConfig(max_length=512, template="nothing")}, "template nothing"),
        ({"gatt": {"instructions": None, "languages": ("xx",)}}, "--gatt.languages xx is unknown"),
        (
            {"train": TrainConfig(batch_size=5, steps=1), "mesh": MeshConfig(2, 1, 1)},
            "batch_size 5 does not divide by 2",
        ),
        (
            {"train": TrainConfig(batch_size=4, frozen_dtype="bfloat16"), "lora": LoraConfig()},
            "frozen_dtype has no effect",
        ),
        ({"model": "nowhere"}, "nowhere: no such folder"),
        ({"files": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(inputs: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        gatt.gatt(options(inputs, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("prompts", "said", "message"),
    [
        ([{"messages": [{"role": "assistant", "content": "a"}]}], None, r"no user turn \(first: row 1"),
        (None, [{"text": "a"}], r"no instruction \(first: row 1"),
        (None, [{"instruction": "a", "check": "(a"}], r"a check is no regular expression \(first: row 1: '\(a'"),
        (None, [{"instruction": "Be kind to the user."}], "no instruction has a check"),
        (None, [], "i.jsonl"),
    ],
)
def test_bad_rows_are_one_line(
    inputs: Path, tmp_path: Path, prompts: list | None, said: list | None, message: str
) -> None:
    changes: dict = {}
    if prompts is not None:
        changes["files"] = write(tmp_path / "p.jsonl", *prompts)
    if said is not None:
        changes["gatt"] = {"instructions": write(tmp_path / "i.jsonl", *said)}
    with pytest.raises(InputError, match=message) as caught:
        gatt.gatt(options(inputs, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_template_that_forgets_is_refused(inputs: Path, tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model", hidden=16, layers=1)
    forgets = "{{ '<|im_start|>' + messages[-1]['role'] + '\n' + messages[-1]['content'] + '<|im_end|>\n' }}"
    path = next((tmp_path / "model").glob("chat_template.jinja"), tmp_path / "model" / "tokenizer_config.json")
    assert path.name == "chat_template.jinja"
    path.write_text(forgets)
    with pytest.raises(InputError, match="leaves earlier turns out"):
        gatt.gatt(options(inputs, tmp_path / "run", model=str(tmp_path / "model")))


def test_a_folder_with_other_options_or_changed_prompts_is_refused(inputs: Path, tmp_path: Path, whole: Path) -> None:
    with pytest.raises(InputError, match=r"has --gatt\.turns 2, this command has 3"):
        gatt.gatt(options(inputs, whole, gatt={"turns": 3}))
    (tmp_path / "run").mkdir()
    marker = json.loads((whole / "run.json").read_text()) | {"finished": False}
    marker["given"]["out"] = str(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps(marker))
    (tmp_path / "run" / "inputs.json").write_text((whole / "inputs.json").read_text().replace('": "', '": "0'))
    with pytest.raises(InputError, match=r"what --data .* names has changed since this run began"):
        gatt.gatt(options(inputs, tmp_path / "run"))
