"""GGUF in: dequantisation by hand, the order of q and k, the configuration, the tokenizer, and damage."""

import io
import json
import random
from pathlib import Path
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType as Q
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import dpo_jax
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import RopeScaling
from dpo_jax.model.rope import rotary_frequencies

LAYERS, WIDTH, HEADS, KV, HEAD, FORWARD, VOCAB = 2, 64, 2, 1, 32, 96, 64
BIASES = {"q": HEADS * HEAD, "k": KV * HEAD, "v": KV * HEAD}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def folder(path: Path, **changes: Any) -> Path:
    sizes = {"layers": LAYERS, "hidden": WIDTH, "heads": HEADS, "kv_heads": KV, "vocab": 320}
    return tiny.folder(path, **{**sizes, **changes})


def gguf_name(name: str) -> str:
    plain = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, leaf = name.rsplit(".", 1)
    if stem in plain:
        return f"{plain[stem]}.{leaf}"
    layer, module = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[module]}.{leaf}"


def interleave(weight: np.ndarray, head: int) -> np.ndarray:
    """As llama.cpp's converter: in each head, row j * head / 2 + i goes to 2 i + j."""
    rows = weight.reshape(-1, 2, head // 2, *weight.shape[1:]).swapaxes(1, 2)
    return rows.reshape(weight.shape)


def write(source: Path, path: Path, kind: Q = Q.F32, *, drop: tuple[str, ...] = (), **extra: Any) -> None:
    """Write a Hugging Face folder as GGUF, its matrices as `kind`. extra: `arch`, `metadata`, more `tensors`."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(path, extra.pop("arch", "llama"))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    for key, value in extra.pop("metadata", {}).items():
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}
        writer.add_array(key, value) if isinstance(value, list) else add[type(value)](key, value)
    for name, weight in load_file(source / "model.safetensors").items():
        own = kind if weight.ndim == 2 else Q.F32
        stored = interleave(weight, config["head_dim"]) if "q_proj" in name or "k_proj" in name else weight
        data = gguf.quantize(np.ascontiguousarray(stored), own)
        if gguf_name(name) not in drop:
            writer.add_tensor(gguf_name(name), data, raw_dtype=own)
    for name, value in extra.pop("tensors", {}).items():
        writer.add_tensor(name, value)
    assert not extra
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def by_hand(data: np.ndarray, kind: Q, shape: tuple[int, ...]) -> np.ndarray:
    """Dequantise block by block from the format's definition: 32 values a block, a float16 scale d (and offset m)."""
    raw = data.tobytes()
    if kind in (Q.F32, Q.F16, Q.BF16):
        plain = {Q.F32: np.float32, Q.F16: np.float16, Q.BF16: ml_dtypes.bfloat16}[kind]
        return np.frombuffer(raw, plain).astype(np.float32).reshape(shape)
    values: list[float] = []
    size = {Q.Q8_0: 34, Q.Q4_0: 18, Q.Q4_1: 20}[kind]
    for start in range(0, len(raw), size):
        block = raw[start : start + size]
        d = float(np.frombuffer(block[:2], np.float16)[0])
        if kind == Q.Q8_0:
            values += [d * q for q in np.frombuffer(block[2:], np.int8).tolist()]
            continue
        m = float(np.frombuffer(block[2:4], np.float16)[0]) if kind == Q.Q4_1 else -8 * d
        nibbles = block[4:] if kind == Q.Q4_1 else block[2:]
        values += [d * (byte & 15) + m for byte in nibbles] + [d * (byte >> 4) + m for byte in nibbles]
    return np.asarray(values, np.float32).reshape(shape)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("gguf") / "hf")


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1])
def test_every_weight_equals_its_dequantisation_by_hand(source: Path, tmp_path: Path, kind: Q) -> None:
    write(source, tmp_path / "m.gguf", kind)
    model, variables = dpo_jax.load_pretrained(tmp_path / "m.gguf")
    dpo_jax.save_pretrained(tmp_path / "out", model, variables, None)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(source / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, value in original.items():
        own = kind if value.ndim == 2 else Q.F32
        expected = by_hand(gguf.quantize(value, own), own, value.shape)
        np.testing.assert_allclose(saved[name], expected, rtol=2e-7, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("kind", [Q.F16, Q.Q4_1])
def test_a_mesh_gets_the_same_numbers(source: Path, tmp_path: Path, kind: Q) -> None:
    write(source, tmp_path / "m.gguf", kind)
    _, whole = dpo_jax.load_pretrained(tmp_path / "m.gguf")
    _, split = dpo_jax.load_pretrained(tmp_path / "m.gguf", mesh=dpo_jax.make_mesh(data=1, fsdp=8, tensor=1))
    jax.tree.map(np.testing.assert_array_equal, whole, split)


@pytest.mark.parametrize("tied", [True, False])
def test_the_configuration(tmp_path: Path, tied: bool) -> None:
    hf = folder(tmp_path / "hf", tied=tied)
    write(hf, tmp_path / "m.gguf", metadata={"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 1})
    config = dpo_jax.load_pretrained(tmp_path / "m.gguf")[0].config
    expected = dpo_jax.load_pretrained(hf)[0].config
    assert config.eos_token_ids == (2, 1)
    assert config.rms_norm_eps == 1e-5
    for (
        name
    ) in "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim rope_theta".split():
        assert getattr(config, name) == getattr(expected, name)
    assert config.tie_embeddings == tied


def llama3_factors(theta: float, factor: float) -> np.ndarray:
    """The divisors that llama.cpp's converter writes for Llama 3.1."""
    plain = rotary_frequencies(HEAD, theta, None)
    scaled = rotary_frequencies(HEAD, theta, RopeScaling("llama3", factor, 1.0, 4.0, 8192))
    return (plain / scaled).astype(np.float32)


def test_llama3_rope_factors_give_back_the_scaling(source: Path, tmp_path: Path) -> None:
    for factor in (8.0, 32.0):
        factors = llama3_factors(500_000.0, factor)
        changed = Path(tmp_path / str(factor))
        changed.mkdir()
        config = json.loads((source / "config.json").read_text()) | {"rope_theta": 500_000.0}
        (changed / "config.json").write_text(json.dumps(config))
        (changed / "model.safetensors").symlink_to(source / "model.safetensors")
        write(changed, tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors})
        config = dpo_jax.load_pretrained(tmp_path / "m.gguf")[0].config
        assert config.rope_theta == 500_000.0
        assert config.rope_scaling is not None
        assert config.rope_scaling.kind == "llama3"
        assert config.rope_scaling.factor == pytest.approx(factor, rel=1e-6)
        odd = factors.copy()
        odd[len(odd) // 2] *= 1.01
        write(changed, tmp_path / "m.gguf", tensors={"rope_freqs.weight": odd})
        with pytest.raises(InputError, match=r"rope_freqs\.weight are not those of Llama 3\.1"):
            dpo_jax.load_pretrained(tmp_path / "m.gguf")


def test_linear_rope_scaling(source: Path, tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write(source, tmp_path / "m.gguf", metadata=metadata)
    assert dpo_jax.load_pretrained(tmp_path / "m.gguf")[0].config.rope_scaling == RopeScaling("linear", 4.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"arch": "falcon"},
            "architecture 'falcon' is not supported; read are llama, qwen2, qwen3, smollm3, phi3, gemma, gemma2",
        ),
        (
            {"tensors": {f"blk.{i}.attn_{x}.bias": np.ones(n, np.float32) for i in (0, 1) for x, n in BIASES.items()}},
            r"biases of attn_q, attn_k, attn_v alone are not supported in a file of architecture llama",
        ),
        ({"drop": ("blk.1.ffn_up.weight",)}, r"tensor missing: model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"drop": ("token_embd.weight",)}, r"token_embd\.weight is missing"),
        ({"tensors": {"blk.0.attn_sinks.weight": np.ones(2, np.float32)}}, r"unknown tensor: blk\.0\.attn_sinks"),
        ({"metadata": {"llama.expert_count": 8}}, r"llama\.expert_count = 8 is not supported"),
        ({"metadata": {"llama.logit_scale": 0.5}}, r"llama\.logit_scale = 0\.5 is not supported"),
        ({"metadata": {"llama.rope.dimension_count": 16}}, r"rope\.dimension_count = 16 differs from the head size 32"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "RoPE scaling 'longrope' is not supported"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"rope\.scaling\.factor is missing"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    source: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    write(source, tmp_path / "m.gguf", **options)
    with pytest.raises(InputError, match=message) as error:
        dpo_jax.load_pretrained(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in str(error.value)


def test_damaged_files_are_refused(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "whole.gguf", Q.Q8_0)
    data = (tmp_path / "whole.gguf").read_bytes()
    rng = random.Random(0)
    cuts = [0, 3, 4, 12, 24, 40, 100, 500, 1000, 3000, len(data) // 2, len(data) - 1]
    pieces = [data[:cut] for cut in cuts] + [b"GGUF" + bytes(rng.randrange(256) for _ in range(400)), b"\0" * 4096]
    for i, piece in enumerate(pieces):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(piece)
        with pytest.raises(InputError, match=r"truncated"):
            dpo_jax.load_pretrained(path)
        with pytest.raises(InputError):
            dpo_jax.load_tokenizer(path)


def byte_level(cut: str) -> tuple[dict[str, Any], Tokenizer]:
    """GGUF metadata of a small byte-level BPE, and the same tokenizer made by the `tokenizers` library alone."""
    digits = [pre_tokenizers.Digits(individual_digits=True)] if cut == "smollm" else []
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(0)
    backend.train_from_iterator([tiny.sentence(rng, 30) + "\n\n12345 déjà vu" for _ in range(40)], trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": cut,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": tiny.TEMPLATE,
    }
    return metadata, backend


TEXTS = [
    "the good film", "  two  spaces ", "a\n\n1. list\n2. list", "12345 67", "déjà vu 你好 🙂\t\x00", "don't we'll",
    "", " ", "</s>middle<s> <pad>", "\n\n\n", "x" * 50,
]  # fmt: skip


@pytest.mark.parametrize("cut", ["smollm", "gpt-2"])
def test_byte_level_tokenizer(source: Path, tmp_path: Path, cut: str) -> None:
    metadata, backend = byte_level(cut)
    write(source, tmp_path / "m.gguf", metadata=metadata)
    tokenizer = dpo_jax.load_tokenizer(tmp_path / "m.gguf")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == backend.encode(text).ids, text
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.chat_template == tiny.TEMPLATE
    assert tokenizer.all_special_ids == [0, 1, 2]


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_is_added_as_the_file_says(source: Path, tmp_path: Path, add_bos: bool) -> None:
    metadata, backend = byte_level("gpt-2")
    write(source, tmp_path / "m.gguf", metadata=metadata | {"tokenizer.ggml.add_bos_token": add_bos})
    tokenizer = dpo_jax.load_tokenizer(tmp_path / "m.gguf")
    plain = backend.encode("good film").ids
    assert tokenizer("good film")["input_ids"] == [0] * add_bos + plain
    assert tokenizer("good film", add_special_tokens=False)["input_ids"] == plain


def test_llama3_cuts_as_tiktoken_does(source: Path, tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from dpo_jax.weights.gguf.tokenizer import _LLAMA3

    metadata, _ = byte_level("gpt-2")
    back = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokens = metadata["tokenizer.ggml.tokens"]
    ranks = {bytes(back[letter] for letter in token): rank for rank, token in enumerate(tokens[3:])}
    reference = tiktoken.Encoding("test", pat_str=_LLAMA3, mergeable_ranks=ranks, special_tokens={})
    write(source, tmp_path / "m.gguf", metadata=metadata | {"tokenizer.ggml.pre": "llama-bpe"})
    tokenizer = dpo_jax.load_tokenizer(tmp_path / "m.gguf")
    for text in TEXTS:
        if "<s>" not in text:
            assert tokenizer(text)["input_ids"] == [0] + [3 + rank for rank in reference.encode(text)], text


def test_sentencepiece_tokenizer(source: Path, tmp_path: Path) -> None:
    """The ids are those of the SentencePiece library itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    rng = random.Random(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([tiny.sentence(rng, 30) + " déjà 12345." for _ in range(200)]),
        model_writer=model,
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    count = pieces.get_piece_size()
    types = [
        2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1
        for i in range(count)
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in range(count)],
        "tokenizer.ggml.scores": [float(pieces.get_score(i)) for i in range(count)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    write(source, tmp_path / "m.gguf", metadata=metadata)
    tokenizer = dpo_jax.load_tokenizer(tmp_path / "m.gguf")
    letters = "".join(tiny.WORDS) + "  ▁éß1234\n🙂你"
    texts = [t for t in TEXTS if "<s>" not in t and t] + ["".join(rng.choices(letters, k=40)) for _ in range(300)]
    for text in texts:
        assert tokenizer(text)["input_ids"] == [1, *pieces.encode(text)], repr(text)
    assert tokenizer.decode(tokenizer("a good film", add_special_tokens=False)["input_ids"]) == "a good film"
    del metadata["tokenizer.ggml.scores"]
    write(source, tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.scores or token_type is missing"):
        dpo_jax.load_tokenizer(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer 't5' is not supported"),
        ({"tokenizer.ggml.eos_token_id": 100_000}, "eos_token_id 100000 is not a token"),
    ],
)
def test_tokenizers_that_might_be_wrong_are_refused(
    source: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    metadata, _ = byte_level("smollm")
    write(source, tmp_path / "m.gguf", metadata=metadata | change)
    with pytest.raises(InputError, match=message):
        dpo_jax.load_tokenizer(tmp_path / "m.gguf")
    write(source, tmp_path / "m.gguf")
    with pytest.raises(InputError, match="has no tokenizer"):
        dpo_jax.load_tokenizer(tmp_path / "m.gguf")
