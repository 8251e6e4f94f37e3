"""`dpo-jax generate`: files in and out, resuming, and one clear line for bad input."""

import json

import pytest
import tiny

from dpo_jax.cli import main
from dpo_jax.complete.writing import writer
from dpo_jax.complete.writing.responses import StopStrings
from dpo_jax.files.jsonl import RowsFile, read_lines


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.folder(tmp_path_factory.mktemp("generate") / "model"))


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": f"the {word} film was"} for word in ("good", "bad", "red", "blue")]
    rows.append({"messages": [{"role": "system", "content": "kind"}, {"role": "user", "content": "hate?"}]})
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(model, *args):
    return main(["generate", "--model", model, "--sample.max_new_tokens", "8", *map(str, args)])


def test_one_prompt_prints_its_response(model, capsys):
    assert run(model, "--prompt", "we like", "--sample.temperature", "0") == 0
    first = capsys.readouterr().out
    assert first.strip()
    assert run(model, "--prompt", "we like", "--sample.temperature", "0", "--seed", "3") == 0
    assert capsys.readouterr().out == first, "greedy has no seed"
    assert run(model, "--prompt", "we like", "--sample.temperature", "0", "--raw") == 0
    assert capsys.readouterr().out != first, "the chat template changes the prompt"


def test_a_file_gives_one_object_a_row_in_order(model, prompts, tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    assert run(model, "--prompts", prompts, "--out", out, "--batch_size", 2) == 0
    rows = read_lines(out)
    given = [json.loads(line) for line in prompts.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [row.get("prompt", row.get("messages")) for row in given]
    for number, row in enumerate(rows, start=1):
        assert row.keys() == {"row", "prompt", "sample", "response", "finish_reason", "tokens", "logp", "seed"}
        assert row["row"] == number
        assert (row["finish_reason"] == "length") == (row["tokens"] == 8) or row["finish_reason"] == "stop"
        assert row["logp"] < 0
    assert not list(out.parent.glob("*.part"))
    again = tmp_path / "again.jsonl"
    assert run(model, "--prompts", prompts, "--out", again, "--batch_size", 3) == 0
    assert [r["response"] for r in read_lines(again)] == [r["response"] for r in rows], "batching changes no text"
    assert run(model, "--prompts", prompts, "--out", again, "--seed", 1) == 0
    assert [r["response"] for r in read_lines(again)] != [r["response"] for r in rows]


def test_an_interrupted_run_goes_on(model, prompts, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(model, "--prompts", prompts, "--out", whole, "--batch_size", 2, "--samples", 2) == 0
    rows = read_lines(whole)
    assert [(row["row"], row["sample"]) for row in rows] == [(i, k) for i in range(1, 6) for k in range(2)]
    assert len({row["response"] for row in rows}) > 5
    real, asked = writer.serve, []

    def breaks(*args, **kwargs):
        asked.append(kwargs["requests"])
        for turn, some in enumerate(real(*args, **kwargs)):
            if len(asked) == 1 and turn == 1:
                raise KeyboardInterrupt
            yield some

    monkeypatch.setattr(writer, "serve", breaks)
    options = ("--prompts", prompts, "--out", out, "--batch_size", 2, "--samples", 2)
    assert run(model, *options) == 130
    assert not out.exists()
    part = tmp_path / "out.jsonl.part"
    done = {(row["row"] - 1, row["sample"]) for row in read_lines(part)[1:]}
    with open(part, "ab") as file:
        file.write(b'{"row": 3, "resp')  # a line cut by a kill
    assert run(model, *options) == 0
    assert asked[1] == [request for request in asked[0] if request not in done]
    assert done
    assert out.read_bytes() == whole.read_bytes()


def test_samples_of_one_prompt_are_rows(model, capsys):
    assert run(model, "--prompt", "we like", "--samples", 3) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["sample"] for row in rows] == [0, 1, 2]
    assert run(model, "--prompt", "we like") == 0
    assert capsys.readouterr().out.rstrip("\n") == rows[0]["response"].rstrip("\n")


def test_a_stop_string_ends_a_response_and_is_cut_off(model, capsys):
    options = ("--prompt", "we like", "--samples", 6, "--sample.max_new_tokens", 40)
    assert run(model, *options) == 0
    free = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stops = [free[0]["response"][9:11], free[1]["response"][5:8]]
    assert run(model, *options, "--sample.stop_strings", *stops) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, old in zip(rows, free, strict=True):
        at = min((i for i in map(old["response"].find, stops) if i >= 0), default=None)
        assert row["response"] == old["response"][:at]
        assert row["tokens"] < old["tokens"] if at is not None else row == old
        assert at is None or row["finish_reason"] == "stop"


def test_stop_strings_are_found_at_the_token_that_completes_them():
    looks = StopStrings(lambda prompt, ids: "".join("abcdefgh"[i] for i in ids), ["cd", "g"])
    assert looks((0, 0), [0, 1]) is None
    assert looks((0, 1), [0, 1, 2]) is None
    assert looks((0, 0), [0, 1, 2, 3, 4, 6]) == 4
    assert looks((0, 1), [0, 1, 2, 4, 6, 7]) == 5
    assert looks.begin("xxgcd") == 2


def test_other_settings_start_afresh(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowsFile(path, {"seed": 0}) as file:
        file.append([{"a": 1}, {"a": 2}])
    with RowsFile(path, {"seed": 0}) as file:
        assert file.rows == [{"a": 1}, {"a": 2}]
    with RowsFile(path, {"seed": 1}) as file:
        assert file.rows == []
        file.append([{"a": "ü"}])
        assert file.finish() == [{"a": "ü"}]
    assert path.read_text("utf-8") == '{"a": "ü"}\n'


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ('{"prompt": 3}\n', (), "row 1: 'prompt' is not text"),
        ('{"prompt": "a"}\n{"text": "b"}\n', (), "row 2: missing field 'prompt'"),
        ('{"prompt": "a"}\n{"prompt"\n', (), "prompts.jsonl:2"),
        ('{"messages": "a"}\n', (), "'messages' is not a list"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', (), "bad role order"),
        ('{"prompt": "a"}\n{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}\n',
         ("--raw",), "row 2: --raw takes plain text"),
    ],
)  # fmt: skip
def test_a_bad_row_is_one_line(model, tmp_path, capsys, rows, options, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(rows)
    assert run(model, "--prompts", path, "--out", tmp_path / "out.jsonl", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.jsonl"], "nothing half-written"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --prompt TEXT or --prompts FILE"),
        (("--prompt", "a", "--prompts", "b"), "not both"),
        (("--prompt", " "), "--prompt is blank"),
        (("--prompts", "absent.jsonl"), "absent.jsonl"),
        (("--prompt", "a", "--raw", "--template", "zephyr"), "--template has no effect with --raw"),
        (("--prompt", "a", "--sample.temperature", "0", "--sample.top_k", "3"), "no effect at temperature 0"),
        (("--prompt", "a", "--sample.top_p", "0"), "top_p"),
        (("--prompt", "a", "--sample.temperature", "0", "--sample.min_p", "0.1"), "no effect at temperature 0"),
        (("--prompt", "a", "--sample.min_p", "2"), "min_p 2.0 must lie"),
        (("--prompt", "a", "--sample.repetition_penalty", "0"), "repetition_penalty 0.0 must be positive"),
        (("--prompt", "a", "--sample.no_repeat_ngram", "0"), "no_repeat_ngram 0 must be at least 1"),
        (("--prompt", "a", "--sample.min_new_tokens", "8"), "min_new_tokens 8 must lie in [0, max_new_tokens 8)"),
        (("--prompt", "a", "--sample.logit_bias", "5", "-1.5", "5", "2"), "names a token id twice"),
        (("--prompt", "a", "--sample.logit_bias", "320", "-1000"), "token id 320"),
        (("--prompt", "a", "--sample.stop_strings", ""), "empty text"),
        (("--prompt", "a", "--samples", "0"), "--samples 0 must be at least 1"),
        (("--prompt", "a", "--samples", "2", "--sample.temperature", "0"), "--samples has no effect at temperature 0"),
        (("--prompt", "a", "--template", "lama"), "lama"),
        (("--prompt", "a", "--out", "."), "is a folder"),
    ],
)
def test_bad_options_are_one_line(model, capsys, options, message):
    assert run(model, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_more_than_the_context_is_refused_before_the_weights(model, tmp_path, capsys, monkeypatch):
    """The row is named, and how much room there is; a prompt that fills the context by itself has none."""
    monkeypatch.setattr(writer, "load_pretrained", None)
    path = tmp_path / "prompts.jsonl"
    texts = ["we like", "the film " * 60, "red " * 400]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts[:2]))
    assert run(model, "--prompts", path, "--sample.max_new_tokens", "240") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"dpo-jax: error: {path}: row 2: a prompt of ")
    assert "context of 256 tokens; lower --sample.max_new_tokens to at most " in said
    assert run(model, "--prompt", texts[2]) == 2
    assert capsys.readouterr().err.strip().endswith("context of 256 tokens; shorten the prompt")


def test_a_fault_of_the_model_is_not_told_of_a_prompt(tmp_path, capsys):
    model = tiny.folder(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attn_scale": 2}))
    assert run(str(model), "--prompt", "we like") == 2
    assert capsys.readouterr().err.startswith(f"dpo-jax: error: {model / 'config.json'}: unknown key attn_scale")
