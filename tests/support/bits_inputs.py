"""What the runs of `same_bits.py` read: tiny random models in several formats, and made-up rows of every kind.

Nothing of the package is imported: the same bytes come out beside any version of it.
"""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = (
    "the a good bad kind rude answer question film book was is very not quite we you they like hate red blue".split()
)
CHINESE = "学而时习之不亦说乎有朋自远方来不亦乐乎人不知而不愠不亦君子乎"
VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS = 320, 16, 2, 2, 1


def sentence(rng: random.Random, words: int) -> str:
    """Some of `WORDS`, in a random order."""
    return " ".join(rng.choice(WORDS) for _ in range(words))


def rows(path: Path, content: list[dict[str, Any]]) -> None:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `WORDS`, without a BOS, with ChatML as its template."""
    rng = random.Random(0)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([sentence(rng, 20) for _ in range(50)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=SPECIAL[2], pad_token=SPECIAL[0], clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHATML
    return fast


def config(vocabulary: int = VOCABULARY, **more: Any) -> dict[str, Any]:
    """config.json of a tiny Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH // HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        **more,
    }


def tensors(vocabulary: int = VOCABULARY, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under their Hugging Face names, large enough for log-probabilities far from even."""
    rng = np.random.default_rng(seed)

    def kernel(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.2).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(WIDTH)).astype(np.float32)

    kv = KV_HEADS * WIDTH // HEADS
    tree = {"model.embed_tokens.weight": kernel(vocabulary, WIDTH), "model.norm.weight": norm()}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        tree[at + "input_layernorm.weight"], tree[at + "post_attention_layernorm.weight"] = norm(), norm()
        for name, shape in {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (kv, WIDTH),
            "self_attn.v_proj": (kv, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (2 * WIDTH, WIDTH),
            "mlp.up_proj": (2 * WIDTH, WIDTH),
            "mlp.down_proj": (WIDTH, 2 * WIDTH),
        }.items():
            tree[f"{at}{name}.weight"] = kernel(*shape)
    return tree


def language_model(path: Path, seed: int = 0) -> None:
    """A Llama with tied embeddings, as a Hugging Face folder."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config(), indent=2))
    save_file(tensors(seed=seed), path / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(path)


def reward_model(path: Path) -> None:
    """A `LlamaForSequenceClassification` with one label."""
    path.mkdir()
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1}
    written = config(architectures=["LlamaForSequenceClassification"], tie_word_embeddings=False, **labels)
    (path / "config.json").write_text(json.dumps(written, indent=2))
    score = np.random.default_rng(9).standard_normal((1, WIDTH)).astype(np.float32)
    save_file(tensors(seed=1) | {"score.weight": score}, path / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(path)


def gguf_model(source: Path, path: Path) -> None:
    """The language model as a GGUF file with float32 tensors and its tokenizer."""
    import gguf

    told, writer = json.loads((source / "config.json").read_text()), gguf.GGUFWriter(path, "llama")
    writer.add_block_count(told["num_hidden_layers"])
    writer.add_context_length(told["max_position_embeddings"])
    writer.add_embedding_length(told["hidden_size"])
    writer.add_feed_forward_length(told["intermediate_size"])
    writer.add_head_count(told["num_attention_heads"])
    writer.add_head_count_kv(told["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(told["rms_norm_eps"])
    writer.add_rope_freq_base(told["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, told["num_hidden_layers"])
    for name, weight in tensors().items():
        if "q_proj" in name or "k_proj" in name:  # GGUF keeps the two halves of a head's rotation side by side
            heads = weight.shape[0] // told["head_dim"]
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", np.ascontiguousarray(weight))
    text = json.loads((source / "tokenizer.json").read_text())["model"]
    pieces = sorted(text["vocab"], key=text["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([gguf.TokenType.CONTROL if p in SPECIAL else gguf.TokenType.NORMAL for p in pieces])
    writer.add_token_merges([" ".join(merge) for merge in text["merges"]])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHATML)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sentencepiece_model(path: Path) -> None:
    """A Llama with a small SentencePiece tokenizer of its own, whose vocabulary can be extended."""
    path.mkdir()
    rng, written = random.Random(3), io.BytesIO()  # with a prefix it would hold the path
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter([sentence(rng, 12) for _ in range(200)]),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        num_threads=1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (path / "tokenizer.model").write_bytes(written.getvalue())
    told = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    told |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(told))
    (path / "config.json").write_text(json.dumps(config(bos_token_id=1, pad_token_id=None), indent=2))
    save_file(tensors(seed=4), path / "model.safetensors", metadata={"format": "pt"})


def build(folder: Path) -> None:
    """Write everything to `folder`, which is made."""
    folder.mkdir(parents=True)
    rng = random.Random(7)
    language_model(folder / "model")
    reward_model(folder / "rm")
    gguf_model(folder / "model", folder / "model.gguf")
    sentencepiece_model(folder / "spm")

    def pairs(count: int, **more: Any) -> list[dict[str, Any]]:
        return [
            {
                "prompt": f"{i}: {sentence(rng, rng.randint(2, 8))}",
                "chosen": sentence(rng, rng.randint(2, 8)) + " good",
                "rejected": sentence(rng, rng.randint(2, 8)) + " bad",
                **{name: pick(i) for name, pick in more.items()},
            }
            for i in range(count)
        ]

    grades = ("significantly better", "better", "slightly better", "negligibly better")
    rows(folder / "pairs.jsonl", pairs(16))
    rows(folder / "eval.jsonl", pairs(6, rating=lambda i: grades[i % 4], source=lambda i: f"s{i % 2}"))
    for name in ("rated", "safety"):
        labelled = pairs(16, rating=lambda i: grades[i % 4], labels=lambda _: {"safety": ["safe", "unsafe"]})
        rows(folder / f"{name}.jsonl", labelled)
    for name, count in (("prompts", 8), ("heldout", 6)):
        asked = [{"prompt": f"{name[0]}{i} {sentence(rng, 2)}", "safety": i % 2 == 1} for i in range(count)]
        rows(folder / f"{name}.jsonl", asked)
    turns = ("user", "assistant", "user", "assistant")
    rows(
        folder / "chat.jsonl",
        [{"messages": [{"role": who, "content": f"{i} {sentence(rng, 4)}"} for who in turns]} for i in range(12)],
    )
    rows(folder / "chat_eval.jsonl", [{"prompt": f"q{i}", "response": sentence(rng, 4)} for i in range(5)])
    rows(
        folder / "ranked.jsonl",
        [{"prompt": f"r{i}", "responses": [sentence(rng, 3) for _ in range(3)], "scores": [3, 1, 2]} for i in range(6)],
    )
    rows(
        folder / "instructions.jsonl",
        [
            {"instruction": "a good book", "check": "[aeiou]", "short": "good"},
            {"system_prompt": "be kind", "check": "keywords:good, bad, the, a, you"},
            {"instruction": "the film was red"},
        ],
    )
    (folder / "text.txt").write_text("\n\n".join(sentence(rng, rng.randint(20, 60)) for _ in range(20)) + "\n")
    mixed = ["".join(rng.choice(CHINESE) for _ in range(12)) + "。" + sentence(rng, 3) for _ in range(120)]
    rows(folder / "chinese.jsonl", [{"text": text} for text in mixed])
    rows(folder / "sums.jsonl", [{"prompt": f"s{i} {sentence(rng, 2)}", "answer": "ae"[i % 2]} for i in range(12)])
    asked = [
        ("writing", ["write of a film", "and a book"]),
        ("roleplay", ["the red one", "the blue"]),
        ("stem", ["hate?"]),
    ]
    rows(
        folder / "question.jsonl",
        [{"question_id": 81 + i, "category": name, "turns": turns} for i, (name, turns) in enumerate(asked)],
    )
    asked = [{"prompt": f"m{i} {sentence(rng, 2)}", "safety": i % 2 == 1} for i in range(24)]
    rows(folder / "more.jsonl", asked)
    judged = [
        {"question_id": 81 + i % 3, "model": "ab"[i % 2], "turn": 1 + i // 6, "score": 1 + i % 10}
        | {"judge": ["judge", "single-v1"], "user_prompt": "", "judgment": "", "tstamp": 0.0}
        for i in range(12)
    ]
    rows(folder / "judgment.jsonl", judged)
    (folder / "pool.yaml").write_text(
        f"- {{name: own, model: {folder / 'model'}, sample: {{max_new_tokens: 8, stop_strings: [a, e, i, o]}}}}\n"
        "- {name: other, responses: other.jsonl}\n"
    )
    (folder / "mine.py").write_text(
        "def letters(prompts, responses):\n    return [sum(c.islower() for c in text) / 6 for text in responses]\n"
        "def short(prompts, responses):\n    return [-len(text) / 6 for text in responses]\n"
    )
