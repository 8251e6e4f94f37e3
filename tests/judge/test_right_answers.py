"""Final answers: taken out of a text, compared; pairs of right and wrong ones."""

import importlib.util

import numpy as np
import pytest

from dpo_jax.errors import InputError
from dpo_jax.judge.rewards.right_answers import draw_pairs, exact, final_answer, known_answer, open_matcher


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He has 3, then 4. #### 7", "7"),
        ("#### 5\nNo, wait.\n#### 1,234", "1,234"),
        ("So the final answer: 12 apples\nDone 99", "12 apples"),
        ("The answer is: blue.", "blue."),
        (r"we get \boxed{\frac{1}{2}} at last, of 3", r"\frac{1}{2}"),
        (r"cut: \boxed{\frac{1", None),
        ("3 + 4 = 7, and not -8.5", "-8.5"),
        ("no number", None),
    ],
)
def test_the_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_a_pattern_of_ones_own_takes_its_last_match() -> None:
    assert final_answer("<a>1</a> <a>2</a> 3", r"<a>(.*?)</a>") == "2"
    assert final_answer("3", r"<a>(.*?)</a>") is None


def test_equal_answers() -> None:
    for same in ("#### 1,000", "the answer is $1000.", "1000.00", "Final answer: 1e3 or 1000"):
        assert exact(same, "1000") == ("or" not in same)
    assert exact("answer is  Blue  Whale.", "blue whale")
    assert not exact("", "0")
    assert exact(f"#### {'9' * 99}", "9" * 99)
    assert not exact(f"#### {'9' * 98}8", "9" * 99)


@pytest.mark.parametrize(
    "text",
    [
        "The answer is $18$.",
        "The final answer is $18$. I hope it is correct.",
        "Final Answer: The final answer is $18$. I hope it is correct.",
        "so the answer is **18**",
        "**Final answer:** 18",
        "**Final answer:**\n\n**$18.00**",
        r"the final answer is \(18\)",
        r"\boxed{\$18}",
        r"$\boxed{18}$. The answer is correct.",
        "#### 18 dollars",
        "#### 18\nThe answer is right.",
        "the answer is $18 a day. He sells 9 of 16 eggs.",
        "The answer is: Janet makes **$18** every day.",
        r"\boxed{18\%}",
        "#### 18%",
        "The answer is 18cm.",
        r"\boxed{x = 18}",
        "#### 1.8e1",
        r"the answer is $\$18\$$. ",
        r"the answer is \[ **18** \].",
        "#### " + "* " * 50_000 + "18" + " *" * 50_000,
    ],
)
def test_right_answers_in_their_usual_clothes(text: str) -> None:
    assert exact(text, "18")
    assert not exact(text, "81")


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("#### 1/2", "1"),
        (r"\boxed{\frac{1}{2}}", "1"),
        (r"\boxed{\sqrt{2}}", "2"),
        (r"\boxed{2\pi}", "2"),
        ("#### 2x", "2"),
        ("#### x2", "2"),
        ("#### 2 - x", "2"),
        ("#### 2 + x", "2"),
        ("#### 18 or 20", "18"),
        ("#### 18 million", "18"),
        ("#### 18 " + " " * 50_000 + "or 20", "18"),
        ("#### a" + " *" * 50_000 + "b", "18"),
        ("the answer is not 18", "18"),
        ("the answer is -$18", "18"),
        ("#### 18 dollars", "18 euros"),
        ("the answer is correct: it isn't 18", "17"),
    ],
)
def test_a_number_in_something_else_is_not_the_answer(text: str, known: str) -> None:
    assert not exact(text, known)


def test_a_sign_before_the_dollar_counts() -> None:
    assert exact("the answer is -$18 a day", "-18")
    assert exact(r"\boxed{-\$18}", "-18")
    assert final_answer("5-3 = 2") == "2"
    assert final_answer("so 5-3") == "3"  # as --reward numeric: reads it


def test_what_a_column_holds() -> None:
    assert known_answer("18 - 4 = 14\n#### 14") == "14"
    assert known_answer("12 apples") == "12 apples"  # a bare answer is itself
    assert known_answer(3.0) == "3.0"
    for long in ("So 3 + 4 = 7\nand 7 it is", "7, since " + "3 and 4 make it " * 8):
        with pytest.raises(InputError, match="characters with none of ####, final answer:"):
            known_answer(long)
        with pytest.raises(InputError, match="with no --answer_pattern in it"):
            known_answer(long, "<a>(.*)</a>")
        assert known_answer(long, "([0-9])")
    assert known_answer(None) is known_answer(True) is known_answer("  ") is known_answer([1]) is None


def test_pairs_are_drawn_without_replacement_from_all() -> None:
    right, wrong = ["a", "b", "c"], ["x", "y"]
    every = set(draw_pairs(right, wrong, 10, np.random.default_rng(0)))
    assert every == {(r, w) for r in right for w in wrong}
    drawn = [tuple(draw_pairs(right, wrong, 2, np.random.default_rng(seed))) for seed in range(3000)]
    assert all(len(set(pairs)) == 2 for pairs in drawn)
    counts = [sum((r, w) in pairs for pairs in drawn) for r in right for w in wrong]
    assert all(900 < count < 1100 for count in counts)  # each of six pairs in a third of the draws


def test_math_verify_is_asked_for() -> None:
    if importlib.util.find_spec("math_verify") is None:
        with pytest.raises(InputError, match=r"pip install 'dpo_jax\[math\]'"):
            open_matcher("math_verify", None)
        return
    right = open_matcher("math_verify", None)
    assert right(r"so \boxed{\frac{1}{2}}", "0.5")
    assert not right(r"so \boxed{\frac{1}{3}}", "0.5")
