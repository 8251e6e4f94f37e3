"""Tokenizer folders as the world publishes them, one of each kind, and a corpus on which their ids are compared.

    python tests/support/tokenizer_kinds.py LLAMA2.tokenizer.model OUT    2,000 texts each

compares `load_tokenizer` with the `tokenizers` library on the file itself, and writes to OUT each tokenizer as it is
exported (OUT/KIND) with the ids that it must give (OUT/KIND.json), for `exported_ids.py`.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from dpo_jax.weights.gguf.tokenizer import _LLAMA3
from dpo_jax.weights.pieces import NORMAL, SPACE, read_pieces
from dpo_jax.weights.tokenizers.folder_tokenizer import read_tokenizer
from dpo_jax.weights.tokenizers.sentencepiece_bpe import merges_by_score
from dpo_jax.weights.tokenizers.tokenizer_files import save_tokenizer

_QWEN = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_WORDS = (
    "the film is not very good 12 345 6789 Hello, can't WE'RE déjà straße __init__ x=1; 你好 世界 诗 經 русский".split()
)
_MARKS = "🙂 👩‍👩‍👧 ▁ <0x0A> [INST] [/INST] é".split()
_FRAGMENTS = [*_WORDS, *_MARKS, *(" ", " ", "  ", "   ", "\n", "\n\n", "\t", "\u00a0")]
_CONTROL = "<s> </s> <unk> <|im_start|> <|im_end|> <|endoftext|> <|begin_of_text|> <|eot_id|>".split()
_FIXED = ["<s>[INST]", "<s> [INST] a [/INST] b </s>", "</s>a", "</s> a", "a</s>\n<|user|>\nb"]
_FIXED += ["", " ", "  a", "a  ", "\n"]


def corpus(size: int) -> list[str]:
    """Texts of control tokens, spaces, digits, emoji, Chinese, newlines: some fixed ones, then random ones."""
    rng = random.Random(0)

    def text() -> str:
        parts = rng.choices(_FRAGMENTS, k=rng.randint(1, 12)) + rng.choices(_CONTROL, k=rng.choice((0, 0, 1, 2)))
        rng.shuffle(parts)
        return rng.choice(("", " ")).join(parts)

    return [*_FIXED, *(text() for _ in range(size - len(_FIXED)))]


# ---------------------------------------------------------------- SentencePiece, as tokenizer.json


def _add(tokenizer: Tokenizer, tokens: tuple[str, ...], **flags: Any) -> None:
    tokenizer.add_special_tokens([AddedToken(token, **{"normalized": False, **flags}) for token in tokens])


def _bos(tokenizer: Tokenizer, bos: str) -> processors.TemplateProcessing:
    ids = [(bos, tokenizer.token_to_id(bos))]
    return processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos}:1 $B:1", ids)


def _pieces(model: Path, *, metaspace: bool = False) -> Tokenizer:
    pieces = read_pieces(str(model))
    merges = merges_by_score(pieces.ids, {p.piece: p.score for p in pieces.proto.pieces if p.type == NORMAL})
    backend = Tokenizer(models.BPE(pieces.ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = _bos(backend, "<s>")
    return backend


_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}


def _llama2(model: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Llama 2: LlamaTokenizer, legacy, no pre-tokenizer."""
    backend = _pieces(model)
    _add(backend, ("<unk>", "<s>", "</s>"))
    return backend, {**_LLAMA, "tokenizer_class": "LlamaTokenizer", "legacy": True}


def _tinyllama(model: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """TinyLlama: the same pipeline, not legacy, padded with EOS."""
    backend, settings = _llama2(model)
    named = {
        str(i): {"content": t, "lstrip": False, "rstrip": False, "normalized": True, "special": True}
        for i, t in enumerate(("<unk>", "<s>", "</s>"))
    }
    more = {"legacy": False, "pad_token": "</s>", "padding_side": "right", "added_tokens_decoder": named}
    template = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    return backend, {**settings, **more, "sp_model_kwargs": {}, "chat_template": template}


def _mistral(model: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Mistral v3: Metaspace, its instruction marks control tokens."""
    backend = _pieces(model, metaspace=True)
    _add(backend, ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"))
    return backend, {**_LLAMA, "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": True}


# ---------------------------------------------------------------- byte-level


def _byte_level(steps: list[Any], specials: tuple[str, ...], **options: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE(**options))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    rng = random.Random(1)
    backend.train_from_iterator([" ".join(rng.choices(_WORDS, k=30)) for _ in range(100)], trainer)
    _add(backend, specials)
    return backend


def _split(pattern: str) -> list[Any]:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def _llama3(_: Path | None) -> tuple[Tokenizer, dict[str, Any]]:
    """Llama 3: split by a pattern, BOS put by the post-processor."""
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    backend = _byte_level(_split(_LLAMA3), special, ignore_merges=True)
    ends = [processors.ByteLevel(trim_offsets=True), _bos(backend, special[0])]
    backend.post_processor = processors.Sequence(ends)
    names = {"bos_token": special[0], "eos_token": special[4]}
    return backend, {**names, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}


def _smollm2(_: Path | None) -> tuple[Tokenizer, dict[str, Any]]:
    """SmolLM2: digits apart, no BOS, and one token that stands in tokenizer_config.json alone."""
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend = _byte_level(steps, special)
    names = {"bos_token": special[1], "eos_token": special[2], "pad_token": "<|pad|>", "unk_token": special[0]}
    return backend, {**names, "tokenizer_class": "GPT2Tokenizer", "additional_special_tokens": list(special[1:])}


def _qwen(_: Path | None) -> tuple[Tokenizer, dict[str, Any]]:
    """Qwen 2: normalised, every digit apart, EOS by the class; further special tokens as version 5 lists them."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|box_start|>")
    backend = _byte_level(_split(_QWEN), special)
    backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend, {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "extra_special_tokens": [special[3]]}


def _gpt2(_: Path | None) -> tuple[Tokenizer, dict[str, Any]]:
    """GPT-2's pipeline alone, with a space before the text, of which tokenizer_config.json does not speak."""
    backend = _byte_level([pre_tokenizers.ByteLevel(add_prefix_space=True)], ("<|endoftext|>",))
    return backend, {"tokenizer_class": "GPT2Tokenizer"}


PIECES: dict[str, Callable[[Path], tuple[Tokenizer, dict[str, Any]]]] = {
    "llama2": _llama2,
    "tinyllama": _tinyllama,
    "mistral": _mistral,
}
BYTE_LEVEL: dict[str, Callable[[Path | None], tuple[Tokenizer, dict[str, Any]]]] = {
    "llama3": _llama3,
    "smollm2": _smollm2,
    "qwen": _qwen,
    "gpt2": _gpt2,
}


def write(folder: Path, kind: str, model: Path | None) -> Path:
    """A folder with the tokenizer files of `kind`; `model` is Llama 2's SentencePiece file, for `PIECES`."""
    backend, settings = (PIECES | BYTE_LEVEL)[kind](model)  # type: ignore[operator]
    folder.mkdir(parents=True, exist_ok=True)
    raw = json.loads(backend.to_str())
    # As older versions of `tokenizers` wrote them: a copy can be told from what is written anew.
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ids_of_file(folder: Path, texts: list[str]) -> list[list[int]]:
    """What the `tokenizers` library makes of texts with a folder's tokenizer.json."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [encoding.ids for encoding in backend.encode_batch(texts)]


def main(model: str, out: str) -> int:
    """See the module; returns 1 where ids differ."""
    import transformers

    texts, different = corpus(2000), 0
    for kind in PIECES | BYTE_LEVEL:
        original = write(Path(out) / "original" / kind, kind, Path(model))
        expected, exported = ids_of_file(original, texts), Path(out) / kind
        tokenizer = read_tokenizer(original)
        ours = tokenizer(texts)["input_ids"]
        exported.mkdir(exist_ok=True)
        # What transformers looks at to choose a class, beside tokenizer_config.json.
        of_model = {"model_type": "mistral" if kind == "mistral" else "llama"}
        (exported / "config.json").write_text(json.dumps(of_model))
        save_tokenizer(tokenizer, exported)
        again = read_tokenizer(exported)(texts)["input_ids"]
        names = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        told = {"texts": texts, "ids": expected, "names": names, "chat_template": tokenizer.chat_template}
        (Path(out) / f"{kind}.json").write_text(json.dumps(told))
        same, then = (sum(a == b for a, b in zip(found, expected, strict=True)) for found in (ours, again))
        different += 2 * len(texts) - same - then
        print(f"{kind}: {same} of {len(texts)} texts have the file's ids, {then} after export")
    print("transformers", transformers.__version__)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
