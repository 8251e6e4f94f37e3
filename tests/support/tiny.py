"""A tiny random Llama in a Hugging Face folder, and a tiny preference file, for tests that need the real formats.

No torch and no `transformers` model is needed: the tensors are written straight to safetensors under their Hugging
Face names. The tokenizer is byte-level BPE without a BOS, with the ChatML template; its EOS is `<|im_end|>`.
"""

import json
import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpo_jax.model.architecture import LlamaConfig, to_hf

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TEXT = "the a good bad kind rude answer question film book was is very not quite we you they like hate red blue"
WORDS = _TEXT.split()


def sentence(rng: random.Random, words: int) -> str:
    """Some of `WORDS`, in a random order."""
    return " ".join(rng.choice(WORDS) for _ in range(words))


def tokenizer(vocab: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab` tokens (at least 259), trained on `WORDS`, with ChatML as its template."""
    rng = random.Random(0)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([sentence(rng, 20) for _ in range(50)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = TEMPLATE
    return fast


def tensors(config: LlamaConfig, seed: int = 0, scale: float = 0.1) -> dict[str, np.ndarray]:
    """Random float32 weights under their Hugging Face names; kernels are [out, in], as torch keeps them."""
    rng = np.random.default_rng(seed)

    def kernel(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    width, query, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tree = {"model.embed_tokens.weight": kernel(config.vocab_size, width), "model.norm.weight": norm(width)}
    for i in range(config.num_layers):
        at = f"model.layers.{i}."
        tree[at + "input_layernorm.weight"] = norm(width)
        tree[at + "post_attention_layernorm.weight"] = norm(width)
        for name, shape in {
            "self_attn.q_proj": (query, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, query),
            "mlp.gate_proj": (config.intermediate_size, width),
            "mlp.up_proj": (config.intermediate_size, width),
            "mlp.down_proj": (width, config.intermediate_size),
        }.items():
            tree[f"{at}{name}.weight"] = kernel(*shape)
    if not config.tie_embeddings:
        tree["lm_head.weight"] = kernel(config.vocab_size, width)
    return tree


def folder(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 320,
    tied: bool = True,
    max_position: int = 256,
    seed: int = 0,
) -> Path:
    """Write a random `LlamaForCausalLM` with its tokenizer to `path` (made if it is not there); return `path`."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    text = tokenizer(vocab)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_position=max_position,
        tie_embeddings=tied,
        eos_token_ids=(text.eos_token_id,),
        pad_token_id=text.pad_token_id,
    )
    (path / "config.json").write_text(json.dumps(to_hf(config), indent=2))
    save_file(tensors(config, seed), path / "model.safetensors", metadata={"format": "pt"})
    text.save_pretrained(path)
    return path


def preferences(path: Path, rows: int = 24, seed: int = 0) -> Path:
    """Write `rows` pairs of made-up text to the JSONL file `path`: prompt, chosen, rejected, of unequal lengths."""
    rng = random.Random(seed)
    lines = []
    for i in range(rows):
        good, bad = sentence(rng, rng.randint(2, 10)), sentence(rng, rng.randint(2, 10))
        row = {
            "prompt": f"{i}: {sentence(rng, rng.randint(3, 12))}",
            "chosen": good + " good",
            "rejected": bad + " bad",
        }
        lines.append(json.dumps(row))
    path = Path(path)
    path.write_text("\n".join(lines) + "\n")
    return path
