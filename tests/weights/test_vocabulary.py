"""`dpo-jax extend-vocab` with the real Llama 2 tokenizer: its pieces, its ids everywhere, the rows of the model."""

import gzip
import itertools
import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_weights_gguf import write as write_gguf
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_jax
from dpo_jax import cli
from dpo_jax.commands.extend_vocab import Texts, extend_vocab, is_held_out
from dpo_jax.config import ExtendVocabRun
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig, to_hf
from dpo_jax.weights import resize, vocabulary
from dpo_jax.weights.huggingface import shards
from dpo_jax.weights.opened import open_checkpoint
from dpo_jax.weights.pieces import NORMAL, ModelProto, Pieces, check_extends, read_pieces
from dpo_jax.weights.pieces_tokenizer import base_pieces, fast_tokenizer, own_tokenizer

OLD, NEW = 32_000, 8_000
ROOT = Path(__file__).resolve().parents[2]
extend = partial(vocabulary.extend, character_coverage=0.9995, max_sentence_length=4192)
EMBEDDING, HEAD = resize.GROWING


def llama(path: Path, tokenizer: Path | None, *, rows: int = OLD, tied: bool = False, kind: Any = np.float32) -> Path:
    """A random Llama of width 16 with `rows` rows, and a tokenizer.model beside it."""
    path.mkdir(parents=True)
    config = LlamaConfig(
        rows, 16, 32, 1, 2, 2, 8, max_position=64, tie_embeddings=tied, bos_token_id=1, eos_token_ids=(2,)
    )
    (path / "config.json").write_text(json.dumps(to_hf(config) | {"pretraining_tp": 1}))
    (path / "generation_config.json").write_text('{"temperature": 0.6}')
    weights = {key: value.astype(kind) for key, value in tiny.tensors(config).items()}
    save_file(weights, path / shards.SINGLE, metadata={"format": "pt"})
    if tokenizer is not None:
        shutil.copy(tokenizer, path / "tokenizer.model")
        (path / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "LlamaTokenizer",
                    "legacy": False,
                    "add_bos_token": True,
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                    "unk_token": "<unk>",
                    "model_max_length": 64,
                    "chat_template": "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
                }
            )
        )
    return path


@pytest.fixture(scope="module")
def llama2(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "llama2.tokenizer.model"


@pytest.fixture(scope="module")
def published(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "chinese_llama2.tokenizer.model"


@pytest.fixture(scope="module")
def classics(shared_data: Path) -> Path:
    return shared_data / "zh_classics" / "zh_classics.jsonl"


@pytest.fixture(scope="module")
def model(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base") / "model", llama2)


@pytest.fixture(scope="module")
def extended(model: Path, classics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of `model` and the classical texts."""
    target = tmp_path_factory.mktemp("extended") / "model"
    words = ["extend-vocab", "--model", model, "--to", target, "--data", classics, "--pieces", NEW]
    assert cli.main([str(word) for word in words]) == 0
    return target


def proto(path: Path) -> Any:
    found = ModelProto()
    found.ParseFromString(path.read_bytes())
    return found


def held_out(classics: Path) -> list[str]:
    rows = [json.loads(line)["text"] for line in classics.read_text().splitlines()]
    return [text for text in rows if is_held_out(text)]


@pytest.fixture(scope="module")
def english(shared_data: Path) -> list[str]:
    """Hundreds of texts without Chinese: dialogues, code, spaces of every kind."""
    texts = (shared_data / "dpo_en" / "pairs.jsonl").read_text().splitlines()
    texts += [json.loads(line)["conversations"][0]["value"] for line in texts]
    texts += [path.read_text() for path in sorted((ROOT / "dpo_jax").rglob("*.py"))[::3]]
    texts += [" " * n + tail for n in range(40) for tail in ("", "a", "\n  b", "\t")]
    texts += [
        "",
        "\r\n",
        "<0x0A>",
        "a<unk>b",
        "naïve café e\u0301",
        "한국어 日本語 кот",
        "１２３ ＡＢ",
        "😀👩‍👩‍👧",
        "x\u3000y",
    ]
    return [text for text in texts if not vocabulary.CHINESE.search(text)]


@pytest.fixture(scope="module")
def mixed(shared_data: Path, classics: Path) -> list[str]:
    """Hundreds of texts with Chinese in them, and some of random pieces."""
    texts = held_out(classics)
    for line in (shared_data / "oasst_zh" / "sft.jsonl").read_text().splitlines()[:200]:
        texts.append(line.encode().decode("unicode_escape") if "\\u" in line else line)
    rng = random.Random(0)
    parts = [
        " ",
        "  ",
        "\n",
        "\t",
        "\u3000",
        "a",
        " the",
        "中",
        "学而",
        "，",
        "。」",
        "😀",
        "é",
        "<0x0A>",
        "9",
        "𠮷",
        "（",
        "か",
    ]
    texts += ["".join(rng.choices(parts, k=rng.randint(1, 40))) for _ in range(300)]
    return [text.encode("utf-8", "ignore").decode() for text in texts]


# ---------------------------------------------------------------- pieces


def test_old_pieces_stay_as_they_are(extended: Path, llama2: Path) -> None:
    old, new = proto(llama2), proto(extended / "tokenizer.model")
    assert len(new.pieces) == OLD + NEW
    for i in range(OLD):
        before, after = old.pieces[i], new.pieces[i]
        assert (before.piece, before.type, before.score) == (after.piece, after.type, after.score), i
    assert old.normalizer_spec == new.normalizer_spec


def test_new_pieces_are_chinese_reachable_and_distinct(extended: Path) -> None:
    pieces = read_pieces(extended / "tokenizer.model")
    new = [p.piece for p in pieces.proto.pieces[OLD:]]
    assert all(vocabulary.CHINESE.fullmatch(piece) for piece in new)
    assert len(pieces.ids) == OLD + NEW
    assert {p.type for p in pieces.proto.pieces[OLD:]} == {NORMAL}
    assert sum(len(piece) > 1 for piece in new) > NEW // 3
    assert pieces.spell(new) == [[i] for i in range(OLD, OLD + NEW)]
    for piece in new:  # the parts come before the whole
        ids = pieces.ids
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        assert not cuts or any(max(ids.get(a, OLD + NEW), ids.get(b, OLD + NEW)) < ids[piece] for a, b in cuts), piece
    scores = [p.score for p in pieces.proto.pieces[OLD:]]
    assert all(a > b for a, b in itertools.pairwise(scores))


def test_chinese_takes_at_most_sixty_percent_of_the_tokens(extended: Path, llama2: Path, classics: Path) -> None:
    texts = held_out(classics)
    assert 300 < len(texts) < 600
    old, new = (SentencePieceProcessor(str(path)) for path in (llama2, extended / "tokenizer.model"))
    before, after = (sum(map(len, model.encode(texts))) for model in (old, new))
    assert after <= 0.6 * before
    assert after == pytest.approx(0.51 * before, rel=0.03)


def test_text_without_chinese_keeps_its_ids(extended: Path, llama2: Path, english: list[str]) -> None:
    assert len(english) > 300
    old, new = (SentencePieceProcessor(str(path)) for path in (llama2, extended / "tokenizer.model"))
    assert old.encode(english) == new.encode(english)


def test_text_comes_back(extended: Path, english: list[str], mixed: list[str]) -> None:
    model = SentencePieceProcessor(str(extended / "tokenizer.model"))
    texts = [text for text in (*english, *mixed) if "▁" not in text]
    assert model.decode(model.encode(texts)) == texts


def test_the_same_text_gives_the_same_pieces(classics: Path, llama2: Path) -> None:
    texts, base = held_out(classics), read_pieces(llama2)
    one = extend(texts, base, pieces=2600)
    again = extend(iter_twice(texts), base, pieces=2600)
    assert one.proto.SerializeToString(deterministic=True) == again.proto.SerializeToString(deterministic=True)
    # More pieces begin with the same ones.
    more = extend(texts, base, pieces=3000)
    assert [p.piece for p in more.proto.pieces[: len(one)]] == [p.piece for p in one.proto.pieces]


class iter_twice(list):  # type: ignore[type-arg]
    """Texts that come one at a time, as from a file."""

    def __iter__(self) -> Any:
        return (text for text in list.__iter__(self))


def test_coverage_and_length_of_runs(llama2: Path) -> None:
    base = read_pieces(llama2)
    texts = ["鑫鑫鑫鑫 english", "淼淼", "焱"]
    assert [p.piece for p in extend(texts, base, pieces=3, character_coverage=1).proto.pieces[OLD:]] == list("鑫淼焱")
    assert [p.piece for p in extend(texts, base, pieces=1, character_coverage=0.5).proto.pieces[OLD:]] == ["鑫"]
    with pytest.raises(InputError, match="the texts hold 3 characters that the tokenizer does not know"):
        extend(texts, base, pieces=2, character_coverage=1)
    whole = extend(["鑫淼焱垚" * 3], base, pieces=99, max_sentence_length=50)
    cut = extend(["鑫淼焱垚" * 3], base, pieces=99, max_sentence_length=4)
    assert max(len(p.piece) for p in whole.proto.pieces[OLD:]) == 12
    assert max(len(p.piece) for p in cut.proto.pieces[OLD:]) == 4
    check_extends(cut, base)


# ---------------------------------------------------------------- transformers


def test_transformers_gives_the_ids_of_sentencepiece(extended: Path, english: list[str], mixed: list[str]) -> None:
    texts = english + mixed
    assert len(texts) > 800
    expected = SentencePieceProcessor(str(extended / "tokenizer.model")).encode(texts)
    tokenizer = AutoTokenizer.from_pretrained(extended)
    names = [text for text in texts if any(name in text for name in ("<s>", "</s>", "<unk>"))]
    for text, ids in zip(texts, expected, strict=True):
        if text not in names:  # transformers takes the names of special tokens for the tokens
            assert tokenizer(text)["input_ids"] == [1, *ids], text[:60]
            assert tokenizer.decode(ids) == text or "▁" in text
    ours = dpo_jax.load_tokenizer(extended)
    assert all(ours(text)["input_ids"] == tokenizer(text)["input_ids"] for text in texts[::9])


def test_the_tokenizer_keeps_its_settings(extended: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(extended)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token is None
    assert len(tokenizer) == OLD + NEW
    assert tokenizer.model_max_length == 64
    assert tokenizer.apply_chat_template([{"role": "user", "content": "子曰"}], tokenize=False) == "[INST] 子曰 [/INST]"
    assert tokenizer("a</s>b")["input_ids"].count(2) == 1
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}


def test_a_tokenizer_json_keeps_its_rules(llama2: Path, tmp_path: Path) -> None:
    """Whatever stands around the model in the folder's tokenizer.json stays: here, no space before the text."""
    folder = llama(tmp_path / "model", llama2)
    fast = dpo_jax.load_tokenizer(folder)
    raw = json.loads(fast.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    raw |= {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, "pre_tokenizer": None}
    Tokenizer.from_str(json.dumps(raw)).save(str(folder / "tokenizer.json"))
    place, base = open_checkpoint(folder), read_pieces(llama2)
    longer = extend(["鑫鑫"], base, pieces=2)
    tokenizer = fast_tokenizer(longer, place, own_tokenizer(place))
    assert tokenizer("鑫鑫 a")["input_ids"] == [1, OLD + 1, *longer.spell([" a"])[0]]


def test_a_folder_without_a_tokenizer(llama2: Path, tmp_path: Path) -> None:
    folder = llama(tmp_path / "model", None)
    assert own_tokenizer(open_checkpoint(folder)) is None
    base = base_pieces(open_checkpoint(folder), None, str(llama2))
    tokenizer = fast_tokenizer(base, open_checkpoint(folder), None)
    assert tokenizer("Hello  world")["input_ids"] == [1, *base.processor.encode("Hello  world")]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    with pytest.raises(InputError, match="give the one that belongs to it with --base_tokenizer"):
        base_pieces(open_checkpoint(folder), None, None)


# ---------------------------------------------------------------- rows


def expected_rows(old: np.ndarray, base: Path, longer: Path) -> np.ndarray:
    """The rule in plain words: all the ids that the old tokenizer spells a Chinese piece with, but the first space."""
    model = SentencePieceProcessor(str(base))
    rows = []
    for piece in proto(longer).pieces[OLD:]:
        space, *ids = model.encode(piece.piece)
        assert model.id_to_piece(space) == "▁"
        rows.append(np.mean([old[i].astype(np.float64) for i in ids], axis=0))
    return np.asarray(rows).astype(old.dtype)


def test_new_rows_are_means_and_all_else_is_untouched(model: Path, extended: Path, llama2: Path) -> None:
    old, new = load_file(model / shards.SINGLE), load_file(extended / shards.SINGLE)
    assert old.keys() == new.keys()
    for key in old:
        assert new[key].dtype == old[key].dtype
        assert new[key][: len(old[key])].tobytes() == old[key].tobytes(), key
        if key in (EMBEDDING, HEAD):
            np.testing.assert_array_equal(new[key][OLD:], expected_rows(old[key], llama2, extended / "tokenizer.model"))
        else:
            assert new[key].shape == old[key].shape
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, extended))
    assert after.pop("vocab_size") == OLD + NEW
    assert after == {k: v for k, v in before.items() if k != "vocab_size"} | {"torch_dtype": "float32"}
    assert (extended / "generation_config.json").read_text() == (model / "generation_config.json").read_text()


def test_transformers_and_we_give_the_old_logits(model: Path, extended: Path) -> None:
    ids = np.array([[1, 29871, 15043, 31999, 2, 259]])
    tokens = torch.from_numpy(ids)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (model, extended))
    with torch.no_grad():
        old, new = before(tokens).logits, after(tokens).logits
    assert new.shape[-1] == OLD + NEW
    torch.testing.assert_close(new[..., :OLD], old, atol=1e-6, rtol=1e-6)
    ours, variables = dpo_jax.load_pretrained(extended)
    logits = ours.apply(variables, ours.apply(variables, ids), method="logits")
    np.testing.assert_allclose(np.asarray(logits), new.numpy(), atol=1e-5)
    pieces = [read_pieces(folder / "tokenizer.model") for folder in (model, extended)]
    spelled = resize.spellings(*pieces)
    means = np.stack([old.numpy()[0, -1, row].mean() for row in spelled])
    np.testing.assert_allclose(new.numpy()[0, -1, OLD:], means, atol=1e-5)  # the logit of a mean is the mean logit


@pytest.mark.parametrize(
    ("tied", "kind"), [(True, np.float32), (False, ml_dtypes.bfloat16), (True, ml_dtypes.bfloat16), (False, np.float16)]
)
def test_dtypes_ties_files_and_padding(llama2: Path, tmp_path: Path, tied: bool, kind: Any) -> None:
    folder = llama(tmp_path / "model", llama2, tied=tied, kind=kind)
    base = read_pieces(llama2)
    longer = extend(["鑫淼鑫淼，而", "中的"], base, pieces=4)
    place = open_checkpoint(folder)
    tokenizer = fast_tokenizer(longer, place, own_tokenizer(place))
    target = tmp_path / "longer"
    rows = resize.write_resized(place, target, base, longer, tokenizer, multiple=64, shard_bytes=10_000)
    assert rows == 32_064
    assert len(list(target.glob("*.safetensors"))) > 1
    old, new = load_file(folder / shards.SINGLE), {}
    for file in target.glob("*.safetensors"):
        new |= load_file(file)
    assert old.keys() == new.keys()
    assert (HEAD in new) is not tied
    for key in {EMBEDDING, HEAD} & old.keys():
        assert new[key].dtype == kind
        assert new[key].shape == (rows, 16)
        assert new[key][:OLD].tobytes() == old[key].tobytes()
        for at, piece in enumerate(longer.proto.pieces[OLD:], OLD):
            ids = SentencePieceProcessor(str(llama2)).encode(piece.piece)[1:]
            mean = old[key].astype(np.float64)[ids].mean(0).astype(kind)
            np.testing.assert_array_equal(new[key][at], mean)
        np.testing.assert_array_equal(
            new[key][len(longer) :], np.tile(old[key].astype(np.float64).mean(0).astype(kind), (rows - len(longer), 1))
        )
    assert dpo_jax.load_pretrained(target)[0].config.vocab_size == rows


def test_the_published_tokenizer(model: Path, published: Path, tmp_path: Path, capsys: Any, shared_data: Path) -> None:
    out = tmp_path / "zh"
    data = shared_data / "oasst_zh" / "sft.jsonl"
    texts = tmp_path / "some.txt"
    texts.write_text("\n".join(str(json.loads(line)) for line in data.read_text().splitlines()[:50]))
    words = ["extend-vocab", "--model", model, "--to", out, "--tokenizer", published, "--data", texts]
    assert cli.main([str(word) for word in words]) == 0
    assert (out / "tokenizer.model").read_bytes() == published.read_bytes()
    assert load_file(out / shards.SINGLE)[HEAD].shape == (55_296, 16)
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 55_296
    tokenizer, sentences = AutoTokenizer.from_pretrained(out), SentencePieceProcessor(str(published))
    assert tokenizer("请问人工智能是什么？ Hello")["input_ids"] == [1, *sentences.encode("请问人工智能是什么？ Hello")]
    shown = capsys.readouterr().out
    for figure in ("55,296", "given text", "22,639 of 23,296", "share a score"):
        assert figure in shown


def test_from_gguf(llama2: Path, tmp_path: Path) -> None:
    base = read_pieces(llama2)
    pieces = base.proto.pieces
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [p.piece for p in pieces],
        "tokenizer.ggml.scores": [p.score for p in pieces],
        "tokenizer.ggml.token_type": [p.type for p in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    folder, file = llama(tmp_path / "model", None), tmp_path / "model.gguf"
    write_gguf(folder, file, metadata=metadata)
    place = open_checkpoint(file)
    own = own_tokenizer(place)
    with pytest.raises(InputError, match=r"has no tokenizer\.model"):
        base_pieces(place, own, None)
    base = base_pieces(place, own, str(llama2))
    longer = extend(["鑫鑫"], base, pieces=2)
    tokenizer = fast_tokenizer(longer, place, own)
    assert tokenizer(" 鑫鑫 a")["input_ids"] == [1, *longer.processor.encode(" 鑫鑫 a")]
    resize.write_resized(place, tmp_path / "longer", base, longer, tokenizer)
    old, new = load_file(folder / shards.SINGLE), load_file(tmp_path / "longer" / shards.SINGLE)
    assert new[EMBEDDING][:OLD].tobytes() == old[EMBEDDING].tobytes()


# ---------------------------------------------------------------- bad input


def changed(path: Path, target: Path, change: Callable[[Any], Any]) -> Path:
    """A copy of a tokenizer.model with something changed."""
    model = proto(path)
    change(model)
    target.write_bytes(model.SerializeToString())
    return target


def swap(model: Any) -> None:
    model.pieces[300].piece, model.pieces[301].piece = model.pieces[301].piece, model.pieces[300].piece


TOKENIZERS = {
    "old ids would move": swap,
    "old text would be split otherwise": lambda m: setattr(m.pieces[300], "score", -7.5),
    "its eos id is 32001": lambda m: (setattr(m.trainer_spec, "eos_piece", "但"), setattr(m.pieces[32001], "type", 3)),
    "there is nothing to add": lambda m: m.pieces.__delitem__(slice(OLD, None)),
    "treats the beginning of a text otherwise": lambda m: setattr(m.normalizer_spec, "add_dummy_prefix", False),
    "changes its text before it splits it": lambda m: setattr(m.normalizer_spec, "remove_extra_whitespaces", True),
    "that is not BPE": lambda m: setattr(m.trainer_spec, "model_type", 1),
    "piece 40000 is marked as unused": lambda m: setattr(m.pieces[40000], "type", 5),
}


@pytest.mark.parametrize("line", TOKENIZERS)
def test_tokenizers_that_do_not_fit(line: str, llama2: Path, published: Path, tmp_path: Path) -> None:
    given = changed(published, tmp_path / "given.model", TOKENIZERS[line])
    with pytest.raises(InputError, match=rf"given\.model: .*{line}"):
        check_extends(read_pieces(given), read_pieces(llama2))


def test_the_command_refuses_a_tokenizer_that_does_not_fit(
    model: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = changed(published, tmp_path / "given.model", swap)
    words = ["extend-vocab", "--model", model, "--to", tmp_path / "out", "--tokenizer", given]
    assert cli.main([str(word) for word in words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_damaged_and_foreign_tokenizer_files(tmp_path: Path, llama2: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_pieces(tmp_path / "absent.model")
    for content in (b"", b"\x80\x04pickle", llama2.read_bytes()[:100_001]):
        (tmp_path / "damaged.model").write_bytes(content)
        with pytest.raises(
            InputError, match=r"damaged\.model: (not a SentencePiece model, or damaged|a SentencePiece)"
        ):
            read_pieces(tmp_path / "damaged.model")
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"] * 9), model_prefix=str(tmp_path / "plain"), model_type="bpe", vocab_size=8
    )
    with pytest.raises(InputError, match="without 256 byte pieces"):
        read_pieces(tmp_path / "plain.model")


def test_models_that_cannot_be_extended(llama2: Path, published: Path, tmp_path: Path) -> None:
    def complaint(folder: Path, **options: Any) -> str:
        run = ExtendVocabRun(model=str(folder), to=str(tmp_path / "out"), tokenizer=str(published), **options)
        with pytest.raises(InputError) as caught:
            extend_vocab(run)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    byte_level = tiny.folder(tmp_path / "tiny")
    assert "is not SentencePiece BPE" in complaint(byte_level)
    assert "is not SentencePiece BPE" in complaint(byte_level, base_tokenizer=str(llama2))

    rows = llama(tmp_path / "rows", llama2, rows=32_008)
    assert "the embedding has 32008 rows" in complaint(rows)
    assert "piece 55295 is" in complaint(rows, base_tokenizer=str(published)) or "nowhere" in complaint(
        rows, base_tokenizer=str(published)
    )

    added = llama(tmp_path / "added", llama2)
    tokenizer: Any = dpo_jax.load_tokenizer(added)
    tokenizer.add_tokens([AddedToken("<pad>", special=True)])
    tokenizer.save_pretrained(added)
    assert "token '<pad>', id 32000, was added behind the 32000 pieces" in complaint(added)
    (added / "tokenizer.model").unlink()
    assert "with --base_tokenizer FILE.model" in complaint(added)

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(InputError, match="is not empty"):
        extend_vocab(ExtendVocabRun(model=str(added), to=str(tmp_path / "out"), tokenizer=str(published)))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "give --data and --pieces, or --tokenizer"),
        ({"data": ("a.txt",)}, "give --data and --pieces, or --tokenizer"),
        ({"tokenizer": "t", "pieces": 5}, "--pieces has no effect with --tokenizer"),
        ({"tokenizer": "t", "character_coverage": 0.9}, "--character_coverage has no effect with --tokenizer"),
        ({"data": ("a.txt",), "pieces": 0}, "--pieces 0 must be at least 1"),
        ({"data": ("a.txt",), "pieces": 5, "character_coverage": 1.5}, "must lie in"),
        ({"data": ("a.txt",), "pieces": 5, "max_sentence_length": 1}, "--max_sentence_length 1 must be at least 2"),
        ({"tokenizer": "t", "pad_to_multiple_of": 0}, "--pad_to_multiple_of 0 must be at least 1"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        ExtendVocabRun(model="m", target="t", **options)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.txt", None, "no such file"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.jsonl", '{"body": "x"}', "row 1 has no text in the column `text` .its columns are body"),
        ("a.jsonl", '{"text": "鑫"}\n{"text": 5}', "row 2 has no text in the column `text` .it holds 5"),
        ("a.jsonl", '{"text": "\\ud83d"}', "row 1 holds half a character"),
    ],
)
def test_texts_that_cannot_be_read(name: str, content: str | bytes | None, line: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=line):
        list(Texts((str(tmp_path / name),)))


def test_texts_with_nothing_to_learn(model: Path, tmp_path: Path) -> None:
    for content, line in (("\n \n", "no text is left to learn from"), ("english\nonly\n", "hold no Chinese")):
        (tmp_path / "a.txt").write_text(content)
        run = ExtendVocabRun(model=str(model), to=str(tmp_path / "out"), data=(str(tmp_path / "a.txt"),), pieces=2)
        with pytest.raises(InputError, match=line):
            extend_vocab(run)
        assert not (tmp_path / "out").exists()


def test_the_tenth_that_is_kept(tmp_path: Path) -> None:
    texts = [f"第{i}行" for i in range(1000)]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n\n".join(texts).encode()))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lines, rows = (Texts((str(tmp_path / name),)) for name in ("a.txt.gz", "b.jsonl"))
    assert list(lines) == list(rows) == texts
    kept, learnt = (list(rows.part(held_out=side)) for side in (True, False))
    assert sorted(kept + learnt) == sorted(texts)
    assert 70 < len(kept) < 130
    assert kept == list(lines.part(held_out=True)) == list(lines.part(held_out=True))


def test_fewer_pieces_than_asked_are_told(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("鑫淼\r\n鑫淼焱\n垚犇\n骉\n")
    run = ExtendVocabRun(model=str(model), to=str(tmp_path / "out"), data=(str(tmp_path / "a.txt"),), pieces=50)
    made = extend_vocab(run)
    assert isinstance(made.longer, Pieces)
    found = len(made.longer) - OLD
    assert 4 < found < 20
    assert f"the text gives {found} new pieces, not 50" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == OLD + found


def test_a_recipe_leaves_the_paths_to_the_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from dpo_jax.config import ON_COMMAND_LINE, ExtendVocabRun\n"
        "config = ExtendVocabRun(model=ON_COMMAND_LINE, target=ON_COMMAND_LINE, data=(ON_COMMAND_LINE,), pieces=9)\n"
    )
    words = [str(recipe), "--model", "m", "--to", "t"]
    assert cli.parse("extend-vocab", [*words, "--data", "a", "b"]) == ExtendVocabRun("m", "t", ("a", "b"), 9)
    with pytest.raises(InputError, match="missing --data"):
        cli.parse("extend-vocab", words)
