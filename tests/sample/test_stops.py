"""A model that learnt a template of its own stops at its turn end elsewhere, too."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dpo_jax import cli
from dpo_jax.weights.convert import convert
from dpo_jax.weights.opened import open_checkpoint
from dpo_jax.weights.pretrained import load_pretrained

BASE, TURN_END = 0, 2  # <|endoftext|>, <|im_end|>


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that ends by `<|endoftext|>` and has no template."""
    folder = tiny.folder(tmp_path_factory.mktemp("stops") / "base", layers=1)
    for name in ("config.json", "tokenizer_config.json"):
        raw = json.loads((folder / name).read_text())
        raw |= {"eos_token_id": BASE} if name == "config.json" else {"eos_token": "<|endoftext|>"}
        (folder / name).write_text(json.dumps(raw))
    (folder / "chat_template.jinja").unlink()
    generation = {"_from_model_config": True, "eos_token_id": BASE, "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def run(*words: str) -> None:
    assert cli.main(list(words)) == 0


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that began to learn ChatML, with adapters."""
    out = tmp_path_factory.mktemp("run")
    (out / "qa.jsonl").write_text((json.dumps({"prompt": "a question", "completion": "good"}) + "\n") * 8)
    run(
        *("sft", "--model", str(base), "--data", str(out / "qa.jsonl"), "--out", str(out / "run")),
        *("--data.template", "chatml", "--data.max_length", "32", "--train.steps", "1", "--lora.rank", "2"),
    )
    return out / "run"


def test_generation_config_lists_the_turn_end_and_what_was_there(trained: Path, tmp_path: Path) -> None:
    convert(trained / "adapter", tmp_path / "merged")
    for folder in (trained / "model", tmp_path / "merged"):
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [BASE, TURN_END]
    # transformers would take the ids from config.json again
    assert "_from_model_config" not in json.loads((trained / "model" / "generation_config.json").read_text())
    read = GenerationConfig.from_pretrained(trained / "model")
    assert (read.temperature, read.do_sample) == (0.6, True)


def test_transformers_and_generate_stop_at_the_turn_end(trained: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(trained / "model")
    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    messages = [{"role": "user", "content": "a question"}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    told = {"max_new_tokens": 8, "do_sample": False, "sequence_bias": {(TURN_END,): 1000.0}}
    assert model.generate(**asked, **told)[0, asked["input_ids"].shape[1] :].tolist() == [TURN_END]
    (tmp_path / "asked.jsonl").write_text('{"prompt": "a question"}\n')
    run(
        *("generate", "--model", str(trained / "model"), "--prompts", str(tmp_path / "asked.jsonl")),
        *("--out", str(tmp_path / "ours.jsonl"), "--sample.max_new_tokens", "8"),
        *("--sample.logit_bias", str(TURN_END), "1000"),
    )
    assert json.loads((tmp_path / "ours.jsonl").read_text())["finish_reason"] == "stop"


def test_a_checkpoint_of_an_unfinished_run_is_converted_as_its_model_would_be(trained: Path, tmp_path: Path) -> None:
    unfinished = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("model", "adapter"))
    run("convert", "--from", str(unfinished), "--to", str(tmp_path / "model"))
    for name in ("generation_config.json", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "model" / name).read_bytes() == (trained / "model" / name).read_bytes(), name
    run("convert", "--from", str(unfinished), "--to", str(tmp_path / "orbax"), "--format", "orbax")
    assert open_checkpoint(tmp_path / "orbax").architecture.stop_ids == (BASE, TURN_END)


def test_generate_ends_at_what_generation_config_lists(base: Path, tmp_path: Path) -> None:
    """Ids that neither config.json nor the template names, of a folder whose answers are asked for as plain text."""
    folder = shutil.copytree(base, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [BASE, 300, TURN_END, 10**6, -1]}))
    assert open_checkpoint(folder).architecture.stop_ids == (BASE, 300, TURN_END)
    for end, reason in ((300, "stop"), (301, "length")):
        run(
            *("generate", "--model", str(folder), "--prompt", "a question", "--raw", "--out", str(tmp_path / "out")),
            *("--sample.max_new_tokens", "4", "--sample.logit_bias", str(end), "1000"),
        )
        (row,) = map(json.loads, (tmp_path / "out").read_text().splitlines())
        assert (row["finish_reason"], row["tokens"]) == (reason, 1 if reason == "stop" else 4)
        (tmp_path / "out").unlink()


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_an_exported_folder_stops_when_it_is_read_again(trained: Path, kind: str) -> None:
    assert open_checkpoint(trained / kind).architecture.stop_ids == (BASE, TURN_END)
    model, _ = load_pretrained(trained / kind)
    assert model.config.stop_ids == (BASE, TURN_END)
