"""Bad input through the command line: one line that names the place and the fix, exit code 2, nothing half-written."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from dpo_jax import cli

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"prompt": "why", "chosen": "good answer", "rejected": "bad answer"}
Fails = Callable[..., str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is cached reaches the user's own cache, or another test."""
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good tiny model; tests that spoil one take a copy."""
    return tiny.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the model to spoil."""
    return Path(shutil.copytree(model, tmp_path / "spoilt"))


@pytest.fixture
def fails(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run `dpo-jax dpo` with the given options over good ones; return its one line of complaint."""
    data = tiny.preferences(tmp_path / "good.jsonl", rows=8)

    def run(**options: Any) -> str:
        out = tmp_path / "out"
        given = {"model": model, "data": data, "out": out, "train.steps": 1, "data.max_length": 64} | options
        words = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        capsys.readouterr()
        code = cli.main(["dpo", *words])
        said = capsys.readouterr()
        assert code == 2, said.err
        *notes, line = said.err.splitlines()
        assert line.startswith("dpo-jax: error: ")
        assert not any(note.startswith(("dpo-jax: ", "Traceback")) for note in notes), said.err
        assert not out.exists(), "something was written before the input was checked"
        return line.removeprefix("dpo-jax: error: ").strip()

    return run


def rows(path: Path, *lines: Any) -> Path:
    """Write JSON lines: a text as it stands, anything else as JSON."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def without(name: str) -> dict[str, str]:
    """A good row without one of its columns."""
    return {key: value for key, value in GOOD.items() if key != name}


def hh(*turns: str) -> str:
    """A transcript whose turns alternate between human and assistant."""
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns))


BAD_ROWS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "malformed JSON": ('{"prompt": "why", "chosen": ', ("JSON",)),
    "not an object": ([1, 2], ("object",)),
    "missing field": (without("rejected"), ("rejected",)),
    "empty completion": (GOOD | {"chosen": ""}, ("chosen", "empty")),
    "chosen is rejected": (GOOD | {"rejected": GOOD["chosen"]}, ("chosen", "rejected", "same")),
    "no shared prompt": ({"chosen": hh("hello", "yes"), "rejected": hh("bye", "no")}, ("prompt",)),
    "not a text": (GOOD | {"prompt": 5}, ("prompt", "5")),
    "unknown columns": ({"question": "why", "better": "a", "worse": "b"}, ("question", "chosen")),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_row(kind: str, fails: Fails, tmp_path: Path) -> None:
    row, words = BAD_ROWS[kind]
    path = rows(tmp_path / "bad.jsonl", GOOD, row, GOOD | {"prompt": "how"})
    line = fails(data=path)
    assert "bad.jsonl" in line
    assert "row 2" in line or "line 2" in line
    for word in words:
        assert word in line


def test_bad_rows_are_skipped_and_counted_when_asked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows(tmp_path / "bad.jsonl", *(row for row, _ in BAD_ROWS.values()), GOOD, GOOD | {"prompt": "how"})
    out = tmp_path / "logps.jsonl"
    words = ["logps", "--model", str(model), "--data", str(path), "--out", str(out), "--on-bad-rows", "skip"]
    assert cli.main(words) == 0
    assert len(out.read_text().splitlines()) == 2
    said = capsys.readouterr().err
    assert str(len(BAD_ROWS)) in said
    assert "same" in said


def test_absent_data_file(fails: Fails, tmp_path: Path) -> None:
    line = fails(data=tmp_path / "none.jsonl")
    assert "none.jsonl" in line
    assert "no such file" in line


def test_empty_data_file(fails: Fails, tmp_path: Path) -> None:
    assert "empty.jsonl" in fails(data=rows(tmp_path / "empty.jsonl"))


def test_truncated_gzip(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    text = "".join(json.dumps(GOOD | {"prompt": f"why {i}"}) + "\n" for i in range(2000))
    path.write_bytes(gzip.compress(text.encode())[:-200])
    assert "cut.jsonl.gz" in fails(data=path)


def test_absent_model(fails: Fails, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in fails(model=tmp_path / "none")


def test_folder_that_is_no_model(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in fails(model=tmp_path / "empty")


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """Rewrite the folder's weights after `change`."""
    tensors = dict(load_file(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NORM = "model.layers.1.input_layernorm.weight"


def test_missing_tensor(fails: Fails, copy: Path) -> None:
    line = fails(model=change_tensors(copy, lambda tensors: tensors.pop(NORM)))
    assert NORM in line
    assert "spoilt" in line


def test_extra_tensor(fails: Fails, copy: Path) -> None:
    line = fails(
        model=change_tensors(copy, lambda tensors: tensors.update({"model.surprise": np.zeros(2, np.float32)}))
    )
    assert "model.surprise" in line


def test_misshaped_tensor(fails: Fails, copy: Path) -> None:
    line = fails(model=change_tensors(copy, lambda tensors: tensors.update({NORM: np.zeros(33, np.float32)})))
    assert NORM in line
    assert "33" in line
    assert "32" in line


def test_truncated_safetensors(fails: Fails, copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in fails(model=copy)


def test_truncated_gguf(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (5).to_bytes(8, "little") + b"\0" * 4)
    assert "cut.gguf" in fails(model=path)


def change_config(folder: Path, **changes: Any) -> Path:
    """Rewrite some values of the folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, ("GPT2LMHeadModel", "not supported")),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu")),
        ({"rope_scaling": {"rope_type": "axial", "factor": 4.0}, "rope_parameters": None}, ("axial",)),
        ({"mystery": 3}, ("mystery",)),
    ],
)
def test_unsupported_configuration(changes: dict[str, Any], words: tuple[str, ...], fails: Fails, copy: Path) -> None:
    line = fails(model=change_config(copy, **changes))
    for word in (*words, "config.json"):
        assert word in line


def test_vocabulary_larger_than_the_embedding(fails: Fails, copy: Path) -> None:
    name = "model.embed_tokens.weight"
    change_tensors(copy, lambda tensors: tensors.update({name: tensors[name][:280].copy()}))
    line = fails(model=change_config(copy, vocab_size=280))
    assert "280" in line
    assert "tokenizer" in line


def test_template_that_needs_a_missing_role(fails: Fails, copy: Path) -> None:
    template = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message must come first') }}{% endif %}"
    )
    (copy / "chat_template.jinja").write_text(template + tiny.TEMPLATE)
    line = fails(model=copy)
    assert "template" in line
    assert "system" in line


def test_batch_that_does_not_divide_the_mesh(fails: Fails) -> None:
    line = fails(**{"train.batch_size": 6, "mesh.data": 4, "mesh.fsdp": 2})
    assert "--train.batch_size" in line
    assert "8" in line


def test_heads_that_do_not_divide_the_mesh(fails: Fails) -> None:
    line = fails(**{"train.batch_size": 8, "mesh.tensor": 8, "mesh.fsdp": 1})
    assert "--mesh.tensor" in line


def test_mesh_that_is_not_the_devices(fails: Fails) -> None:
    assert "8" in fails(**{"mesh.data": 3, "mesh.fsdp": 1})


def test_out_below_a_file(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "--out" in fails(out=tmp_path / "file" / "run")


def test_out_that_holds_something_else(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tiny.preferences(tmp_path / "good.jsonl", rows=8), tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    assert cli.main(["dpo", "--model", str(model), "--data", str(data), "--out", str(out)]) == 2
    assert "precious" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def limited(words: list[str], size: int) -> subprocess.CompletedProcess[str]:
    """Run `dpo-jax` where no file can grow beyond `size` bytes: what a full disk does, without filling one."""
    script = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    script += "from dpo_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )


@pytest.mark.slow
def test_full_disk_logps(model: Path, tmp_path: Path) -> None:
    data, out = tiny.preferences(tmp_path / "good.jsonl", rows=60), tmp_path / "results" / "logps.jsonl"
    done = limited(["logps", "--model", str(model), "--data", str(data), "--out", str(out)], 4000)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("dpo-jax: error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    assert "logps.jsonl" in errors[0]
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_full_disk_training(model: Path, tmp_path: Path) -> None:
    data, out = tiny.preferences(tmp_path / "good.jsonl", rows=8), tmp_path / "run"
    words = ["dpo", "--model", str(model), "--data", str(data), "--out", str(out), "--train.steps", "2"]
    done = limited(words, 16_000)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("dpo-jax: error: ")]
    assert len(errors) == 1
    assert "checkpoint cannot be written" in errors[0]
    assert not (out / "model").exists()


@pytest.mark.parametrize(
    "words",
    [["sft"], ["sft", "--data.packing", "false"], ["dpo"], ["reward"], ["eval"], ["logps", "--out", "{out}"],
     ["inspect"], ["inspect", "--kind", "dialogues"],
     ["ppo", "--reward", "vader", "--sample.max_new_tokens", "8", "--data.max_prompt_length", "900"]],
    ids=" ".join,
)  # fmt: skip
def test_a_row_longer_than_the_context(
    words: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rule for all commands: it is refused, and both numbers are named; shorter rows go on under any limit."""
    (tmp_path / "long.jsonl").write_text(json.dumps({**GOOD, "prompt": "why " * 120 + "?"}) + "\n")
    given = ["--model", str(model), "--data", str(tmp_path / "long.jsonl")]
    if words[0] in ("sft", "dpo", "reward", "ppo"):
        given += ["--out", str(tmp_path / "out"), "--train.steps", "1"]
    assert cli.main([word.format(out=tmp_path / "out.jsonl") for word in words] + given) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--data.max_length 1024" in line
    assert "model's context" in line
    assert "set --data.max_length to at most 256" in line
    assert not (tmp_path / "out").exists()
