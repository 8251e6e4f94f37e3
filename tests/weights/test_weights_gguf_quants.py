"""Every quantised type of GGUF that is read, against a decoder written from the format's definition; the usual mixes.

The blocks hold random bits under sane scales, so that every bit of a block matters. The decoders follow ggml's
`block_*` structures one value at a time.
"""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf.constants import GGML_QUANT_SIZES
from safetensors.numpy import load_file

import dpo_jax
from dpo_jax.errors import InputError
from dpo_jax.weights.convert import convert
from dpo_jax.weights.gguf import tensors as files

WIDTH, HEADS, HEAD, VOCAB = 256, 2, 128, 48
SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (HEAD, WIDTH),
    "attn_v": (HEAD, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (WIDTH, WIDTH),
    "ffn_up": (WIDTH, WIDTH),
    "ffn_down": (WIDTH, WIDTH),
}
# Where the float16 scales of a block stand.
SCALES = {Q.Q5_0: (0,), Q.Q5_1: (0, 2), Q.Q2_K: (80, 82), Q.Q3_K: (108,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2)}
SCALES |= {Q.Q6_K: (208,), Q.IQ4_NL: (0,), Q.IQ4_XS: (0,), Q.Q4_0: (0,), Q.Q8_0: (0,), Q.IQ3_XXS: (0,)}
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def blocks(rows: int, columns: int, kind: Q, rng: np.random.Generator) -> np.ndarray:
    """uint8 [rows, bytes of a row]: random blocks."""
    block, size = GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows * columns // block, size), np.uint8)
    for at in SCALES[kind]:
        scale = rng.uniform(0.001, 0.01, len(raw)).astype(np.float16)
        raw[:, at : at + 2] = scale[:, None].view(np.uint8)
    return raw.reshape(rows, -1)


def half(raw: bytes) -> float:
    return float(np.frombuffer(raw, np.float16)[0])


def decode(b: bytes, kind: Q) -> Iterator[float]:
    """The values of one block, in order."""
    if kind in (Q.Q5_0, Q.Q5_1):
        d, m = half(b[:2]), half(b[2:4]) if kind == Q.Q5_1 else -16 * half(b[:2])
        b = b[4:] if kind == Q.Q5_1 else b[2:]
        high, low = int.from_bytes(b[:4], "little"), b[4:]
        nibbles = [q & 15 for q in low] + [q >> 4 for q in low]
        yield from (d * (q | (high >> i & 1) << 4) + m for i, q in enumerate(nibbles))
    elif kind == Q.Q2_K:
        scales, qs, d, m = b[:16], b[16:80], half(b[80:82]), half(b[82:84])
        for i in range(256):
            part, rest = divmod(i, 128)
            shift, place = divmod(rest, 32)
            scale = scales[i // 16]
            yield d * (scale & 15) * (qs[32 * part + place] >> 2 * shift & 3) - m * (scale >> 4)
    elif kind == Q.Q3_K:
        mask, qs, scales, d = b[:32], b[32:96], b[96:108], half(b[108:110])
        for i in range(256):
            part, rest = divmod(i, 128)
            shift, place = divmod(rest, 32)
            s = i // 16
            low = scales[s] & 15 if s < 8 else scales[s - 8] >> 4
            scale = (low | (scales[8 + s % 4] >> 2 * (s // 4) & 3) << 4) - 32
            set_ = mask[place] >> (4 * part + shift) & 1
            yield d * scale * ((qs[32 * part + place] >> 2 * shift & 3) - (0 if set_ else 4))
    elif kind in (Q.Q4_K, Q.Q5_K):
        d, m, s = half(b[:2]), half(b[2:4]), b[4:16]
        high, qs = (b[16:48], b[48:]) if kind == Q.Q5_K else (bytes(32), b[16:])
        for i in range(256):
            j, place = divmod(i, 32)
            scale = s[j] & 63 if j < 4 else s[j + 4] & 15 | s[j - 4] >> 6 << 4
            least = s[j + 4] & 63 if j < 4 else s[j + 4] >> 4 | s[j] >> 6 << 4
            q = qs[32 * (j // 2) + place] >> 4 * (j % 2) & 15 | (high[place] >> j & 1) << 4
            yield d * scale * q - m * least
    elif kind == Q.Q6_K:
        low, high, scales, d = b[:128], b[128:192], np.frombuffer(b[192:208], np.int8).tolist(), half(b[208:])
        for i in range(256):
            part, rest = divmod(i, 128)
            quarter, place = divmod(rest, 32)
            nibble = low[64 * part + 32 * (quarter % 2) + place] >> 4 * (quarter // 2) & 15
            q = (nibble | (high[32 * part + place] >> 2 * quarter & 3) << 4) - 32
            yield d * scales[i // 16] * q
    elif kind == Q.IQ4_NL:
        yield from (half(b[:2]) * LEVELS[q] for q in [q & 15 for q in b[2:]] + [q >> 4 for q in b[2:]])
    elif kind == Q.IQ4_XS:
        d, high, low, qs = half(b[:2]), int.from_bytes(b[2:4], "little"), b[4:8], b[8:]
        for i in range(256):
            j, place = divmod(i, 32)
            scale = (low[j // 2] >> 4 * (j % 2) & 15 | (high >> 2 * j & 3) << 4) - 32
            yield d * scale * LEVELS[qs[16 * j + place % 16] >> 4 * (place // 16) & 15]
    else:
        raise AssertionError(kind)


def by_hand(raw: np.ndarray, kind: Q) -> np.ndarray:
    size = GGML_QUANT_SIZES[kind][1]
    return np.asarray(
        [[v for at in range(0, len(row), size) for v in decode(row[at : at + size].tobytes(), kind)] for row in raw]
    )


def write(path: Path, kind: Q, **kinds: Q) -> dict[str, np.ndarray]:
    """A GGUF file of random blocks of `kind`, some tensors of other `kinds`. Returns the blocks."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, WIDTH),
        (writer.add_feed_forward_length, WIDTH),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)
    shapes = {f"blk.0.{name}": shape for name, shape in SHAPES.items()}
    shapes |= {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH)}
    stored = {}
    for name, shape in shapes.items():
        own = kinds.get(name.removeprefix("blk.0."), kind)
        stored[name] = blocks(*shape, own, rng)
        writer.add_tensor(f"{name}.weight", stored[name], raw_dtype=own)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize(
    "kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.Q5_0, Q.Q5_1, Q.IQ4_NL, Q.IQ4_XS], ids=lambda kind: kind.name
)
def test_every_type_equals_its_decoding_by_hand(tmp_path: Path, kind: Q) -> None:
    stored = write(tmp_path / "m.gguf", kind)
    config, tensors = files.open_file(tmp_path / "m.gguf")
    assert config.head_dim == HEAD
    some = (slice(3, 9, 1), slice(0, WIDTH, 1))
    expected = by_hand(stored["blk.0.ffn_up"][3:9], kind)
    found = tensors.read("model.layers.0.mlp.up_proj.weight", some)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    # A part of the columns begins within a block; rows of q lie interleaved.
    part = tensors.read("model.layers.0.mlp.up_proj.weight", (slice(3, 9, 1), slice(40, 200, 1)))
    np.testing.assert_array_equal(part, found[:, 40:200])
    rows = [HEAD + 2 * i for i in range(3, 6)]
    found = tensors.read("model.layers.0.self_attn.q_proj.weight", (slice(HEAD + 3, HEAD + 6, 1), slice(0, WIDTH, 1)))
    expected = by_hand(stored["blk.0.attn_q"][rows], kind)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


MIXES = {
    "Q4_K_M": (Q.Q4_K, {"attn_v": Q.Q6_K, "ffn_down": Q.Q6_K, "output": Q.Q6_K}),
    "Q5_K_M": (Q.Q5_K, {"attn_v": Q.Q6_K, "ffn_down": Q.Q6_K, "output": Q.Q6_K}),
    "Q6_K": (Q.Q6_K, {}),
    "Q3_K_M": (Q.Q3_K, {"attn_v": Q.Q5_K, "ffn_down": Q.Q4_K, "output": Q.Q6_K}),
    "Q4_0": (Q.Q4_0, {"output": Q.Q6_K}),
    "Q8_0": (Q.Q8_0, {}),
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_of_types_load_and_convert(tmp_path: Path, mix: str) -> None:
    kind, kinds = MIXES[mix]
    stored = write(tmp_path / "m.gguf", kind, **kinds)
    _, variables = dpo_jax.load_pretrained(tmp_path / "m.gguf")
    head = gguf.dequantize(stored["output"], kinds.get("output", kind))
    np.testing.assert_array_equal(variables["params"]["lm_head"]["kernel"], head.T)
    down = gguf.dequantize(stored["blk.0.ffn_down"], kinds.get("ffn_down", kind))
    np.testing.assert_array_equal(variables["params"]["layers"]["mlp"]["down_proj"]["kernel"][0], down.T)
    model, _ = dpo_jax.load_pretrained(tmp_path / "m.gguf")
    dpo_jax.save_pretrained(tmp_path / "out", model, variables, None)
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].tobytes() == head.tobytes()


def test_what_has_no_checked_decoder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Q.Q4_K, output=Q.IQ3_XXS)
    with pytest.raises(InputError, match=r"output\.weight is stored as IQ3_XXS; supported are F32"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
