"""Final answers: taken out of a text, compared; pairs of right and wrong ones."""

import importlib.util
import re
import time

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
        ("3 + 4 = 7, and at last -8.5", "-8.5"),
        ("so x = − 18", "-18"),
        ("5 + 13 = 18 apples.", "18"),
        ("20 - 2 = <<20-2=18>>18", "18"),
        ("<think>3 * 6</think>18", "18"),
        ("- Total: **18** eggs", "18"),
        ("他一共有１８个苹果。", "18"),
        ("so 5-3", None),  # of what is joined the last is no answer
        ("18 000", None),
        ("from 10 to 18", None),
        ("2(18)", None),
        ("3 + 4 = 7, and not -8.5", None),
        ("18 or 20", None),
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


PLAIN = {
    "18": r"""\boxed{18元} | #### 18个 | 18千克 | 18 km/h | $18/day | 18-inch | 18 m | 18 ㎡ | 18平方米 | 18倍
        第18天 | #### １８元 | \boxed{18\text{ dollars}} | \boxed{18\text{ m}} | \boxed{18 \text{ cm}^2}
        \boxed{18^\circ} | \boxed{18^{\circ}} | 18℃ | 18°C | \boxed{\mathbf{18}} | \boxed{\left(18\right)}
        \boxed{18} | the answer is *18* eggs | US$18 | 18 ✅ | 18 dollars! | She has 18 more apples than Bob.
        18 times | 18 square feet | the greatest common divisor is 18 | 最大公约数是18 | 最多可以买18个
        \boxed{18\mathrm{~cm}} | #### 18 m/s^2 | (B) 18 dollars | 18 in one day
        综上所述，答案是18！ | 18种可能 | the value of x is 18 | $$x = 18.$$ | it’s 18""",
    "-18": r"""\boxed{−18} | \boxed{- 18} | so x = −18 | so x = - 18 | the answer is negative 18
        minus 18 dollars | -(18) | \boxed{-(18)} | the answer is $-(18)$ | 答案是负18 | #### －１８ | −$18""",
    "18000": r"18,000 | \boxed{18\,000} | \boxed{18{,}000} | \boxed{\$18,\!000} | １８，０００" + " | 18\u202f000",
    "50%": r"50% | 50 | #### 50\% | 50 percent | ５０％ | \boxed{50\%}",
    "50": r"50% | #### 50\% | 50 percent | \boxed{50}",
    r"\frac{1}{2}": r"\boxed{\dfrac{1}{2}} | \boxed{\tfrac12} | 1/2 | 0.5 | 1/2 of a cup | 2/4",
    "-1/2": r"\boxed{-\frac{1}{2}} | \boxed{\frac{-1}{2}} | −1/2 | -0.5",
    r"3\frac{1}{2}": r"\boxed{3\dfrac{1}{2}}",
    r"18\text{ cm}^2": r"\boxed{18} | #### 18",
    "18元": r"18 | 18 元 | \boxed{18\text{元}}",
    "1,2": "#### 1, 2",
}
NO_PLAIN = {
    "18": r"""\boxed{−18} | \boxed{- 18} | so x = −18 | negative 18 | minus 18 | -(18) | −$18 | 负18 | --18
        -(-18) | —18 | \boxed{√18} | \boxed{sqrt(18)} | \sqrt{18} | ±18 | \pm 18 | ≥ 18 | > 18 | \le 18 | ~18
        ≈18 | x ≠ 18 | x != 18 | 18+ | 18! | 18! Indeed. | 18? | 18^2 | 18² | 2^{18} | 2**18 | 10^18 | x_18
        f(18) | x + 18 | x - 18 | x*18 | (x)(18) | (18)(x) | 18/x | 36/2 | (x, 18) | (18, x) | [18, ∞) | 18:20
        10-18 | 10–18 | 18, 19 | 18 and 19 | between 17 and 18 | 17 or 18 | 18½ | 3\frac{1}{18} | 18x | 18 x
        18i | 18πr | 18 xy | 18𝑥 | 18ⁿ | 18k | $18M | 18 MM | 0x18 | 18‰ | 18\cdot x | 18\pi | isn't 18
        isn’t 18 | not 18 | never 18 | about 18 | approximately 18 | around $18 | less than 18 | at least 18
        up to 18 | over 18 | 18 or so | 18 at most | 18-ish | 18 and a half | 18 squared | twice 18 | half of 18
        the square root of 18 | a multiple of 18 | 18 to one | 18 times two | 18 trillion | 18 thousands
        18 feet six inches | 18 dollars and fifty cents | three and 18 | -x = 18 | √x = 18 | 18… | 18 maximum
        18 millions | 18 dozens | 18 mn | 18 lakh | 30% of 18 | COVID-18 | 18万元 | 18亿元 | 18万 | 18千元
        18百 | 18多个 | 18左右 | 18以上 | 18元不到 | 18天半 | 18的平方 | 18的倍数 | 18分之一 | 三分之18 | 不是18
        三又18 | 18元五角 | 大约18 | 约18个 | 至少18 | 超过18 | 小于等于18 | 根号18 | 18만원""",
    "-18": "x minus 18 | the answer – 18 | COVID-18 | it is 10 - 18",
    "1,2": r"\boxed{12} | 12",
    "3,5,7": r"\boxed{357} | 357",
    "15": "#### 1,5 | 1,5",
    "567": "1234,567",
    "0": "18 000 | 18'000",
    "2": r"1/2 | \frac{1}{2} | \boxed{\frac{1}{2}} | \boxed{2xy} | 3^2 | 12/25/2 | 1.1.2",
    "12": r"1/2 | \boxed{\frac12} | \boxed{1,2} | 1,2",
    "0.5": "50% | 1/2/3",
    "18 dozen": "18",
    "18m": "18",
    "18万": "18",
    "18 or 19": "18",
    "<div>": "<span>",
    "__init__": "init",
}


def _each(cases: dict[str, str]) -> list[tuple[str, str]]:
    return [(text.strip(), known) for known, row in cases.items() for text in re.split(r" \| |\n", row)]


@pytest.mark.parametrize(("text", "known"), _each(PLAIN))
def test_plain_answers(text: str, known: str) -> None:
    assert exact(text, known)
    assert "####" in text or "boxed" in text or exact(f"#### {text}", known)


@pytest.mark.parametrize(("text", "known"), _each(NO_PLAIN))
def test_what_is_not_said_plainly_is_not_right(text: str, known: str) -> None:
    assert not exact(text, known)
    assert "####" in text or "boxed" in text or not exact(f"#### {text}", known)


@pytest.mark.parametrize(
    "piece",
    [
        *"-$*１−不 \n",
        *r"1,|1/|0/|1/0|- |= -|-$|*a|** |__|<<|<<1|<ab|</ab>|((|\text{|\frac{1}|1\,|^{|b, |a/|. |1! |1e".split("|"),
        *"about |half of |n't |minus |cm^".split("|"),
    ],
)
def test_hostile_texts_take_time_in_proportion(piece: str) -> None:
    body = (piece * 100_000)[:100_000]
    begun = time.process_time()
    for text in (body, body + "18", f"#### 18{body}", f"#### {body}18", f"\\boxed{{{body}18}}"):
        exact(text, "18")
    assert time.process_time() - begun < 5  # a quadratic expression takes minutes


def test_a_sign_before_the_dollar_counts() -> None:
    assert exact("the answer is -$18 a day", "-18")
    assert exact(r"\boxed{-\$18}", "-18")
    assert final_answer("5-3 = 2") == "2"


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
    assert known_answer(float("nan")) is known_answer(float("-inf")) is None


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
