"""The commands `logps`, `eval`, `inspect` and `convert` on a tiny model, from words to files."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import dpo_jax
from dpo_jax import cli
from dpo_jax.config import DataConfig
from dpo_jax.data.sets.dataset import load_preferences
from dpo_jax.files import jsonl

ROWS = 12
LENGTH = 44  # cuts some responses


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy, a reference, and pairs that have ratings and sources."""
    folder = tmp_path_factory.mktemp("commands")
    tiny.folder(folder / "policy")
    tiny.folder(folder / "reference", seed=1)
    pairs = tiny.preferences(folder / "plain.jsonl", rows=ROWS)
    with (folder / "pairs.jsonl").open("w") as file:
        for i, line in enumerate(pairs.read_text().splitlines()):
            file.write(json.dumps(json.loads(line) | {"rating": i % 3, "source": "ab"[i % 2]}) + "\n")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this test's own."""
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def run(*words: Any) -> None:
    """`dpo-jax words...`, which must succeed."""
    assert cli.main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def expected(place: Path) -> np.ndarray:
    """[N, 2] summed log-probabilities: one plain sequence a response, no groups, no buckets, no chunks, no mesh."""
    model, variables = dpo_jax.load_pretrained(place / "policy")
    tokenizer = dpo_jax.load_tokenizer(place / "policy")
    options = DataConfig(max_length=LENGTH)
    data = load_preferences(str(place / "pairs.jsonl"), tokenizer, options, vocab_size=model.config.vocab_size)
    logits = jax.jit(lambda ids: model.apply(variables, model.apply(variables, ids), method="logits"))
    sums = np.zeros((len(data), 2))
    for i in range(len(data)):
        for k in range(2):
            ids = np.concatenate([data.prompts[i], data.responses[2 * i + k]])
            padded = np.pad(ids, (0, LENGTH - len(ids)))  # causal: what follows changes nothing
            logps = np.asarray(jax.nn.log_softmax(logits(padded[None])[0]))
            start = len(data.prompts[i])
            sums[i, k] = sum(logps[t - 1, ids[t]] for t in range(start, len(ids)))
    return sums


def test_logps(place: Path, expected: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "logps.jsonl"
    run(
        "logps", "--model", place / "policy", "--data", place / "pairs.jsonl", "--out", out, "--data.max_length", LENGTH
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(1, ROWS + 1))
    found = np.array([[row["chosen_logps"], row["rejected_logps"]] for row in rows])
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert all(0 < row["chosen_tokens"] < LENGTH and row["rejected_tokens"] > 0 for row in rows)
    assert [path.name for path in out.parent.iterdir()] == ["logps.jsonl"]


def test_logps_limit_and_split_mesh_agree(place: Path, tmp_path: Path) -> None:
    words = ["logps", "--model", place / "policy", "--data", place / "pairs.jsonl", "--data.limit", 5]
    run(*words, "--out", tmp_path / "a.jsonl", "--mesh.data", 8, "--mesh.fsdp", 1)
    run(*words, "--out", tmp_path / "b.jsonl", "--mesh.fsdp", 4, "--mesh.tensor", 2, "--dtype", "bfloat16")
    a, b = ([json.loads(line) for line in (tmp_path / n).read_text().splitlines()] for n in ("a.jsonl", "b.jsonl"))
    assert len(a) == len(b) == 5
    for one, other in zip(a, b, strict=True):
        assert one["chosen_tokens"] == other["chosen_tokens"]
        assert one["chosen_logps"] == pytest.approx(other["chosen_logps"], rel=0.05)
        assert one["chosen_logps"] != other["chosen_logps"]  # another dtype is another computation, not the cache


def test_eval(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--model", place / "policy", "--reference", place / "reference", "--data", place / "pairs.jsonl"]
    run(*words, "--out", tmp_path / "e.json", "--samples", 3, "--sample.max_new_tokens", 8, "--beta", 0.5)
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["pairs"] == ROWS
    for name in ("eval_rewards/accuracies", "eval_rewards/margins", "eval_perplexity/chosen", "eval_kl_token_k3"):
        assert np.isfinite(found[name])
    assert [row["value"] for row in found["tables"]["rating"]] == [0, 1, 2]
    assert sum(row["pairs"] for row in found["tables"]["source"]) == ROWS
    margins = [row["margin"] * row["pairs"] for row in found["tables"]["rating"]]
    assert sum(margins) / ROWS == pytest.approx(found["eval_rewards/margins"])
    assert found["samples"]["texts"] == 3
    assert found["samples"]["length"] <= 8
    shown = capsys.readouterr().out
    for word in ("eval_rewards", "by rating", "by source", "samples/looping"):
        assert word in shown


def test_eval_against_itself(place: Path, tmp_path: Path) -> None:
    words = ["eval", "--model", place / "policy", "--reference", place / "policy", "--data", place / "plain.jsonl"]
    run(*words, "--out", tmp_path / "e.json", "--samples", 2, "--sample.max_new_tokens", 6, "--sample.temperature", 0.7)
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["eval_rewards/margins"] == found["eval_rewards/accuracies"] == 0
    assert found["eval_kl"] == found["eval_kl_token_k3"] == 0
    assert found["tables"] == {}


def test_eval_without_reference_or_samples(place: Path, expected: np.ndarray, tmp_path: Path) -> None:
    words = ["eval", "--model", place / "policy", "--data", place / "plain.jsonl", "--out", tmp_path / "e.json"]
    run(*words, "--data.max_length", LENGTH)
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["samples"] is None
    assert "eval_rewards/margins" not in found
    assert found["eval_logps/chosen"] == pytest.approx(expected[:, 0].mean(), abs=1e-3)
    assert found["eval_logps/accuracies"] == pytest.approx((expected[:, 0] > expected[:, 1]).mean())


def test_inspect(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("inspect", "--model", place / "policy", "--data", place / "pairs.jsonl", "--rows", 2, "--first", 4)
    shown = capsys.readouterr().out
    assert shown.index("row 4, chosen") < shown.index("row 4, rejected") < shown.index("row 5, chosen")
    assert "row 6" not in shown
    words = "".join(shown.split("row 4, chosen")[1].split("row 4, rejected")[0].replace("|", "").split())
    row = json.loads((place / "pairs.jsonl").read_text().splitlines()[3])
    for text in (row["prompt"], row["chosen"]):
        assert "".join(text.split()) in words
    assert "terminator" in shown


def test_inspect_table(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 2's Table 6, counted by hand: a word of the letters a to d is a token of its own here, or several."""
    two = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a b"}, {"role": "user", "content": "b"}]
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "a", "source": "x"},
        {"prompt": two, "chosen": "a", "rejected": "a b c", "source": "x"},
        {"prompt": "a", "responses": ["a", "b", "c"], "source": "[y]"},
        {"prompt": "a", "chosen": "b", "rejected": "a", "source": "all"},
    ]
    jsonl.write_lines(tmp_path / "rows.jsonl", rows)
    run("inspect", "--model", place / "policy", "--data", tmp_path / "rows.jsonl", "--table")
    shown = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in re.split("[│┃]", line)] for line in shown]
    assert [one[2] for one in cells if len(one) == 8 and one[1] == "all"] == ["1", "6"]  # a source, and the total
    found = {one[1]: one[2:-1] for one in cells if len(one) == 8}
    one = len(dpo_jax.load_tokenizer(str(place / "policy"))("a b")["input_ids"])
    three = len(dpo_jax.load_tokenizer(str(place / "policy"))("a b c")["input_ids"])
    # Examples: 1 + 1; 1 + one + 1 + the mean of 1 and three.
    second = 2 + one + (1 + three) / 2
    assert found["x"] == ["2", "1.5", f"{(2 + second) / 2:.1f}", "1.0", f"{(3 + one + three) / 5:.1f}"]
    assert found["[y]"] == ["3", "1.0", "2.0", "1.0", "1.0"]
    for words in (["--rows", "2"], ["--kind", "dialogues"], ["--data.max_length", "64"], ["--data.template", "raw"]):
        base = ["inspect", "--model", str(place / "policy"), "--data", str(tmp_path / "rows.jsonl"), "--table"]
        assert cli.main([*base, *words]) == 2
        assert "no effect with" in capsys.readouterr().err


def test_inspect_dialogues(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "dialogues.jsonl"
    source.write_text(json.dumps({"instruction": "two", "output": "four", "history": [["one", "three"]]}))
    words: list[Any] = ["inspect", "--model", place / "policy", "--data", source, "--kind", "dialogues"]
    run(*words)
    every = capsys.readouterr().out
    run(*words, "--train_on", "last")
    last = capsys.readouterr().out
    counts = [int(shown.split(" of them in the loss\n")[0].split()[-1]) for shown in (every, last)]
    assert counts[0] > counts[1] > 1
    for shown in (every, last):
        joined = "".join(shown.split("in the loss\n")[1].replace("|", "").split())
        assert joined.startswith("<im_start>user\\none<im_end>\\n<im_start>assistant\\nthree<im_end>")
    for more, line in (
        (["--data.max_prompt_length", 9], "--data.max_prompt_length has no effect with --kind dialogues"),
        (["--kind", "preferences", "--train_on", "all"], "--train_on has no effect without --kind dialogues"),
    ):
        assert cli.main([str(word) for word in [*words, *more]]) == 2
        assert line in capsys.readouterr().err


def test_inspect_takes_the_files_of_a_mixture(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the training commands take them, weights and all; each shows its rows, under its name."""
    other = tiny.preferences(tmp_path / "other.jsonl", rows=3, seed=5)
    run("inspect", "--model", place / "policy", "--data", f"{place / 'pairs.jsonl'}:0.7", f"{other}:0.3", "--rows", 1)
    out, err = capsys.readouterr()
    assert out.count("row 1, chosen:") == 2
    assert f"{other}: 3 of 3 rows" in out + err


def test_inspect_past_the_end(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", "--model", place / "policy", "--data", place / "pairs.jsonl", "--first", 99]
    assert cli.main([str(word) for word in words]) == 2
    assert f"no usable row from row 99 on; the last one is {ROWS}" in capsys.readouterr().err


def test_convert_there_and_back(place: Path, tmp_path: Path) -> None:
    run("convert", "--from", place / "policy", "--to", tmp_path / "ours", "--format", "orbax")
    run("convert", "--from", tmp_path / "ours", "--to", tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (place / "policy", tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name])


def test_convert_refuses_a_folder_in_use(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "--from", str(place / "policy"), "--to", str(place / "reference")]
    assert cli.main(words) == 2
    assert "reference" in capsys.readouterr().err


@pytest.mark.parametrize(("out", "told"), [(".", "is a folder"), ("/dev/full", "is not a file that can be written")])
def test_out_that_is_no_file(out: str, told: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["logps", "--model", place / "policy", "--data", place / "pairs.jsonl", "--out", out]
    assert cli.main([str(word) for word in words]) == 2
    assert told in capsys.readouterr().err
