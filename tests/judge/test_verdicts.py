"""Readers of judges' replies: the right value, or unparsed, and never another."""

import itertools
import json
import os
import random
from pathlib import Path

import pytest

from dpo_jax.judge.asked import verdicts
from dpo_jax.judge.asked.verdicts import Rating

DATA = Path(os.environ.get("DPO_JAX_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Rating: [[8.5]]", 8.5),
        *(
            (f"Rating: {said}", None)
            for said in ("7 1/2", "7 through 8", "7 & 8", "7; 8", "7 8", "7±1", "6 if strict, 8")
        ),
        ("Score: 7 | Score: 8", None),
        ("评分：7点5", None),
        ("评分：8。5", None),
        ("Rating: 8\n2. The next.", 8),
        ("[[8]]", 8),
        ("It is good.\n\n**Rating:** [[7]]", 7),
        ("【【９】】", 9),
        ("Rating: 8/10", 8),
        ("I would give it 8 out of 10.", 8),
        ("Overall Score: 10", 10),
        ("**Overall Score: 6**", 6),
        ("评分：8分", 8),
        ("综合评分：７／１０。", 7),
        ("8", 8),
        ("8\nA good answer with 3 mistakes.", 8),
        ("<think>perhaps [[3]]</think>[[9]]", 9),
        ("3 mistakes. Accuracy score: 6\n[[8]]", 8),
        ("[[8]] and again [[8]]", 8),
        ("Score: 5/5", None),
        ("[[8]] or [[7]]", None),
        ("Rating: 6\n[[8]]", None),
        ("Rating: 7-8", None),
        ("Rating: 7 or 8", None),
        ("评分：7到8分", None),
        ("Rating: 85%", None),
        ("Rating: 8,5", None),
        ("Rating: 8½", None),
        ("Rating: -8", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("Rating: 80/100", None),
        ("Good, 3 mistakes.", None),
        ("I cannot rate this.", None),
        ("", None),
        ("<think>it is [[9]]", None),
        ("Rating: [[eight]]", None),
        ("4/10 for style, 9/10 for facts", None),
    ],
)
def test_a_rating(reply, value) -> None:
    assert verdicts.rating(reply, 1, 10) == value


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("My final verdict is: [[A]]", "A"),
        *((f"Verdict: {said}", "tie") for said in ("a tie", "a draw.", "A = B", "A tie between both")),
        *(
            (f"Verdict: {said}", None)
            for said in ("A is worse than B", "A, B", "A & B", "A vs B: B wins", "a close call")
        ),
        *((f"结论：{said}", None) for said in ("A和B一样", "A、B相同", "A 不如 B")),
        *((f"Verdict: {said}", "A") for said in ("A, because it is.", "A is better", "A>B", "A\nB is short.")),
        *(
            (f"Verdict: {said}", None)
            for said in ("A; B", "A (or B)", "A - B", "A as good as B", "A for facts, B for style")
        ),
        *(
            (f"Verdict: {said}", "B")
            for said in ("B, a better text", "B - B has the facts", "B; it is right", "B (clearly)")
        ),
        ("Verdict: A < B", "B"),
        ("结论：B更好", "B"),
        ("[[C]]", "tie"),
        ("**[[B]]**", "B"),
        ("【【A】】", "A"),
        ("[[A>>B]]", "A"),
        ("[[B > A]]", "B"),
        ("[[A<B]]", "B"),
        ("[[A=B]]", "tie"),
        ("[B]", "B"),
        ("Verdict: A", "A"),
        ("结论：平局", "tie"),
        ("胜者：B。", "B"),
        ("B", "B"),
        ("Tie.", "tie"),
        ("[[A]] but then [[B]]", None),
        ("Verdict: B\n[[A]]", None),
        ('"[[A]]" if A is better, "[[B]]" if B is better', None),
        ("Verdict: A or B", None),
        ("[[A>A]]", None),
        ("A good answer is B", None),
        ("[[D]]", None),
        ("Sorry, I can't.", None),
    ],
)
def test_a_verdict(reply, value) -> None:
    assert verdicts.verdict(reply) == value


ULTRA = (
    "#### Output for Text 1\nRating: 4\nRationale: Good.\n\n#### Output for Text 2\nRating: N/A\nRationale: A poem.\n"
)
TYPED = "#### Output for Text 1\nType: 1, 3\nRationale: Wrong year.\nRating: 2\nRationale: A fault."


@pytest.mark.parametrize(
    ("reply", "count", "found"),
    [
        (ULTRA, 2, [Rating(4, "Good."), Rating(None, "A poem.")]),
        (ULTRA.replace("#### ", "**").replace(":", "："), 2, [Rating(4, "Good."), Rating(None, "A poem.")]),
        (TYPED, 1, [Rating(2, "A fault.", "1, 3", "Wrong year.")]),
        ("Rating: 3\nRationale: a\n\nRating: 5\nRationale: b", 2, [Rating(3, "a"), Rating(5, "b")]),
        ("Text 2: 3\nText 1: 5/5", 2, [Rating(5), Rating(3)]),
        ("回答1：4\n回答2：2分", 2, [Rating(4), Rating(2)]),
        (ULTRA, 3, None),
        (ULTRA.replace("Text 2", "Text 1"), 2, None),
        (ULTRA.replace("4", "4-5"), 2, None),
        (ULTRA.replace("Rating: 4", "Rating: 4\nRating: 2"), 2, None),
        (ULTRA.replace("4", "6"), 2, None),
        ("No.", 2, None),
    ],
)
def test_a_list(reply, count, found) -> None:
    assert verdicts.ratings(reply, count, 1, 5) == found


@pytest.mark.parametrize(
    ("reply", "count", "found"),
    [
        ("1. Yes\n2. No, it is not.", 2, [True, False]),
        *((f"1. {no}", 1, [False]) for no in ("未满足", "没有满足", "未能符合要求", "不能满足", "并非是", "Not true")),
        *((f"1. {half}", 1, None) for half in ("部分满足", "不完全满足", "不太符合", "Not exactly true")),
        ("1：是\n2：否", 2, [True, False]),
        ("2) no\n1) **yes**", 2, [True, False]),
        ("1、不是\n2、符合", 2, [False, True]),
        ("Yes.", 1, [True]),
        ("1. Yes", 2, None),
        ("1. Yes\n1. No", 2, None),
        ("1. yes and no", 1, None),
        ("1. perhaps", 1, None),
    ],
)
def test_a_checklist(reply, count, found) -> None:
    assert verdicts.checklist(reply, count) == found


def test_every_published_review() -> None:
    """The 832 reviews of Vicuna's first evaluation, "a b" on the first line (FastChat's history)."""
    path = DATA / "vicuna_reviews" / "pairs.jsonl"
    if not path.exists():
        pytest.skip("vicuna_reviews is not in $DPO_JAX_DATA")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = [verdicts.two_ratings(row["review"], 1, 10) for row in rows]
    wrong = [row for row, pair in zip(rows, found, strict=True) if pair not in (None, (row["score_a"], row["score_b"]))]
    assert len(rows) == 832
    assert wrong == []
    assert sum(pair is not None for pair in found) >= 830


FULL = str.maketrans("0123456789./[]:,", "０１２３４５６７８９．／［］：，")
# Changes of form that keep a reply's value, and changes after which it has none.
KEPT = (
    lambda text: text,
    lambda text: f"\n\n  {text}  \n",
    lambda text: text.translate(FULL),
    lambda text: "**" + text.replace("\n", "**\n", 1) if "\n" in text else f"**{text}**",
    lambda text: f"`{text.partition(chr(10))[0]}`\n" + text.partition("\n")[2],
    lambda text: text.replace("\n", "\r\n"),
    lambda text: f"<think>\n[[2]]\n2 1\n</think>\n{text}",
)


def test_mutated_replies_of_both_formats() -> None:
    """200 replies: what keeps the value is read as it, what leaves none is unparsed; never another value."""
    rng, seen = random.Random(5), 0
    for i, kept in zip(range(100), itertools.cycle(KEPT)):
        a, b = (rng.choice([1, 2.5, 4, 7, 8.5, 9, 10]) for _ in range(2))
        pair, single = f"{a:g} {b:g}\nBoth answers name 3 reasons.", f"It names 3 reasons.\nRating: [[{a:g}]]"
        assert verdicts.two_ratings(kept(pair), 1, 10) == (a, b), (i, kept(pair))
        assert verdicts.rating(kept(single), 1, 10) == a, (i, kept(single))
        other = 3 if a != 3 else 6
        broken = rng.choice(
            [
                (f"{pair}\n{other} {other}", f"{single}\n[[{other}]]"),
                (f"{a:g}-{other} {b:g}", f"Rating: [[{a:g}-{other}]]"),
                (f"{a:g}", f"Rating: {a:g} or {other}"),
                (f"{a:g}/5 {b:g}/5", f"Rating: {a:g}/100"),
                (f"{a:g} {b:g} {other}", f"Rating: {a:g}%"),
                (f"{a:g}0.5 {b:g}", f"[[{a:g}0.5]]" if a >= 2 else "[[99]]"),
                ("", "I cannot judge that."),
                (f"<think>{pair}", f"<think>{single}"),
            ]
        )
        assert verdicts.two_ratings(broken[0], 1, 10) is None, broken
        assert verdicts.rating(broken[1], 1, 10) is None, broken
        seen += 2
    assert seen == 200
