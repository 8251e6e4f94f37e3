"""`dpo-jax judge`: an endpoint, a model of this machine and a function, killed and gone on with, against people."""

import json
import os
import random
import re
from pathlib import Path

import chat_server
import jax
import numpy as np
import pytest
import tiny

from dpo_jax import mesh
from dpo_jax.cli import main
from dpo_jax.complete.asking.chat_client import Question
from dpo_jax.complete.asking.local_model import LocalModel
from dpo_jax.complete.asking.reply_cache import ReplyCache
from dpo_jax.config import SampleConfig
from dpo_jax.judge.asked.judging import expected_score, family, one_score
from dpo_jax.judge.figures import agreement as figures, reward_bench
from dpo_jax.report import statistics
from dpo_jax.weights.pretrained import load_pretrained

DATA = Path(os.environ.get("DPO_JAX_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pairs(path: Path, count: int = 12) -> Path:
    """Pairs of answers whose worth is their number of stars; every third is a tie."""
    found = [
        {
            "prompt": f"q{i}",
            "response_a": "*" * a + f" {i}",
            "response_b": "*" * b + f" {i}",
            "score_a": a,
            "score_b": b,
            "model_a": "gpt-3",
        }
        for i in range(count)
        for a, b in [((3, 1), (1, 4), (2, 2))[i % 3]]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def stars(text: str, begin: str, end: str) -> int:
    return text.split(begin)[1].split(end)[0].count("*")


def in_order(body) -> str:
    """A judge that counts stars; the last question of all is answered with nonsense."""
    text = body["messages"][-1]["content"]
    a, b = stars(text, "<answer A>", "</answer A>"), stars(text, "<answer B>", "</answer B>")
    return "Hm.\n" + ("[[C]]" if a == b else "[[A]]" if a > b else "[[B]]")


def judge(data, out, url, *more) -> int:
    return main(
        ["judge", "--data", str(data), "--out", str(out), "--endpoint.url", url, "--endpoint.model", "m", *more]
    )


def test_pairs_in_both_orders_and_agreement(tmp_path, capsys) -> None:
    data, out = pairs(tmp_path / "d.jsonl"), tmp_path / "o.jsonl"
    with chat_server.serving(in_order) as server:
        assert judge(data, out, server.url, "--ask", "pair", "--agreement") == 0
        assert len(server.answered) == 20  # both orders of equal answers are one question
    found = rows(out)
    assert [row["verdict"] for row in found] == ["a", "b", "tie"] * 4
    assert not any(row["flipped"] for row in found)
    agreement = json.loads((tmp_path / "o.jsonl.agreement.json").read_text())
    assert agreement["accuracy"][0] == agreement["kappa"][0] == 1
    assert agreement["comparable"] is False
    with chat_server.serving(lambda body: "[[A]]") as server:  # the first, always
        assert judge(data, tmp_path / "first.jsonl", server.url, "--ask", "pair", "--agreement") == 0
    assert {row["verdict"] for row in rows(tmp_path / "first.jsonl")} == {"tie"}
    agreement = json.loads((tmp_path / "first.jsonl.agreement.json").read_text())
    assert (agreement["flip_share"][0], agreement["accuracy"][0], agreement["tie_rate"][0]) == (1, 0, 1)
    assert "not comparable with published" in " ".join(capsys.readouterr().err.split())


def test_unparsed_is_asked_again_once_and_kept(tmp_path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"q{i}", "response": f"r{i}"}) + "\n" for i in range(4)))
    replies = {"r0": "[[7]]", "r1": "no idea", "r2": "[[3]] or [[4]]", "r3": "Rating: [[1"}

    def answer(body):
        which = re.search(r"r\d", body["messages"][-1]["content"])[0]
        if which == "r1" and "seed" in body:
            return "Rating: 5/10"
        return {"content": replies[which], "finish_reason": "length" if which == "r3" else "stop"}

    with chat_server.serving(answer) as server:
        assert judge(data, tmp_path / "o.jsonl", server.url) == 0
        assert len(server.answered) == 4 + 3
        before = sum(server.asked.values())
        (tmp_path / "o.jsonl").unlink()  # as a run that was killed before it wrote anything
        assert judge(data, tmp_path / "p.jsonl", server.url, "--cache", str(tmp_path / "o.jsonl.replies")) == 0
        assert sum(server.asked.values()) == before
        assert (
            judge(data, tmp_path / "q.jsonl", server.url, "--cache", str(tmp_path / "o.jsonl.replies"), "--scale", "9")
            == 0
        )
        assert sum(server.asked.values()) > before  # another version of the prompt
    found = rows(tmp_path / "p.jsonl")
    assert [row["scores"] for row in found] == [[7], [5], [None], [None]]
    assert [row["unparsed"] for row in found] == [0, 0, 1, 1]
    assert [len(row["replies"]) for row in found] == [1, 2, 2, 2]


def test_lists_are_shuffled_and_mapped_back(tmp_path) -> None:
    data, rng = tmp_path / "d.jsonl", random.Random(1)
    worth = [rng.sample(range(1, 6), 4) for _ in range(8)]
    data.write_text(
        "".join(
            json.dumps({"prompt": f"q{i}", "responses": ["*" * n for n in row], "scores": row}) + "\n"
            for i, row in enumerate(worth)
        )
    )

    def answer(body):
        texts = re.findall(r"<(?:Text|回答) (\d)>\n(\**)", body["messages"][-1]["content"])
        return "\n\n".join(
            f"#### Output for Text {i}\n**Rating**: {len(s)}\nRationale: {len(s)} stars" for i, s in texts
        )

    with chat_server.serving(answer) as server:
        assert judge(data, tmp_path / "o.jsonl", server.url, "--ask", "list", "--agreement", "--language", "zh") == 0
    found = rows(tmp_path / "o.jsonl")
    assert [row["scores"] for row in found] == worth
    assert len({tuple(row["replies"][0]["order"]) for row in found}) > 3
    assert json.loads((tmp_path / "o.jsonl.agreement.json").read_text())["accuracy"][0] == 1


def test_a_checklist(tmp_path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"prompt": "q", "response": "r"}) + "\n")
    with chat_server.serving(lambda body: "1. yes\n2. no") as server:
        assert (
            judge(data, tmp_path / "o.jsonl", server.url, "--ask", "checklist", "--criteria", "short", "true {x}") == 0
        )
    assert rows(tmp_path / "o.jsonl")[0]["scores"] == [0.5]


def test_published_prompts_are_read_unchanged(tmp_path) -> None:
    source = DATA / "judge_prompts"
    if not source.exists():
        pytest.skip("judge_prompts is not in $DPO_JAX_DATA")
    data, seen = pairs(tmp_path / "d.jsonl", 1), []
    with chat_server.serving(lambda body: seen.append(body["messages"]) or "[[A]]") as server:
        more = ("--prompts", str(source / "fastchat_judge_prompts.jsonl"), "--prompt_name")
        assert judge(data, tmp_path / "o.jsonl", server.url, *more, "pair-v2") == 0
        assert judge(data, tmp_path / "p.jsonl", server.url, *more, "pair-math-v1") == 2  # no reference in the row
    first = "[The Start of Assistant A's Answer]\n*** 0\n[The End of Assistant A's Answer]"
    assert sum(first in messages[1]["content"] for messages in seen) == 1, "in one of two orders, which come at once"
    assert seen[0][0]["content"].startswith("Please act as an impartial judge")


def test_a_model_of_this_machine(tmp_path) -> None:
    folder = tiny.folder(tmp_path / "tiny", layers=1)
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"prompt": "q", "response": f"r{i}"}) + "\n" for i in range(2)))
    prompts = tmp_path / "p.jsonl"  # short: the tiny model's context is
    prompts.write_text(json.dumps({"name": "n", "type": "single", "system_prompt": "", "prompt_template": "{answer}"}))
    args = ["judge", "--data", str(data), "--model", str(folder), "--template", "zephyr", "--batch_size", "8"]
    args += ["--prompts", str(prompts), "--prompt_name", "n", "--sample.max_new_tokens", "4"]
    args += ["--cache", str(tmp_path / "replies")]
    assert main([*args, "--out", str(tmp_path / "o.jsonl")]) == 0
    assert [row["scores"] for row in rows(tmp_path / "o.jsonl")] == [[None], [None]]  # of random weights
    kept = sorted(tmp_path.glob("replies/*/*.json"))
    assert len(kept) == 4  # each was asked twice
    assert main([*args, "--out", str(tmp_path / "p.jsonl.again")]) == 0
    assert sorted(tmp_path.glob("replies/*/*.json")) == kept


def test_the_likeliest_first_tokens_of_a_model_are_its_own(tmp_path) -> None:
    folder = tiny.folder(tmp_path / "tiny", layers=1)
    one = mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    local = LocalModel(
        str(folder), ReplyCache(tmp_path), SampleConfig(), mesh=one, batch_size=2, dtype="float32", template="zephyr"
    )
    asked = [Question(({"role": "user", "content": text},), logprobs=5) for text in ("a", "b b b", "c c")]
    found = local.ask(asked)
    model, variables = load_pretrained(folder)
    for question, reply in zip(asked, found, strict=True):
        ids = local._ids(question, first=True)
        logps = jax.nn.log_softmax(
            model.apply(variables, model.apply(variables, np.asarray([ids]))[0, -1], method="logits")
        )
        np.testing.assert_allclose([p for _, p in reply.top], np.sort(logps)[::-1][:5], atol=1e-5)


def test_functions_and_errors(tmp_path, capsys) -> None:
    data = pairs(tmp_path / "d.jsonl")
    assert main(["judge", "--data", str(data), "--out", str(tmp_path / "o.jsonl"), "--function", "length"]) == 0
    assert [row["verdict"] for row in rows(tmp_path / "o.jsonl")][:3] == ["a", "b", "tie"]
    # A function gets the other columns of a row, as under `dpo-jax grpo`; what it lacks is told before any row.
    numbered = tmp_path / "n.jsonl"
    worded = [{k: v.replace("*", "x") if isinstance(v, str) else v for k, v in row.items()} for row in rows(data)]
    numbered.write_text("".join(json.dumps({**row, "right": row["response_a"]}) + "\n" for row in worded))
    (mine := tmp_path / "mine.py").write_text(
        "def f(prompts, responses, right): return [float(a == b) for a, b in zip(responses, right)]\n"
    )
    base = ["judge", "--data", str(numbered), "--out"]
    for name, function in (("exact", "exact:right"), ("own", f"{mine}:f")):
        assert main([*base, str(tmp_path / name), "--function", function]) == 0
        assert [row["scores"] for row in rows(tmp_path / name)][:2] == [[1, 0], [1, 0]]
    base = ["judge", "--data", str(data), "--out", str(tmp_path / "p.jsonl")]
    for more, words in (
        (["--function", "exact:right"], "'right' is no column of the prompts; they have"),
        (["--function", f"{mine}"], f"--function {mine}: which function of the file? write {mine}:FUNCTION"),
        (["--function", "nothing"], "--function nothing: is none of"),
        (["--function", f"{mine}:f"], "takes 'right', which is no column of the prompts"),
        ([], "give one judge"),
        (["--function", "length", "--ask", "pair"], "--ask has no effect with --function"),
        (["--model", "x", "--scale", "5", "--ask", "pair"], "--scale has no effect with --ask pair"),
        (["--model", "x", "--ask", "checklist"], "needs --criteria"),
        (["--endpoint.url", "http://a/v1"], "endpoint.model is missing"),
        (["--function", "length", "--endpoint.budget", "3"], "no effect without endpoint.url"),
    ):
        assert main([*base, *more]) == 2
        assert words in capsys.readouterr().err.replace("\n", "")


def test_figures_by_hand() -> None:
    assert expected_score([("4", np.log(0.5)), (" 5", np.log(0.25)), ("x", np.log(0.25))], 1, 5) == pytest.approx(
        13 / 3
    )
    assert expected_score([("4", np.log(0.05))], 1, 5) is None
    assert family("openai/gpt-4o") == family("gpt-3.5-turbo") == "gpt"
    assert one_score([5.0] * 20) == (5, 1)
    assert one_score([5.0, 4.0] * 10) is None
    shares = np.array([[20, 5], [10, 15]]) / 50
    assert statistics.cohen_kappa(shares) == pytest.approx(0.4)  # Cohen 1960: (.7 - .5) / (1 - .5)
    q = (0.5 + 0.6) / 2
    chance = 2 * q * (1 - q)
    assert statistics.gwet_ac1(shares) == pytest.approx((0.7 - chance) / (1 - chance))


def test_reward_bench_s_table_by_hand() -> None:
    def some(subset: str, right: int, wrong: int, ties: int = 0, unparsed: int = 0) -> list:
        verdicts = [0] * right + [1] * wrong + [2] * ties + [-1] * unparsed
        return [(figures.PairVerdict(i, 0, verdict, None), subset) for i, verdict in enumerate(verdicts)]

    given = some("alpacaeval-easy", 3, 1) + some("mt-bench-easy", 1, 0, ties=1)
    given += some("math-prm", 1, 1) + some("hep-go", 4, 0) + some("hep-rust", 1, 2, unparsed=1) + some("mine", 1, 0)
    given.append((figures.PairVerdict(9, 2, 0, None), "hep-go"))  # people's tie: no pair
    found = reward_bench.by_subset(*zip(*given, strict=True))
    accuracies = {name: one["accuracy"] for name, one in found["subsets"].items()}
    assert accuracies == {
        "alpacaeval-easy": 0.75,
        "mt-bench-easy": 0.75,
        "math-prm": 0.5,
        "hep-go": 1,
        "hep-rust": 0.375,
        "mine": 1,
    }
    assert found["subsets"]["hep-go"]["pairs"] == 4
    # Weights: code 4 and 4, mathematics as much as all code, 8.
    assert found["sections"]["Reasoning"] == {"pairs": 10, "accuracy": (8 * 0.5 + 4 * 1 + 4 * 0.375) / 16}
    assert found["sections"]["Chat"] == {"pairs": 6, "accuracy": 0.75}
    assert found["overall"] == (0.75 + found["sections"]["Reasoning"]["accuracy"]) / 2
    assert len([name for names in reward_bench.SECTIONS.values() for name in names]) == 23


def test_a_function_on_subsets(tmp_path, capsys) -> None:
    given = [("longer one", "short", "llmbar-natural"), ("short", "longer one", "hep-go"), ("same", "size", "hep-go")]
    lines = [{"prompt": "q", "chosen": a, "rejected": b, "subset": subset} for a, b, subset in given]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    words = ["judge", "--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "o.jsonl")]
    assert main([*words, "--function", "length", "--agreement"]) == 0
    found = json.loads((tmp_path / "o.jsonl.agreement.json").read_text())
    assert {name: one["accuracy"] for name, one in found["sections"].items()} == {"Chat Hard": 1, "Reasoning": 0.25}
    assert found["overall"] == 0.625
    assert "mean of the sections" in capsys.readouterr().out
