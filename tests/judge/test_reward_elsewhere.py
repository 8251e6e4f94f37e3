"""A reward model of ours, asked by `transformers` about rendered text, says what `dpo-jax score` says."""

import json
import random

import jax
import numpy as np
import pytest
import tiny
from runs import small_mesh

import dpo_jax
from dpo_jax.config import DataConfig
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.sets.comparison_sets import load_responses
from dpo_jax.data.sets.loader import eval_batches
from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.data.tokens.templates import ChatTemplate
from dpo_jax.judge.reward_model import RewardModel
from dpo_jax.judge.rewards.functions import ModelReward
from dpo_jax.model import heads
from dpo_jax.weights.huggingface.heads import as_reward_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ENDLESS = (  # nothing but a line end behind an answer, and one before it
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
KINDS = ["chatml", "llama2", "zephyr", "endless", "raw"]


def tokenizer_of(kind):
    """With ChatML it pads as `tiny` does; else the tokenizer has no pad token, and pads with EOS where it has one."""
    text = tiny.tokenizer()
    if kind in ("llama2", "zephyr", "raw"):
        text = transformers.PreTrainedTokenizerFast(
            tokenizer_object=text.backend_tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>"
        )
        text.pad_token = "<|im_end|>" if kind == "zephyr" else None
    text.chat_template = {"chatml": tiny.TEMPLATE, "endless": ENDLESS}.get(kind)
    return text


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    """(kind of template, model folder, rows, our scores [N, 2], the rows as data)."""
    kind, out = request.param, tmp_path_factory.mktemp("elsewhere")
    base = tiny.folder(out / "tiny", layers=1, max_position=128)
    model, variables = as_reward_model(*dpo_jax.load_pretrained(base))
    variables["heads"] = heads.init_heads(model, jax.random.key(3), {heads.SCORE: 1})
    text = tokenizer_of(kind)
    if kind in ("llama2", "zephyr"):  # as a run with --data.template exports it
        text.chat_template = ChatTemplate(text, kind).jinja
    dpo_jax.save_pretrained(out / "rm", model, variables, text)
    rng = random.Random(0)
    rows = [
        {"prompt": tiny.sentence(rng, 3), "chosen": tiny.sentence(rng, n % 5 + 1), "rejected": tiny.sentence(rng, 3)}
        for n in range(12)
    ]
    (out / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(template="raw" if kind == "raw" else None)
    model, variables = dpo_jax.load_pretrained(out / "rm")
    data = load_responses(str(out / "rows.jsonl"), dpo_jax.load_tokenizer(out / "rm"), config, vocab_size=320)
    rewards = RewardModel(model, variables, mesh=small_mesh(1, 1, 1))
    return kind, out / "rm", rows, rewards.rewards(eval_batches(data, 8, 1)), data


def rendered(kind, text, row, answer):
    if kind == "raw":
        return row["prompt"] + answer + text.eos_token
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
    return text.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(("size", "side"), [(1, "right"), (8, "right"), (8, "left")])
def test_scores_of_transformers_on_rendered_text(case, size, side):
    kind, folder, rows, ours, _ = case
    text = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.pad_token_id == text.pad_token_id is not None
    texts = [rendered(kind, text, row, row[name]) for row in rows for name in ("chosen", "rejected")]
    theirs = []
    for start in range(0, len(texts), size):
        inputs = text(texts[start : start + size], return_tensors="pt", padding=True, add_special_tokens=False)
        assert (inputs["input_ids"][:, -1] != text.pad_token_id).any(), "the longest text ends with no padding"
        with torch.no_grad():
            theirs += model(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).logits[:, 0].tolist()
    theirs = np.reshape(theirs, (-1, 2))
    assert np.ptp(ours) > 0.3
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.mean(ours[:, 0] > ours[:, 1]) == np.mean(theirs[:, 0] > theirs[:, 1])


def test_what_judges_samples_judges_the_same_text(case):
    """PPO and rejection sampling score where `dpo-jax score` does."""
    kind, folder, rows, ours, data = case
    raw = kind == "raw"
    prompts, responses = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    judge = ModelReward(str(folder), raw=raw, mesh=small_mesh(1, 1, 1), batch_size=8)
    asked = [Prompt((Message("user", prompt),), prompt) for prompt in prompts]
    np.testing.assert_allclose(judge(asked, responses), ours[:, 0], atol=1e-4)
    assert "100.0% of them whole" in data.summary()
