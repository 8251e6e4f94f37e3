"""A model that learnt a template of its own stops at its turn end elsewhere, too."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dpo_jax import cli
from dpo_jax.weights.convert import convert

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
