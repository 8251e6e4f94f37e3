"""Comparisons: layouts, margins, ties, labels, and what is refused."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
import tiny

from dpo_jax.commands.reward import load_data
from dpo_jax.config import DataConfig, RewardLossConfig, RewardRun
from dpo_jax.data.rows.comparisons import SAFETY_BINS
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.rows.ratings import margin_of, rating_number
from dpo_jax.data.sets.batches import collate
from dpo_jax.data.sets.comparison_sets import load_comparisons, load_responses, mix, split_by_prompt
from dpo_jax.data.sets.dataset import load_preferences
from dpo_jax.data.sets.loader import eval_batches
from dpo_jax.errors import InputError
from dpo_jax.report.datasets import data_section

TOKENIZER = tiny.tokenizer()
DATA = DataConfig(max_length=64)
PAIR = {"prompt": "the film", "chosen": "very good", "rejected": "bad"}


@pytest.fixture
def load(tmp_path):
    def read(rows, reader=load_comparisons, data=DATA, on_bad_rows="refuse", **rules):
        path = tmp_path / f"rows{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
        arguments = {"vocab_size": 320, "on_bad_rows": on_bad_rows}
        if reader is load_comparisons:
            return reader(str(path), TOKENIZER, data, RewardLossConfig(**rules), **arguments)
        return reader(str(path), TOKENIZER, data, **arguments, **rules)

    read.folder = tmp_path
    return read


def text(data, row, k):
    return TOKENIZER.decode(data.responses[row * data.responses_per_prompt + k]).removesuffix("<|im_end|>\n")


# ---------------------------------------------------------------- ratings


@pytest.mark.parametrize(
    ("rating", "number"),
    [
        ("significantly better", 3),
        ("Better", 2),
        ("slightly_better", 1),
        ("negligibly better / unsure", 0),
        ("unsure", 0),
        ("3", 3),
        (1, 1),
        (0.0, 0),
    ],
)
def test_ratings(rating, number):
    assert rating_number(rating) == number
    assert margin_of("small", 1.0, {"rating": rating}) == pytest.approx(number / 3)
    assert margin_of("large", 1.0, {"rating": rating}) == number


@pytest.mark.parametrize("rating", ["much better", 4, -1, 1.5, "nan", True])
def test_ratings_outside_the_table(rating):
    with pytest.raises(BadRow, match=r"outside the margin table .* known are significantly better \(3\), better \(2\)"):
        rating_number(rating)


# ---------------------------------------------------------------- layouts


def test_pairs_keep_their_order(load):
    data = load([PAIR])
    assert (text(data, 0, 0), text(data, 0, 1)) == ("very good", "bad")
    assert data.ranks is None
    assert data.margins is None
    assert data.labels is None


def test_ranked_lists(load):
    rows = [
        {"instruction": "the film", "output": ["good", "not good", "bad"], "history": [["a question", "answer"]]},
        {"prompt": "the book", "responses": ["bad", "good", "rude"], "ranks": [2, 1, 2]},
        {"prompt": "we like", "completions": [{"response": "bad", "score": 1.5}, {"response": "good", "score": 4}]},
        {"prompt": "they hate", "responses": ["bad", "good", "kind"], "scores": [0, 2.5, 2.5]},
    ]
    data = load(rows)
    assert data.responses_per_prompt == 3
    assert [text(data, i, 0) for i in range(4)] == ["good", "good", "good", "good"]
    assert [text(data, 1, k) for k in (1, 2)] == ["bad", "rude"]
    np.testing.assert_array_equal(data.ranks, [[0, 1, 2], [0, 1, 1], [0, 1, 3], [0, 0, 1]])
    assert data.response_lengths[2, 2] == 0
    assert "answer<" in TOKENIZER.decode(data.prompts[0])
    assert data.extras["score_gap"] == [None, None, 2.5, None]
    (_, batch), *_ = eval_batches(data, 4, 1)
    np.testing.assert_array_equal(batch.ranks, data.ranks)


ULTRAFEEDBACK = {"annotations": {"honesty": {"Rating": "2"}}, "critique": "fine", "model": "m", "fine-grained_score": 3}


@pytest.mark.parametrize(
    "row",
    [
        {
            "completions": [
                {"response": "bad", "overall_score": 4, **ULTRAFEEDBACK},
                {"response": "good", "overall_score": 7.5, **ULTRAFEEDBACK},
            ]
        },
        {"completions": [{"response": "bad", "rating": 2}, {"response": "good", "rating": 5}]},
        {"completions": [{"response": "bad", "rank": 1}, {"response": "good", "rank": 0}]},
        {"responses": [{"response": "bad", "rank": 2.0}, {"response": "good", "rank": 1.0}]},
        {"responses": [{"text": "bad", "score": 1, "rank": 2}, {"text": "good", "score": 2, "rank": 1}]},
        {"responses": ["bad", "good"], "ratings": [1, 5]},
        {"responses": ["bad", "good"], "rating": [8.0, 9.0]},
        {"responses": ["bad", "good"], "rank": [2, 1]},
    ],
)
def test_every_judgement_is_read(load, row):
    data = load([{"prompt": "the film", **row}])
    assert [text(data, 0, k) for k in (0, 1)] == ["good", "bad"]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"completions": [{"response": "x", **ULTRAFEEDBACK}, {"response": "y", **ULTRAFEEDBACK}]}, "annotations"),
        ({"responses": [{"response": "x", "fine-grained_score": 3}, {"response": "y"}]}, "fine-grained_score"),
        ({"responses": ["x", "y"], "ranking": [2, 1]}, "ranking"),
        ({"responses": ["x", "y"], "preferred": "second"}, "preferred"),
        ({"responses": ["x", "y"], "winner": 1}, "winner"),
        ({"responses": ["x", "y"], "ratings": [1, 2, 3]}, "ratings"),
    ],
)
def test_a_judgement_that_is_not_read_leaves_no_order(load, row, name):
    row = {"prompt": "the film", **row}
    with pytest.raises(InputError, match=f"'{name}' may say which entry of '.*' is better, and is not read"):
        load([row])
    assert len(load([row], reader=load_responses)) == 1, "to be scored, any order will do"


def test_long_lists_keep_the_best_the_worst_and_some_between(load):
    row = {"prompt": "the film", "responses": [f"answer {word}" for word in tiny.WORDS[:7]]}
    data = load([row], max_replies=3)
    assert [text(data, 0, k) for k in range(3)] == [row["responses"][i] for i in (0, 3, 6)]
    np.testing.assert_array_equal(data.ranks, [[0, 3, 6]])


def test_scored_and_voted_pairs(load):
    rows = [
        {"prompt": "the film", "response_a": "bad", "response_b": "good", "score_a": 3, "score_b": 7.5},
        {
            "instruction": "say",
            "input": "this",
            "response1": "good",
            "response2": "bad",
            "annotator1": 1,
            "annotator2": 1,
        },
    ]
    gaps = load(rows[:1], margin="score_gap", margin_scale=0.1)
    assert text(gaps, 0, 0) == "good"
    np.testing.assert_allclose(gaps.margins, [0.45])
    votes = {"annotator1": 0, "annotator2": 2, "annotator3": 2}
    agreed = load([{**rows[0], "score_a": None, "score_b": None, **votes}, rows[1]], margin="agreement")
    assert [text(agreed, i, 0) for i in range(2)] == ["good", "good"]
    np.testing.assert_allclose(agreed.margins, [2 / 3, 1])
    assert agreed.extras["agreement"] == pytest.approx([2 / 3, 1])
    assert agreed.unused_columns == ()


def test_margins(load):
    rows = [{**PAIR, "rating": "better"}, {**PAIR, "rating": 3, "source": "x"}]
    np.testing.assert_allclose(load(rows, margin="small").margins, [2 / 3, 1])
    np.testing.assert_allclose(load(rows, margin="large").margins, [2, 3])
    assert load(rows).extras == {"rating": ["better", 3.0], "source": [None, "x"]}
    np.testing.assert_allclose(load([{**PAIR, "margin": 0.25}], margin="column").margins, [0.25])
    scored = {**PAIR, "score_chosen": 9, "score_rejected": 7}
    np.testing.assert_allclose(load([scored], margin="score_gap").margins, [2])
    np.testing.assert_allclose(load([{**PAIR, "agreement": 0.6}], margin="agreement", margin_scale=2).margins, [1.2])


def test_margins_of_lists_are_differences_of_scores(load):
    words = ("good", "kind", "bad")
    ranked = {"prompt": "the film", "responses": [*words], "scores": [2.0, 9.0, 4.0]}
    pair = {"prompt": "a film", "responses": ["good", "bad"], "scores": [3, 1]}
    data = load([ranked, pair], margin="score_gap", margin_scale=0.5)
    assert [text(data, 0, k) for k in range(3)] == ["kind", "bad", "good"]
    np.testing.assert_allclose(data.margins, [[3.5, 1, 0], [1, 0, 0]])
    np.testing.assert_allclose(load([ranked], margin="score_gap", max_replies=2).margins, [7])
    pairs = load([{**pair, "prompt": f"film {i}"} for i in range(4)], margin="score_gap")
    whole = mix(pairs, load([{**ranked, "prompt": f"book {i}"} for i in range(4)], margin="score_gap"), 0.5, seed=0)
    np.testing.assert_allclose(whole.margins[[0, 7]], [[2, 0, 0], [7, 2, 0]])


def test_labels(load):
    rows = [
        {**PAIR, "labels": {"safety": ["safe", "unsafe"], "harm": [[], ["b", "a"]]}},
        {**PAIR, "labels": {"safety": [None, "safe"]}},
        {"prompt": "we", "response_a": "bad", "response_b": "good", "score_a": 1, "score_b": 2,
         "labels": {"safety": ["unsafe", "safe"]}},
    ]  # fmt: skip
    data = load(rows, multi_class=("safety=safe,unsafe",), multi_label=("harm=a,b,c",))
    np.testing.assert_array_equal(data.labels["safety"], [[0, 1], [-1, 0], [0, 1]])
    np.testing.assert_array_equal(data.labels["harm"][0], [[0, 0, 0], [1, 1, 0]])
    assert (data.labels["harm"][1:] == -1).all()
    batch = collate(data, np.asarray([2, 0]), (32, 16), 4)
    np.testing.assert_array_equal(batch.labels["safety"], [[0, 1], [0, 1], [0, 1], [0, 1]])
    assert load([PAIR, {**rows[0], "labels": None}]).fingerprint == load([PAIR, PAIR]).fingerprint
    others = load(
        [*rows[:2], {**rows[2], "labels": {"safety": ["safe", "unsafe"]}}], multi_class=("safety=safe,unsafe",)
    )
    assert others.fingerprint != load(rows, multi_class=("safety=safe,unsafe",)).fingerprint


def test_safety_bins(load):
    """Llama 2's four, by the best and the worst response; the last is left out where that is asked for."""
    kinds = [["safe", "unsafe"], ["safe", "safe"], ["unsafe", "unsafe"], ["unsafe", "safe"], [None, "safe"], ["a", "b"]]
    rows = [{**PAIR, "prompt": f"the film {i}", "labels": {"safety": kind}} for i, kind in enumerate(kinds)]
    second = {"prompt": "we", "response_a": "bad", "response_b": "good", "score_a": 1, "score_b": 2}
    rows += [{**second, "labels": {"safety": ["unsafe", "safe"]}}, {**PAIR, "labels": ["odd"]}, PAIR]
    data = load(rows)
    bins = [*SAFETY_BINS, None, None, "chosen safe only", None, None]
    assert data.extras["safety"] == bins
    section = data_section("Data", data)
    assert section.table is not None
    told = {what: count for what, count in section.table.rows if what.startswith("safety: ")}
    assert told == {
        "safety: chosen safe only": 2,
        "safety: both safe": 1,
        "safety: both unsafe": 1,
        "safety: rejected safe only": 1,
    }
    left = load(rows, exclude_unsafe_chosen=True)
    assert left.extras["safety"] == [one for one in bins if one != "rejected safe only"]
    assert left.dropped == {"the chosen response is unsafe, and another is safe": 1}
    assert "safety" not in load([PAIR, rows[-2]]).extras
    run = RewardRun(model="m", out="o", reward=RewardLossConfig(exclude_unsafe_chosen=True))
    (path := load.folder / "plain.jsonl").write_text(json.dumps(PAIR) + "\n")
    run = dataclasses.replace(run, data=dataclasses.replace(DATA, files=str(path)))
    with pytest.raises(InputError, match=r"--reward\.exclude_unsafe_chosen has no effect: no row of .*plain\.jsonl"):
        load_data(run, TOKENIZER, 320)


# ---------------------------------------------------------------- refused

TWO = {"prompt": "the film", "response_a": "bad", "response_b": "good"}


@pytest.mark.parametrize(
    ("row", "rules", "message"),
    [
        ({**TWO, "score_a": 3, "score_b": 3}, {}, r"a tie: no response is better .* --reward.ties drop"),
        ({**TWO, "annotator1": 1, "annotator2": 2}, {}, r"a tie: no response is better"),
        ({"prompt": "a", "responses": ["x", "y"], "ranks": [1, 1]}, {}, r"a tie: no response is better"),
        (TWO, {}, r"nothing says which response is better .*give scores"),
        ({**TWO, "score_a": 3}, {}, "a score of one response only"),
        ({**TWO, "score_a": 3, "score_b": math.nan}, {}, "'score_b' is not a finite number"),
        ({**TWO, "score_a": 3, "score_b": 4, "annotator1": 1}, {}, "scores and votes compare the responses twice"),
        ({**TWO, "annotator1": 3}, {}, "'annotator1' is no vote"),
        ({**PAIR, "rating": "superb"}, {"margin": "small"}, "a 'rating' outside the margin table"),
        (PAIR, {"margin": "small"}, r"no rating for --reward.margin small .*column 'rating'"),
        (PAIR, {"margin": "agreement"}, "no agreement for --reward.margin agreement"),
        ({**PAIR, "margin": -0.5}, {"margin": "column"}, r"a negative margin .*-0.5: the rejected response"),
        ({**PAIR, "margin": math.nan}, {"margin": "column"}, "'margin' is not a finite number"),
        ({**PAIR, "score_chosen": 1, "score_rejected": 2}, {"margin": "score_gap"}, "a negative score gap"),
        ({**PAIR, "agreement": 60}, {"margin": "agreement"}, r"a share of the annotators, in \[0, 1\]"),
        ({"prompt": "a", "responses": ["good"]}, {}, r"a list of 1 in 'responses' compares nothing"),
        ({"prompt": "a", "responses": ["x", "y", "z"], "rating": 3}, {"margin": "small"}, "--reward.max_replies 2"),
        ({"prompt": "a", "responses": ["x", "y", "z"]}, {"margin": "score_gap"}, "only scores give each pair"),
        ({"prompt": "a", "responses": ["x", "y"], "scores": [1]}, {}, r"must be a list of 2 numbers"),
        ({"prompt": "a", "responses": ["x", "y"], "scores": [1, 2], "ranks": [1, 2]}, {}, "rank the replies twice"),
        ({"prompt": "a", "responses": ["x", {"response": "y", "score": 1}]}, {}, "some entries of 'responses' have"),
        ({"prompt": "a", "responses": ["x", {"score": 1}]}, {}, "has no text"),
        ({"prompt": "a", "responses": ["x", " "]}, {}, "reply 2 is blank"),
        ({**TWO, "response_a": "", "score_a": 1, "score_b": 2}, {}, "'response_a' is blank"),
        ({"prompt": "a", "response": "b"}, {}, "no responses to compare"),
        ({"responses": ["x", "y"]}, {}, "missing field 'prompt'"),
        ({**PAIR, "labels": {"safety": ["safe"]}}, {"multi_class": ("safety=safe,unsafe",)}, "a list of 2 labels"),
        ({**PAIR, "labels": {"s": ["x", "odd"]}}, {"multi_class": ("s=x,y",)}, r"unknown class of 's' .*'odd'; known"),
        ({**PAIR, "labels": {"s": [["x"], "y"]}}, {"multi_class": ("s=x,y",)}, "a label of 's' must be one class"),
        ({**PAIR, "labels": {"s": ["x", None]}}, {"multi_label": ("s=x,y",)}, "must be a list of classes"),
        (PAIR, {"multi_class": ("safety=safe,unsafe",)}, "no row has a label of the head 'safety'"),
    ],
)  # fmt: skip
def test_bad_rows(load, row, rules, message):
    with pytest.raises(InputError, match=message) as raised:
        load([row], **rules)
    assert "\n" not in str(raised.value)


def test_ties_left_out_are_counted(load):
    tied = {**TWO, "score_a": 3, "score_b": 3}
    data = load([PAIR, tied, tied], ties="drop")
    assert len(data) == 1
    assert data.dropped == {"a tie: no response is better": 2}
    with pytest.raises(InputError, match=r"2 of 3 rows cannot be used: 2 x a tie.*first: row 2"):
        load([PAIR, tied, tied])


def test_ties_of_preferences(load):
    """Where pairs are made of scored answers, ties are left out by an option of their own, and nothing else is."""
    tied, broken = {**TWO, "score_a": 3, "score_b": 3}, {**TWO, "score_a": "?", "score_b": 1}
    scored = {**TWO, "score_a": 3, "score_b": 4}
    data = load([scored, tied, tied], load_preferences, ties="drop")
    assert (len(data), dict(data.dropped)) == (1, {"a tie: no response is better": 2})
    with pytest.raises(InputError, match=r"2 of 3 rows .*2 x a tie.*row 2: leave ties out with --dpo\.ties drop"):
        load([scored, tied, tied], load_preferences, ties="error")
    with pytest.raises(InputError, match=r"1 of 3 rows cannot be used: 1 x 'score_a' is not a finite number"):
        load([scored, tied, broken], load_preferences, ties="drop")


def test_identical_after_truncation(load):
    long = {"prompt": "the film", "chosen": "good " * 20 + "good", "rejected": "good " * 20 + "bad"}
    data = load([PAIR, long], data=DataConfig(max_length=24, max_prompt_length=16))
    assert len(data) == 1
    assert next(iter(data.dropped)) == "'chosen' and 'rejected' are the same tokens"
    ranked = {"prompt": "the film", "responses": ["good " * 20 + w for w in ("a", "b")] + ["bad"]}
    data = load([PAIR, ranked], data=DataConfig(max_length=24, max_prompt_length=16))
    assert data.dropped == {"two of the replies are the same tokens": 1}


# ---------------------------------------------------------------- parts and mixtures


def test_split_by_prompt_keeps_prompts_together(load):
    rows = [{**PAIR, "prompt": f"film {i % 10}", "rejected": f"bad {i}"} for i in range(40)]
    data = load(rows)
    rest, held = split_by_prompt(data, 0.2, seed=0)
    assert (len(rest), len(held)) == (32, 8)
    prompts = [{tuple(part.prompts[i]) for i in range(len(part))} for part in (rest, held)]
    assert not prompts[0] & prompts[1]
    assert sorted([*rest.row_numbers, *held.row_numbers]) == list(range(1, 41))
    assert {tuple(held.row_numbers)} != {tuple(split_by_prompt(data, 0.2, seed=1)[1].row_numbers)}
    with pytest.raises(InputError, match="leaves one side empty"):
        split_by_prompt(data, 0.01, seed=0)
    told = dataclasses.replace(data, dropped=Counter({"no answer": 3}))
    assert [part.dropped.total() for part in split_by_prompt(told, 0.2, seed=0)] == [3, 0], "told once"


def test_mixtures(load):
    first = load([{**PAIR, "prompt": f"film {i}", "rating": 3} for i in range(18)], margin="small")
    second = load(
        [{"prompt": f"book {i}", "responses": ["good", "bad"], "rating": 0, "source": "books"} for i in range(5)],
        margin="small",
    )
    whole = mix(first, second, 0.1, seed=0)
    assert len(whole) == 20
    told = f"18 of {first.source} + 2 drawn from the 5 of {second.source} (--mix 0.1): 20 of 23 rows; "
    assert whole.summary().startswith(told)
    assert whole.extras["source"].count("books") == 2
    assert whole.extras["source"][0] == "rows0"
    np.testing.assert_allclose(whole.margins, [1] * 18 + [0] * 2)
    assert (whole.row_numbers[18:] > 18).all()
    ranked = load([{"prompt": f"book {i}", "responses": ["good", "kind", "bad"]} for i in range(4)])
    wide = mix(load([{**PAIR, "prompt": f"film {i}"} for i in range(4)]), ranked, 0.5, seed=0)
    assert wide.response_lengths.shape == (8, 3)
    np.testing.assert_array_equal(wide.ranks[[0, 7]], [[0, 1, 3], [0, 1, 2]])
    assert text(wide, 7, 2) == "bad"
    with pytest.raises(InputError, match=r"takes 18 rows, and it has 5; change --mix"):
        mix(first, second, 0.5, seed=0)


# ---------------------------------------------------------------- to be scored


def test_responses_to_be_scored_keep_their_order(load):
    rows = [
        {**TWO, "score_a": 3, "score_b": 4},
        {"prompt": "a", "responses": ["x", "x", "y"]},
        {"prompt": "we like", "completion": "good"},
        {"messages": [{"role": "user", "content": "we"}, {"role": "assistant", "content": "kind"}]},
        PAIR,
    ]
    data = load(rows, reader=load_responses)
    assert [text(data, 0, k) for k in (0, 1)] == ["bad", "good"]
    np.testing.assert_array_equal(np.sum(data.response_lengths > 0, axis=1), [2, 3, 1, 1, 2])
    assert [text(data, i, 0) for i in (2, 3, 4)] == ["good", "kind", "very good"]


# ---------------------------------------------------------------- real files


@pytest.mark.parametrize(
    ("name", "rules", "rows", "longest", "blanks"),
    [
        ("pandalm/pairs.jsonl", {"margin": "agreement"}, 40, 2, r"5\.0%"),
        ("vicuna_reviews/pairs.jsonl", {"margin": "score_gap"}, 40, 2, None),
        ("oasst_zh/ranked.jsonl", {"max_replies": 4}, 60, 4, None),
        ("scored4_en/vicuna_eval.jsonl", {}, 40, 4, None),
    ],
)
def test_real_files(shared_data, name, rules, rows, longest, blanks):
    """Read as they stand, by their column names; what is left out are ties, blanks, and equal beginnings."""
    config = DataConfig(limit=60, max_length=512, template="chatml")
    rules = RewardLossConfig(ties="drop", **rules)
    source = str(shared_data / name)
    if blanks:
        with pytest.raises(InputError, match=rf"{blanks} of the rows, or leave them out with --on_bad_rows skip"):
            load_comparisons(source, TOKENIZER, config, rules, vocab_size=320)
    on_bad_rows = "skip" if blanks else "refuse"
    data = load_comparisons(source, TOKENIZER, config, rules, vocab_size=320, on_bad_rows=on_bad_rows)
    assert len(data) >= rows
    assert data.responses_per_prompt == longest
    assert len(data) + data.dropped.total() == 60
    assert (data.margins is None) == (rules.margin == "none")
