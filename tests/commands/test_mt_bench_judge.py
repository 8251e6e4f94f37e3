"""`dpo-jax mt-bench judge`: FastChat's judgement files out of a stub endpoint's replies, read by `mt-bench show`."""

import json
import os
import shutil
from pathlib import Path

import chat_server
import pytest
import tiny

from dpo_jax.cli import main
from dpo_jax.commands import mt_bench_judge
from dpo_jax.complete.asking.local_model import LocalModel
from dpo_jax.complete.asking.reply_cache import Reply
from dpo_jax.files.jsonl import read_lines, write_lines
from dpo_jax.judge.asked.mt_bench import Prompts

DATA = Path(os.environ.get("DPO_JAX_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
PROMPTS = DATA / "judge_prompts" / "fastchat_judge_prompts.jsonl"
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["q81 one", "q81 two"]},
    {"question_id": 111, "category": "math", "turns": ["q111 one", "q111 two"], "reference": ["ref one", "ref two"]},
]
TEMPLATES = {
    "single-v1": "{question}|{answer}",
    "single-math-v1": "{question}|{ref_answer_1}|{answer}",
    "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
    "single-math-v1-multi-turn": "{ref_answer_1}|{ref_answer_2}|{question_1}|{answer_1}|{question_2}|{answer_2}",
    "pair-v2": "{question}|{answer_a}|{answer_b}",
    "pair-math-v1": "{question}|{ref_answer_1}|{answer_a}|{answer_b}",
    "pair-v2-multi-turn": "{question_1}|{question_2}|{answer_a_1}|{answer_a_2}|{answer_b_1}|{answer_b_2}",
    "pair-math-v1-multi-turn": "{ref_answer_2}|{question_2}|{answer_a_1}|{answer_a_2}|{answer_b_1}|{answer_b_2}",
}


@pytest.fixture
def given(tmp_path):
    """Questions, the answers of models a (one star), b (two stars) and c, and short prompts of FastChat's names."""
    write_lines(tmp_path / "q.jsonl", QUESTIONS)
    for model, text in (("a", "*"), ("b", "**"), ("c", "c")):
        rows = [
            {
                "question_id": q["question_id"],
                "answer_id": "x",
                "model_id": model,
                "choices": [{"index": 0, "turns": [f"{text} {model}1", f"{text} {model}2"]}],
                "tstamp": 0.0,
            }
            for q in QUESTIONS
        ]
        write_lines(tmp_path / f"{model}.jsonl", rows)
    prompts = [
        {"name": k, "type": "pairwise" if k[0] == "p" else "single", "system_prompt": "", "prompt_template": t}
        for k, t in TEMPLATES.items()
    ]
    write_lines(tmp_path / "p.jsonl", prompts)
    return tmp_path


def run(folder, server, out, *more, models="ab", prompts="p.jsonl"):
    words = ["--questions", folder / "q.jsonl", "--answers", *(folder / f"{m}.jsonl" for m in models)]
    words += ["--out", folder / out]
    words += ["--prompts", folder / prompts] if prompts else []
    words += ["--endpoint.url", server, "--endpoint.model", "j"] if server else []
    return main(["mt-bench", "judge", *map(str, words), *map(str, more)])


def shown(path, capsys):
    capsys.readouterr()
    assert main(["mt-bench", "show", "--judgments", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def stars(body):
    """[[number of stars]]; nothing that can be read for the second answers of b to question 81."""
    text = body["messages"][-1]["content"]
    return "no idea" if "q81 two" in text and "b2" in text else f"Rating: [[{text.split('|')[-1].count('*')}]]"


def test_single(given, capsys):
    with chat_server.serving(stars) as server:
        assert run(given, server.url, "s.jsonl") == 0
        asked = sum(server.asked.values())
        assert asked == 8, "nothing is asked again"
        (given / "s.jsonl").unlink()
        assert run(given, server.url, "s.jsonl") == 0
        assert sum(server.asked.values()) == asked
    rows = read_lines(given / "s.jsonl")
    fields = {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
    assert all(row.keys() == fields for row in rows)
    said = {(row["question_id"], row["model"], row["turn"]): row for row in rows}
    assert {at: row["score"] for at, row in said.items()} == {
        (81, "a", 1): 1, (81, "a", 2): 1, (111, "a", 1): 1, (111, "a", 2): 1,
        (81, "b", 1): 2, (81, "b", 2): -1, (111, "b", 1): 2, (111, "b", 2): 2,
    }  # fmt: skip
    assert said[81, "a", 1]["judge"] == ["j", "single-v1"]
    assert said[111, "b", 2]["judge"] == ["j", "single-math-v1-multi-turn"]
    assert said[111, "b", 1]["user_prompt"] == "q111 one|ref one|** b1"
    assert said[111, "b", 2]["user_prompt"] == "ref one|ref two|q111 one|** b1|q111 two|** b2"
    found = shown(given / "s.jsonl", capsys)
    assert found["left_out"] == {"unparsed": 1, "error": 0}
    assert {name: (one["mean"], one["n"]) for name, one in found["models"].items()} == {"a": (1, 4), "b": (2, 3)}


def test_pairs_in_both_orders(given, capsys):
    def answer(body):
        answers = [part for part in body["messages"][-1]["content"].split("|") if part[0] in "*c"]
        first, second = answers[0], answers[-1]
        if "c" in first + second:
            return "[[A]]" if "a" in first + second else "perhaps"
        return "[[A]]" if first.count("*") > second.count("*") else "[[B]]"

    with chat_server.serving(answer) as server:
        options = ("--mode", "pairwise-all")
        assert run(given, server.url, "all.jsonl", *options, models="abc") == 0
        assert sum(server.asked.values()) == 3 * 4 * 2
        base = ("--mode", "pairwise-baseline", "--baseline", "a", "--cache", given / "all.jsonl.replies")
        assert run(given, server.url, "base.jsonl", *base) == 0
        assert sum(server.asked.values()) == 3 * 4 * 2, "the same orders, the other way round"
    rows = read_lines(given / "all.jsonl")
    said = {(row["model_1"], row["model_2"]): (row["g1_winner"], row["g2_winner"]) for row in rows}
    assert said == {
        ("a", "b"): ("model_2", "model_2"),
        ("a", "c"): ("model_1", "model_2"),
        ("b", "c"): ("error", "error"),
    }
    assert rows[0].keys() == {
        "question_id", "model_1", "model_2", "g1_winner", "g2_winner", "judge", "g1_user_prompt", "g1_judgment",
        "g2_user_prompt", "g2_judgment", "turn", "tstamp",
    }  # fmt: skip
    assert rows[0]["g1_user_prompt"] == "q81 one|* a1|** b1"
    assert rows[0]["g2_user_prompt"] == "q81 one|** b1|* a1"
    found = shown(given / "all.jsonl", capsys)
    assert found["left_out"]["error"] == 4
    assert [found["models"][m][k] for m, k in (("b", "wins"), ("a", "losses"), ("a", "ties"))] == [4, 4, 4]
    assert {(r["model_1"], r["model_2"], r["g1_winner"]) for r in read_lines(given / "base.jsonl")} == {
        ("b", "a", "model_1")
    }


@pytest.mark.skipif(not PROMPTS.exists(), reason="judge_prompts is not in $DPO_JAX_DATA")
def test_fastchats_prompts_and_ours(given):
    seen = []

    def answer(body):
        seen.append(body["messages"])
        return "[[7]] [[A]]" if "Assistant B" in str(body) else "[[7]]"

    with chat_server.serving(answer) as server:
        one = ("--endpoint.concurrency", "1")
        assert run(given, server.url, "f.jsonl", *one, models="a", prompts=PROMPTS) == 0
        assert seen[0][0]["content"] == "You are a helpful assistant."
        assert "[Question]\nq81 one\n\n[The Start of Assistant's Answer]\n* a1\n[The End" in seen[0][1]["content"]
        assert "### Reference answer:\nref two\n\n<|The End" in seen[3][1]["content"]
        write_lines(given / "r.jsonl", [{"question_id": 111, "model_id": "g", "choices": [{"turns": ["r1", "r2"]}]}])
        del seen[:]
        ours = ("--references", given / "r.jsonl", "--language", "zh")
        assert run(given, server.url, "o.jsonl", *one, *ours, models="a", prompts=None) == 0
    assert "q111 one\n\n[参考答案]\nr1\n" in seen[1][1]["content"]
    for text in ("q111 one", "* a1", "q111 two\n\n[参考答案]\nr1\n\nr2", "<回答>\n* a2"):
        assert text in seen[3][1]["content"]
    assert read_lines(given / "o.jsonl")[0]["judge"] == ["j", "ours (zh, version 1)"]


@pytest.mark.parametrize(
    ("reply", "score", "winner"),
    [
        ("Rating: [[8]]", 8, None),
        ("[[3]], then [[4.5]]", 3, None),
        ("[7] of [[9.5]]", 9.5, None),
        ("[7] and no other", 7, None),
        ("[[11]]", 11, None),
        ("Score: 5", None, None),
        ("I say 7/10, [rating: 8]", None, None),
        ("[[8/10]]", None, None),
        ("[[B]], not [[A]]", None, "A"),
        ("[[C]]", None, "tie"),
        ("[[b]] A", None, None),
    ],
)
def test_replies_to_fastchats_prompts_are_read_as_fastchat_reads_them(given, reply, score, winner):
    said = Reply(reply, "stop", prompt_tokens=0, completion_tokens=0)
    for pairs, expected in ((False, score), (True, winner)):
        prompts = Prompts(str(given / "p.jsonl"), "en", pairs=pairs)
        assert prompts.read(said, prompts.of("writing", 1)) == expected


def test_a_file_of_another_judge_or_another_command_is_not_written_over(given, capsys):
    with chat_server.serving(stars) as server:
        assert run(given, server.url, "o.jsonl") == 0
        assert run(given, server.url, "o.jsonl") == 0  # the same again
        assert run(given, server.url, "o.jsonl", "--endpoint.model", "other") == 2
        assert "is there, and holds no judgements of other; remove it" in capsys.readouterr().err.replace("\n", " ")
        (given / "mine.csv").write_text("a,b\n1,2\n")
        assert run(given, server.url, "mine.csv") == 2
    assert (given / "mine.csv").read_text() == "a,b\n1,2\n"
    kept = (given / "a.jsonl").read_text()
    answer = ["mt-bench", "answer", "--questions", given / "q.jsonl", "--model", tiny.folder(given / "t", layers=1)]
    assert main([*map(str, answer), "--out", str(given / "a.jsonl"), "--model_id", "b"]) == 2
    assert "holds no answers of b" in capsys.readouterr().err.replace("\n", " ")
    assert (given / "a.jsonl").read_text() == kept
    rows = given / "rows.jsonl"
    write_lines(rows, [{"prompt": "q", "responses": ["a", "bc"]}])
    assert main(["judge", "--data", str(rows), "--function", "length", "--out", str(given / "a.jsonl")]) == 2
    assert main(["generate", "--model", str(given / "t"), "--prompt", "q", "--out", str(given / "a.jsonl")]) == 2
    assert (given / "a.jsonl").read_text() == kept


@pytest.mark.slow
def test_a_model_of_this_machine(given):
    folder = tiny.folder(given / "tiny", layers=1)
    local = ("--model", folder, "--sample.max_new_tokens", "4", "--batch_size", "8")
    assert run(given, None, "l.jsonl", *local, models="a") == 0
    assert [row["score"] for row in read_lines(given / "l.jsonl")] == [-1] * 4  # of random weights


@pytest.mark.slow
def test_an_unfinished_file_is_gone_on_with_by_the_same_judge_alone(given, monkeypatch):
    """Not with other weights at the same path, nor in another dtype."""
    folder, asked = tiny.folder(given / "tiny", layers=1), []
    plain = LocalModel.ask

    def ask(self, questions, done=lambda _: None):
        asked.append(len(questions))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return plain(self, questions, done)

    monkeypatch.setattr(mt_bench_judge, "_AT_ONCE", 1)
    monkeypatch.setattr(LocalModel, "ask", ask)
    local = ("--model", folder, "--sample.max_new_tokens", "4", "--batch_size", "8")
    for change, missing in ((), 3), (("--dtype", "bfloat16"), 4), ("weights", 4):
        asked.clear()
        run(given, None, "l.jsonl", *local, models="a")
        assert (given / "l.jsonl.part").exists()
        if change == "weights":
            shutil.rmtree(folder)
            tiny.folder(folder, layers=1, seed=1)
        asked[:] = [0, 0]
        assert run(given, None, "l.jsonl", *local, *(() if change == "weights" else change), models="a") == 0
        assert sum(asked) == missing
        (given / "l.jsonl").unlink()


def test_errors(given, capsys):
    short = read_lines(given / "a.jsonl")[:1]
    write_lines(given / "short.jsonl", short)
    write_lines(given / "turns.jsonl", [short[0] | {"choices": [{"turns": ["one"]}]}])
    write_lines(given / "other.jsonl", [short[0] | {"question_id": 5}])
    write_lines(given / "few.jsonl", read_lines(given / "p.jsonl")[:1])
    url = "http://127.0.0.1:9/v1"
    for options, more, words in (
        ({"models": ["short"]}, [], "a has no answer to 1 of 2 questions, 111"),
        ({"models": ["turns"]}, [], "question 81 has 2 turns, and 1 answers"),
        ({"models": ["other"]}, [], "question 5 is not in --questions"),
        ({"models": "aa"}, [], "a answers question 81 twice"),
        ({"models": "a"}, ["--mode", "pairwise-all"], "holds a alone"),
        ({}, ["--mode", "pairwise-baseline"], "needs --baseline"),
        ({}, ["--mode", "pairwise-baseline", "--baseline", "z"], "--baseline z is none of --answers"),
        ({}, ["--baseline", "a"], "--baseline has no effect with --mode single"),
        ({}, ["--language", "zh"], "--language has no effect with --prompts"),
        ({}, ["--model", "x"], "give one judge"),
        ({}, ["--endpoint.temperature", "1"], "--endpoint.temperature"),
        ({"prompts": "few.jsonl"}, [], "has no prompt"),
    ):
        assert run(given, url, "o.jsonl", *more, **options) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
    write_lines(given / "q.jsonl", [{k: v for k, v in q.items() if k != "reference"} for q in QUESTIONS])
    assert run(given, url, "o.jsonl") == 2
    assert "question 111 is of math, which is judged beside a reference answer, and has none" in capsys.readouterr().err
    assert not (given / "o.jsonl").exists()
