"""Reward models in files: `LlamaForSequenceClassification` in and out, adapters, other heads, and what is refused."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import dpo_jax
from dpo_jax.align import reward
from dpo_jax.config import ClassHead, LoraConfig, RewardConfig
from dpo_jax.errors import InputError
from dpo_jax.model import groups, heads
from dpo_jax.types import PreferenceBatch
from dpo_jax.weights.convert import convert
from dpo_jax.weights.huggingface.heads import padded_apart
from dpo_jax.weights.opened import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = ["the film was very good", "rude", "we like the book quite we like the book", "not"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("base") / "tiny", tied=False)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A reward model as transformers writes it."""
    torch.manual_seed(0)
    text = tiny.tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        num_labels=1,
        pad_token_id=text.pad_token_id,
        eos_token_id=text.eos_token_id,
    )
    path = tmp_path_factory.mktemp("published") / "rm"
    transformers.LlamaForSequenceClassification(config).save_pretrained(path)
    text.save_pretrained(path)
    return path


def batch_of(tokenizer):
    """Each text as a response with its terminator to the prompt "a"; padding holds the EOS."""
    prompt = tokenizer("<|im_start|>a")["input_ids"]
    responses = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]
    longest = max(map(len, responses))
    padded = [ids + [tokenizer.eos_token_id] * (longest - len(ids)) for ids in responses]
    n = len(TEXTS)
    batch = PreferenceBatch(
        prompts=np.tile(np.asarray(prompt, np.int32), (n, 1)),
        prompt_lengths=np.full(n, len(prompt), np.int32),
        responses=np.asarray(padded, np.int32)[:, None],
        response_lengths=np.asarray([[len(ids)] for ids in responses], np.int32),
        weights=np.ones(n, np.float32),
        rows=np.arange(n, dtype=np.int32),
    )
    return batch, [prompt + ids for ids in responses]


def ours(folder, batch):
    model, variables = dpo_jax.load_pretrained(folder)
    states = jax.jit(lambda v: groups.response_states(model.apply, v, batch))(variables)
    return np.asarray(heads.apply(variables, "score", states))[:, 0, 0]


def theirs(model, rows, pad):
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=real).logits[:, 0].numpy()


def test_scores_are_those_of_transformers(published):
    batch, rows = batch_of(dpo_jax.load_tokenizer(published))
    model = transformers.LlamaForSequenceClassification.from_pretrained(published)
    expected = theirs(model, rows, model.config.pad_token_id)
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(ours(published, batch), expected, atol=1e-4)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_reward_model_of_ours_in_transformers(base, tmp_path, lora):
    """Trained from a language model whose tokenizer pads with its EOS: the folder pads with another token."""
    model, variables = dpo_jax.load_pretrained(base, lora=LoraConfig(rank=lora))
    config = RewardConfig(multi_label=("harm=x,y,z",))
    state = reward.init_state(model, variables, config)
    if lora:  # as if trained
        noise = jax.tree.map(lambda x: x + 0.05, state.trainable["adapters"])
        state = dataclasses.replace(state, trainable={**state.trainable, "adapters": noise})
    tokenizer = dpo_jax.load_tokenizer(base)
    tokenizer.pad_token = tokenizer.eos_token
    dpo_jax.save_pretrained(tmp_path / "rm", model, state.variables, tokenizer, source=base, classes=config.heads)
    assert tokenizer.pad_token == tokenizer.eos_token  # the caller's own is as it was

    raw = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForSequenceClassification"]
    assert raw["num_labels"] == 1
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert raw["pad_token_id"] == saved.pad_token_id != saved.eos_token_id
    model_there = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert model_there.config.num_labels == 1
    assert not model_there.config.tie_word_embeddings
    batch, rows = batch_of(saved)
    here = ours(tmp_path / "rm", batch)
    np.testing.assert_allclose(here, theirs(model_there, rows, saved.pad_token_id), atol=1e-4)

    again_model, again = dpo_jax.load_pretrained(tmp_path / "rm")
    chex.assert_trees_all_close(again["heads"], state.trainable["heads"])
    assert again_model.config.num_labels == 1
    assert "lm_head" not in again["params"]
    convert(tmp_path / "rm", tmp_path / "copy")
    np.testing.assert_allclose(ours(tmp_path / "copy", batch), here, atol=1e-6)
    for name in ("rm", "copy"):
        assert open_checkpoint(tmp_path / name).classes == (ClassHead("harm", ("x", "y", "z"), 1.0, True),)
    if lora:
        told = {"source": base, "classes": config.heads}
        dpo_jax.save_pretrained(tmp_path / "adapter", model, state.variables, tokenizer, merge=False, **told)
        assert open_checkpoint(tmp_path / "adapter").classes == open_checkpoint(tmp_path / "rm").classes
        np.testing.assert_allclose(ours(tmp_path / "adapter", batch), here, atol=1e-5)
        _check_peft(base, tmp_path / "adapter", rows, here)
    # A second export replaces the first, heads.safetensors included.
    dpo_jax.save_pretrained(tmp_path / "rm", again_model, {**again, "heads": {"score": again["heads"]["score"]}}, saved)
    assert not (tmp_path / "rm" / "heads.safetensors").exists()


def _check_peft(base, adapter, rows, expected):
    peft = pytest.importorskip("peft")
    start = transformers.LlamaForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    model = peft.PeftModel.from_pretrained(start, adapter)
    np.testing.assert_allclose(theirs(model, rows, 0), expected, atol=1e-4)


def test_the_reward_model_that_peft_saves(base, tmp_path):
    """It lists classifier and score as saved, and all-linear as every layer by its whole name."""
    peft = pytest.importorskip("peft")
    start = transformers.LlamaForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(start, config)
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["classifier", "score"]
    batch, rows = batch_of(dpo_jax.load_tokenizer(base))
    np.testing.assert_allclose(ours(tmp_path / "adapter", batch), theirs(model, rows, 0), atol=1e-4)


def test_heads_on_a_mesh(published):
    mesh = dpo_jax.make_mesh(2, 2, 2)
    model, variables = dpo_jax.load_pretrained(published, mesh=mesh)
    kernel = variables["heads"]["score"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 1)
    assert kernel.dtype == jnp.float32
    assert dpo_jax.load_pretrained(published, dtype=jnp.bfloat16)[1]["heads"]["score"]["kernel"].dtype == jnp.float32
    assert model.config.num_labels == 1


def test_a_reward_model_writes_no_texts(published):
    model, variables = dpo_jax.load_pretrained(published)
    with pytest.raises(InputError, match="is a reward model: it scores texts"):
        model.apply(variables, jnp.ones((1, 32)), method="logits")


def _changed(folder, path, **values):
    shutil.copytree(folder, path)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, **values}))
    return path


def test_what_is_refused(published, base, tmp_path):
    with pytest.raises(InputError, match=r"a classifier with 3 labels; a reward model has one"):
        dpo_jax.load_pretrained(_changed(published, tmp_path / "three", id2label={"0": "a", "1": "b", "2": "c"}))
    headless = _changed(base, tmp_path / "headless", architectures=["LlamaForSequenceClassification"], num_labels=1)
    with pytest.raises(InputError, match=r"says reward model, and the weights have no score.weight"):
        dpo_jax.load_pretrained(headless)
    with pytest.raises(InputError, match=r"reward model, which is converted to --format huggingface only"):
        convert(published, tmp_path / "orbax", to="orbax")
    (tmp_path / "odd").mkdir()
    shutil.copytree(published, tmp_path / "odd", dirs_exist_ok=True)
    from safetensors.numpy import save_file

    save_file({"harm.weight": np.ones((3, 31), np.float32)}, tmp_path / "odd" / "heads.safetensors")
    with pytest.raises(InputError, match=r"heads.safetensors: tensor harm.weight \(3, 31\) is not a head"):
        dpo_jax.load_pretrained(tmp_path / "odd")
    assert open_checkpoint(tmp_path / "odd").classes == open_checkpoint(published).classes == ()
    for told in ("[1]", "{", '{"harm": {}}', '{"harm": {"classes": ["x"], "overlapping": true}}'):
        metadata = {"classes": told}
        save_file({"harm.weight": np.ones((3, 32), np.float32)}, tmp_path / "odd" / "heads.safetensors", metadata)
        with pytest.raises(InputError, match="what its header says of classes does not fit its heads"):
            _ = open_checkpoint(tmp_path / "odd").classes


def test_a_tokenizer_without_a_token_to_spare(published, tmp_path):
    model, variables = dpo_jax.load_pretrained(published)
    model = model.clone(config=dataclasses.replace(model.config, pad_token_id=None))
    tokenizer = dpo_jax.load_tokenizer(published)
    tokenizer.chat_template = "<|endoftext|><|im_start|><|im_end|>"
    with pytest.raises(InputError, match="no special token but those that end an answer"):
        dpo_jax.save_pretrained(tmp_path / "rm", model, variables, tokenizer)


def test_the_pad_token_has_a_row_and_ends_no_text(published):
    """A pad token behind the embedding, and a turn end that was added as an ordinary token, are passed over."""
    config = dpo_jax.load_pretrained(published)[0].config
    beyond = tiny.tokenizer()
    beyond.add_special_tokens({"pad_token": "<pad>"})
    assert beyond.pad_token_id >= config.vocab_size
    chosen, changed = padded_apart(dataclasses.replace(config, pad_token_id=beyond.pad_token_id), beyond)
    assert chosen.pad_token_id == changed.pad_token_id == 0
    ordinary = tiny.tokenizer()
    ordinary.add_tokens(["<end>"])
    ordinary.chat_template = "{{ messages[0]['content'] }}<end>"
    end = ordinary.convert_tokens_to_ids("<end>")
    wide = dataclasses.replace(config, vocab_size=end + 1, pad_token_id=end)
    assert padded_apart(wide, ordinary)[0].pad_token_id != end
