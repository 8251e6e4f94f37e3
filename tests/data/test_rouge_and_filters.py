"""ROUGE-L, truecasing, phrases, near duplicates: what a teacher's dialogues are filtered by."""

import random

import pytest

from dpo_jax.data.rows import dialogue_filters as filters, rouge
from dpo_jax.data.rows.truecase import truecased
from dpo_jax.data.sources.duplicates import NearTexts
from dpo_jax.errors import InputError


def longest(a, b) -> int:
    """Of the common subsequences, by the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l() -> None:
    rng = random.Random(0)
    for _ in range(300):
        a, b = ([rng.choice("abcde") for _ in range(rng.randint(1, 90))] for _ in range(2))
        assert rouge.common(a, b) == longest(a, b)
    # LCS "the cat on the mat" = 5 of 6 and 6 tokens.
    assert rouge.rouge_l("The cat sat on the mat.", "the cat is on the mat") == pytest.approx(5 / 6)
    assert rouge.rouge_l("今天天气很好", "今天天气不好") == pytest.approx(5 / 6)
    assert rouge.tokens("Don't: naïve 中文2") == ["don", "t", "na", "ï", "ve", "中", "文", "2"]
    assert rouge.rouge_l("", "a") == rouge.rouge_l("!", "!") == 0


def test_the_rule_drops_at_the_limit() -> None:
    kept = rouge.Kept()
    kept.add("a b c d e f g x y z")
    assert kept.close("a b c d e f g 1 2 3") == ("a b c d e f g x y z", pytest.approx(0.7))
    assert kept.close("a b c d e f 0 1 2 3") is None
    assert kept.close("g f e d c b a x y z") is None  # the same words in another order


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Hello. how are you?", "Hello. How are you?"),  # the paper's example
        ("i'm fine, e.g. when i sleep. see www.x.com", "I'm fine, e.g. when I sleep. See www.x.com"),
        ("```a. b i```x. y `i. b` so. why", "```a. b i```x. y `i. b` so. Why"),
        ("Hi... there. open main.py. it (and i) run", "Hi... there. Open main.py. It (and I) run"),
        ("Use it. iPhone and eBay. U.S. law. 1. first", "Use it. iPhone and eBay. U.S. law. 1. first"),
        ("你好。今天 i", "你好。今天 i"),
    ],
)
def test_truecasing(text: str, wanted: str) -> None:
    assert truecased(text) == wanted
    assert truecased(wanted) == wanted


def dialogue(answer: str, asked: str = "Why?") -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("answer", "dropped"),
    [
        ("As an AI language model, I do not have personal opinions.", True),
        ("I don’t have feelings or emotions.", True),
        ("I don't have any emotions about it, but Paris is the capital.", True),
        ("作为一个人工智能，我没有个人的情感。", True),
        ("我无法体验情感。", True),
        ("Robots have no feelings. I do not have a dog.", False),
        ("People express emotions, and I have opinions.", False),
        ("他没有感情。", False),
    ],
)
def test_no_emotions_or_opinions(answer: str, dropped: bool) -> None:
    found = filters.says(filters.phrase_lists())(dialogue(answer, asked="I don't have feelings. You?"))
    assert (found is not None) == dropped


def test_other_filters(tmp_path) -> None:
    assert filters.length(3, 5)(dialogue("ab")) == "an answer is too short"
    assert filters.length(3, 5)(dialogue("abcdef")) == "an answer is too long"
    assert filters.length(3, 5)(dialogue(" abc ")) is None
    tongue = filters.language(["en"], lambda text: ("zh" if "中" in text else "fr", 0.9 if "中" in text else 0.1))
    assert tongue(dialogue("中文")) == "language: zh"
    assert tongue(dialogue("?")) is None  # not sure
    mine = tmp_path / "mine.json"
    mine.write_text('{"en": ["delve"]}')
    assert filters.says(filters.phrase_lists([str(mine)]))(dialogue("We Delve.")) == "phrase: mine.json (en)"
    for text, message in (("[", "not readable"), ('{"en": ["("]}', "no regular expression"), ("[1]", "not readable")):
        mine.write_text(text)
        with pytest.raises(InputError, match=message):
            filters.phrase_lists([str(mine)])


def test_near_texts() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(6)) for _ in range(200)]
    texts = NearTexts()
    long = " ".join(words)
    assert texts.near(long, "first") is None
    assert texts.near(f" {long.upper()}\n", "second") == ("first", 1.0)
    found = texts.near(" ".join([*words[:-4], "some", "other", "words"]), "third")
    assert found is not None
    assert found[0] == "first"
    assert 0.8 <= found[1] < 1
    assert texts.near(" ".join(words[100:] + words[:50]), "fourth", keep=False) is None
    assert texts.near(" ".join(reversed(words)), "fifth") is None
