"""Generation on the real model against transformers: every token of 64 answers to real questions."""

import json

import jax
import numpy as np
import pytest
from test_sample_engine import full_logits, log_softmax, texts

import dpo_jax
from dpo_jax.config import SampleConfig
from dpo_jax.sample import beam_search, generate, serve

pytestmark = [pytest.mark.real, pytest.mark.slow]
NEW = 32


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(model, variables, its folder for transformers, tokenizer)."""
    model, variables = dpo_jax.load_pretrained("smollm2")
    tokenizer = dpo_jax.load_tokenizer("smollm2")
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    dpo_jax.save_pretrained(folder, model, variables, tokenizer)
    return model, variables, folder, tokenizer


@pytest.fixture(scope="module")
def prompts(smollm2, shared_data):
    """The 64 shortest of the 80 Vicuna questions, each as the chat template puts it: all are padded to the longest."""
    lines = (shared_data / "vicuna_questions" / "question.jsonl").read_text(encoding="utf-8").splitlines()
    questions = sorted((json.loads(line)["turns"][0] for line in lines), key=len)[:64]
    chats = [[{"role": "user", "content": question}] for question in questions]
    chat = smollm2[3].apply_chat_template
    return [chat(messages, add_generation_prompt=True, return_dict=False) for messages in chats]


def by_transformers(folder, prompts, new, stop, **options):
    """Continuations by `transformers`, eight prompts at a time, padded on the left; the terminator included."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for batch in (prompts[i : i + 8] for i in range(0, len(prompts), 8)):
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        settings = {"do_sample": False, "max_new_tokens": new, "eos_token_id": list(stop), "pad_token_id": 0}
        with torch.no_grad():
            out = reference.generate(ids, attention_mask=mask, **settings, repetition_penalty=1.0, **options)
        for row in out[:, longest:].tolist():
            ends = [i for i, token in enumerate(row) if token in stop]
            rows.append(row[: ends[0] + 1] if ends else row)
    return rows


def test_greedy_answers_to_64_questions_are_those_of_transformers(smollm2, prompts):
    model, variables, folder, _ = smollm2
    stop = model.config.eos_token_ids
    config = SampleConfig(NEW, temperature=0, stop_tokens=stop)
    found = generate(model, variables, prompts, jax.random.key(0), config=config)
    got = texts(found)
    assert got == by_transformers(folder, prompts, NEW, stop)
    for i in range(0, 64, 8):  # log-probabilities of some against full forward passes
        logits = full_logits(model, variables, prompts[i] + got[i])[len(prompts[i]) - 1 : -1]
        want = log_softmax(logits)[np.arange(len(got[i])), got[i]]
        np.testing.assert_allclose(np.asarray(found.logps)[i, : len(got[i])], want, atol=1e-4)


def test_a_request_gives_the_same_text_alone_in_a_batch_and_after_a_refill(smollm2, prompts):
    model, variables, *_ = smollm2
    prompts, key = prompts[:32], jax.random.key(5)
    config = SampleConfig(24, stop_tokens=model.config.eos_token_ids)
    batch = texts(generate(model, variables, prompts, key, config=config))
    for i in (3, 30):
        assert texts(generate(model, variables, [prompts[i]], key, config=config, row_ids=[i])) == [batch[i]]
    requests = [(i, 0) for i in range(32)]
    served = serve(model, variables, prompts, key, config=config, requests=requests, rows=6)
    assert {done.request[0]: done.tokens for some in served for done in some} == dict(enumerate(batch))


@pytest.mark.parametrize("penalty", [1.0, 0.6])
def test_beams_are_those_of_transformers(smollm2, prompts, penalty):
    model, variables, folder, _ = smollm2
    stop = model.config.eos_token_ids
    config = SampleConfig(32, beams=4, length_penalty=penalty, stop_tokens=stop)
    got = texts(beam_search(model, variables, prompts[:8], config=config))
    assert got == by_transformers(folder, prompts[:8], 32, stop, num_beams=4, length_penalty=penalty)
