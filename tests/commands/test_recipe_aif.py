"""`dpo-jax recipe aif` with writers and judge on loopback: UltraFeedback's schema, pairs, nothing asked twice."""

import json
import os
from collections import Counter
from pathlib import Path

import chat_server
import pytest

from dpo_jax.cli import main
from dpo_jax.commands.recipes import aif
from dpo_jax.complete.asking import writer_pool
from dpo_jax.config import AIFRun, WriterConfig
from dpo_jax.data.rows.comparisons import parse_comparison
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import read_lines, write_lines
from dpo_jax.judge.asked import feedback
from dpo_jax.judge.asked.judging import Item, Judgement, Reply, read
from dpo_jax.judge.rewards import file_of_judgements

GRADES = {"good": 5, "fair": 4, "poor": 2, "bad": 1}


def answer(body) -> str | dict:
    """Writers say who they are; the judge knows how good each is."""
    text = body["messages"][-1]["content"]
    if body["model"] != "judge":
        if body["model"] == "poor" and "prompt 3?" in text:
            return {"content": None, "refusal": "no"}
        return f"<think>hm</think>I am the {body['model']} one."
    if "<answer>" in text:  # the critique
        name = next(name for name in GRADES if f"the {name} one" in text)
        return f"Say more.\n\nRating: [[{2 * GRADES[name]}]]"
    if "prompt 5?" in text and "sound as sure" in text:
        return "I had rather not say."
    shown = text.split("<Text ")[1:]
    said = []
    for number, part in enumerate(shown, 1):
        name = next(name for name in GRADES if f"the {name} one" in part)
        grade = "N/A" if "sound as sure" in text else GRADES[name]
        kinds = "Type: 1, 3\nRationale: both hold\n" if "Kinds of" in text else ""
        said.append(f"Text {number}\n{kinds}Rating: {grade}\nRationale: it is {name}")
    return "\n\n".join(said)


def setting(folder: Path, url: str) -> list[str]:
    """Files of a pool and a judge, and the words of the command."""
    prompts = [{"prompt": f"What follows from prompt {i}?", "source": "made up"} for i in range(12)]
    prompts.append({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And now?"}]})
    write_lines(folder / "prompts.jsonl", prompts)
    write_lines(folder / "bad.jsonl", [{"prompt": p["prompt"], "response": "I am the bad one."} for p in prompts[:11]])
    lines = [f"- {{name: bad, weight: 0.5, responses: {folder / 'bad.jsonl'}}}"]
    for name in ("good", "fair", "poor"):
        lines.append(f"- {{name: {name}, endpoint: {{url: '{url}', model: {name}, temperature: 0.7}}}}")
    (folder / "pool.yaml").write_text("\n".join(lines) + "\n")
    (folder / "judge.yaml").write_text(f"ask: list\nendpoint: {{url: '{url}', model: judge, concurrency: 16}}\n")
    words = ["recipe", "aif", "--prompts", str(folder / "prompts.jsonl"), "--pool", str(folder / "pool.yaml")]
    return [*words, "--judge", f"judge:{folder / 'judge.yaml'}", "--out", str(folder / "out"), "--samples", "3"]


def test_from_prompts_to_pairs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, systems = tmp_path / "out", Counter()

    def answered(body):
        if body["model"] != "judge":
            systems[body["messages"][0]["content"] if body["messages"][0]["role"] == "system" else None] += 1
        return answer(body)

    with chat_server.serving(answered) as server:
        words = setting(tmp_path, server.url)
        assert main(words) == 0
        assert max(server.answered.values()) == 1
        asked = sum(server.asked.values())
        data, pairs = read_lines(out / "data.jsonl"), read_lines(out / "pairs.jsonl")
        assert len(data) == 13
        texts = {text for some in writer_pool.read_principles("ours", "en").values() for text in some}
        assert None not in systems, "each question has its principle"
        assert {text.partition("\n\n")[0] for text in systems} <= texts
        for row in data:
            assert len({one["model"] for one in row["completions"]}) == len(row["completions"]) == len(row["models"])
            for one in row["completions"]:
                assert one["response"] == f"I am the {one['model']} one."
                assert (one["principle"] is None) == (one["model"] == "bad")
                said = one["annotations"]
                assert said["helpfulness"]["Type"] == ["1", "3"]
                assert said["helpfulness"]["Rationale For Rating"] == f"it is {one['model']}"
                assert said["honesty"]["Rating"] == (None if row["row"] == 6 else "N/A")
                assert one["fine-grained_score"] == GRADES[one["model"]], "N/A leaves the mean"
                assert one["overall_score"] == 2 * GRADES[one["model"]]
                assert one["critique"].startswith("Say more.")
        fourth = data[3]["completions"]
        assert "poor" not in [one["model"] for one in fourth], "it refused twice, and its row goes on without it"
        assert data[12]["messages"][0] == {"role": "system", "content": "Be brief."}
        assert any("Be brief." in text and text != "Be brief." for text in systems)
        # What reads UltraFeedback reads it, and the pairs hold no principle.
        assert parse_comparison(data[0]).responses == tuple(one["response"] for one in data[0]["completions"])
        assert len(pairs) == 13
        assert all(row["score_chosen"] > row["score_rejected"] for row in pairs)
        assert not any(text in json.dumps(pairs) for text in texts)
        report = json.loads((out / "report.json").read_text())
        share = {row["model"]: row["share"] for row in report["models"]}
        assert share["good"] == 1.0
        assert share["bad"] == 0.0
        assert sum(row["chosen"] for row in report["models"]) == 13
        assert report["unparsed questions"] == {**dict.fromkeys(report["unparsed questions"], 0), "honesty": 1}
        whole = [(out / f"{name}.jsonl").read_bytes() for name in ("data", "pairs")]
        # As after a kill at the second writer: replies come from the disk, and it says the same.
        gone = [out / f"{name}.jsonl" for name in ("answers/2", "responses", "data", "pairs")]
        for path in [*gone, *out.glob("judged/*"), out / "report.json"]:
            path.unlink()
        marker = out / "run.json"
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"finished": False}))
        assert main(words) == 0
        assert sum(server.asked.values()) == asked
        assert [(out / f"{name}.jsonl").read_bytes() for name in ("data", "pairs")] == whole
        # The same responses, judged by a function.
        function = [*words[:-4], "--samples", "3", "--judge", "length", "--out", str(tmp_path / "by_length")]
        assert main([*function, "--principles", "none"]) == 0
        one = read_lines(tmp_path / "by_length" / "data.jsonl")[0]["completions"][0]
        assert one["annotations"] == {"score": {"Rating": one["overall_score"], "Rationale": ""}}
        assert one["custom_system_prompt"] is None
    capsys.readouterr()


def test_a_second_judge_rates_the_same_and_decides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The longest response is the good one, and the judge of lists knows that but where it does not say."""
    write_lines(tmp_path / "p.jsonl", [{"prompt": f"What follows from prompt {i}?"} for i in range(8)])
    for name, more in (("good", ", and it says most of all"), ("fair", ", and it says more"), ("poor", "")):
        said = [
            {"prompt": f"What follows from prompt {i}?", "response": f"I am the {name} one{more}"} for i in range(8)
        ]
        write_lines(tmp_path / f"{name}.jsonl", said)
    pool = [f"- {{name: {name}, responses: {tmp_path / name}.jsonl}}" for name in ("good", "fair", "poor")]
    (tmp_path / "pool.yaml").write_text("\n".join(pool) + "\n")

    def said(body):
        return "I had rather not say." if "prompt 5?" in body["messages"][-1]["content"] else answer(body)

    with chat_server.serving(said) as server:
        (tmp_path / "judge.yaml").write_text(f"ask: list\nendpoint: {{url: '{server.url}', model: judge}}\n")
        words = ["recipe", "aif", "--prompts", str(tmp_path / "p.jsonl"), "--pool", str(tmp_path / "pool.yaml")]
        words += ["--samples", "3", "--judge", "length"]
        beside = ["--beside", f"judge:{tmp_path / 'judge.yaml'}"]
        assert main([*words, *beside, "--out", str(tmp_path / "out")]) == 0
        assert sum(server.asked.values()) == 9, "one question a prompt, and one again"
        assert main([*words, "--out", str(tmp_path / "alone")]) == 0
    assert (tmp_path / "out" / "pairs.jsonl").read_bytes() == (tmp_path / "alone" / "pairs.jsonl").read_bytes()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["agreement"] == {
        "second judge": beside[1],
        "its prompt": "ours (en, version 1)",
        "pairs of responses": 24,
        "that the first tells apart": 24,
        "without a verdict of the second": 3,
        "both name the same response": "1.000 (1.000 to 1.000)",
        "Cohen's kappa": "1.000 (1.000 to 1.000)",
        "Gwet's AC1": "1.000 (1.000 to 1.000)",
    }
    assert "agreement" not in json.loads((tmp_path / "alone" / "report.json").read_text())
    assert "| both name the same response | 1.000" in (tmp_path / "out" / "report.md").read_text()
    capsys.readouterr()


def test_a_second_judge_takes_what_is_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Devices are of models, --reward_timeout of what may keep one waiting; its errors say --beside."""
    write_lines(tmp_path / "p.jsonl", [{"prompt": f"prompt {i}"} for i in range(4)])
    for name, said in (("a", "long, long"), ("b", "short")):
        write_lines(tmp_path / f"{name}.jsonl", [{"prompt": f"prompt {i}", "response": said} for i in range(4)])
    (tmp_path / "pool.yaml").write_text("".join(f"- {{name: {n}, responses: {tmp_path / n}.jsonl}}\n" for n in "ab"))
    (tmp_path / "mine.py").write_text(
        "import time\n\n\ndef slow(prompts, completions):\n    time.sleep(30)\n    return [0.0 for _ in completions]\n"
    )
    words = ["recipe", "aif", "--prompts", str(tmp_path / "p.jsonl"), "--pool", str(tmp_path / "pool.yaml")]
    words += ["--samples", "2", "--judge", "length"]

    def error(beside: str, *more: str, out: str = "out") -> str:
        assert main([*words, "--beside", beside, *more, "--out", str(tmp_path / out)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "judge.yaml").write_text(
        "ask: list\nendpoint: {url: 'http://127.0.0.1:9/v1', model: judge, retries: 0}\n"
    )
    assert "--mesh" not in error(f"judge:{tmp_path / 'judge.yaml'}", "--mesh.fsdp", "1")
    slow = f"{tmp_path / 'mine.py'}:slow"
    said = error(slow, "--reward_timeout", "1", out="slow")
    assert f"--beside {slow}: " in said
    assert "1 s" in said
    said = error("exact:answer", out="another")
    assert "--beside exact:answer: 'answer' is no column" in said


def of(
    folder: Path, judge: str, pool: str = "- {name: a, responses: r.jsonl}\n- {name: b, responses: r.jsonl}", **more
):
    """The stages of a recipe with `judge` (YAML) in `folder`, and what the pool wrote."""
    (folder / "pool.yaml").write_text(pool)
    (folder / "judge.yaml").write_text(judge)
    out = folder / "out"
    files = {"prompts": "p.jsonl", "pool": str(folder / "pool.yaml"), "judge": f"judge:{folder / 'judge.yaml'}"}
    made = aif.AIF(AIFRun(**{**files, "out": str(out), "samples": 2, **more}), out)  # pyright: ignore
    user = [{"role": "user", "content": "a"}]
    rows = [{"row": n, "messages": user, "completions": [{"response": "b"}, {"response": "c"}]} for n in range(1, 5)]
    write_lines(out / "responses.jsonl", rows)
    return made


def test_a_judge_that_was_changed_begins_its_file_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of it was changed after a kill: one file never holds two judges."""
    path, said, left = tmp_path / "out" / "judged" / "rating.jsonl", 0.0, [0]

    def put(items, prompt, asker, **more):
        left[0] -= 1
        if left[0] < 0:
            raise InputError("killed")
        return [Judgement((said, said), "tie", None, 0, ()) for _ in items]

    monkeypatch.setattr(file_of_judgements, "AT_ONCE", 1)
    monkeypatch.setattr(aif, "put", put)
    head = "ask: rating\nendpoint: {url: 'http://127.0.0.1:9/v1', model: "
    edits = ["m}", "m, temperature: 0.5}", "m}\nseed: 1", "m}\nscale: 5", "n}"]
    for said, edit in enumerate(edits):
        left[0] = 2
        with pytest.raises(InputError, match="killed"):
            of(tmp_path, head + edit)._rate("rating", path)
        rows = read_lines(path.with_name("rating.jsonl.part"))[1:]
        assert [row["scores"][0] for row in rows] == [said, said], "begun anew, and two rows done"
    left[0] = 2
    of(tmp_path, head + edits[-1])._rate("rating", path)
    assert [row["scores"][0] for row in read_lines(path)] == [4.0] * 4, "and the same judge goes on"


def test_draws_follow_the_weights() -> None:
    writers = [WriterConfig(name=f"w{i}", model="m", weight=w) for i, w in enumerate((6.0, 3.0, 1.0))]
    first, both = Counter(), Counter()
    for row in range(3000):
        found = writer_pool.drawn(writers, [True] * 3, 2, {}, f"0 {row}")
        assert found is not None
        first[found[0]["model"]] += 1
        both.update(one["model"] for one in found)
    assert [round(first[f"w{i}"] / 3000, 1) for i in range(3)] == [0.6, 0.3, 0.1]
    # Left out: w0 with .3 * 1/7 + .1 * 3/9, by hand.
    assert abs(both["w0"] / 3000 - (1 - 0.3 / 7 - 0.1 / 3)) < 0.02
    assert writer_pool.drawn(writers, [True, False, False], 2, {}, "k") is None


@pytest.mark.skipif("DPO_JAX_DATA" not in os.environ, reason="needs the published templates")
def test_ultrafeedbacks_own_templates() -> None:
    file = os.path.join(os.environ["DPO_JAX_DATA"], "judge_prompts", "ultrafeedback_templates.json")
    found = feedback.feedback_prompts(("truthfulness", "honesty"), critique=True, language="en", templates=file)
    assert all(prompt.published for prompt in found.values())
    text = "".join(
        f"#### Output for Text {i}\nType: {i}\nRationale: r\nRating: {i}\nRationale: s\n\n" for i in range(1, 5)
    )
    order = (2, 0, 3, 1)
    value = read(Reply(text, "stop"), order, found["truthfulness"], ())
    said = {"scores": [0] * 4, "replies": [{"order": order, "read": value}]}
    assert [one["Rating"] for one in feedback.list_annotations("truthfulness", said)] == ["2", "4", "1", "3"]
    assert feedback.list_annotations("truthfulness", said)[0]["Type"] == ["2"]
    assert read(Reply("### Feedback\nGood.\nOverall Score: 8", "stop"), (0,), found["critique"], ()) == 8
    assert Item(1, (), ("a",)).reference is None


def test_a_judge_of_the_writers_family_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By what the endpoint calls the models, and not by the names that the pool gives them."""
    with chat_server.serving(lambda body: "[[3]]") as server:
        end = f"endpoint: {{url: '{server.url}', model: "
        pool = f"- {{name: gpt, {end}lama-7b}}}}\n- {{name: other, {end}openai/gpt-4o-mini}}}}"
        made = of(tmp_path, f"ask: rating\n{end}gpt-4}}", pool)
        for name in ("rating", "again"):
            made._prompts[name] = made._prompts["rating"]
            made._rate(name, tmp_path / f"{name}.jsonl")
    assert [record.getMessage() for record in caplog.records if "family" in record.getMessage()] == [
        "the judge gpt-4 is of the family of openai/gpt-4o-mini, which it judges: judges favour their own (Zheng et al."
        " 2023)"
    ]


class Cut:
    """A model of this machine, whose last answer runs into its limit."""

    told = ""

    def __init__(self, name: str):
        self.name = name

    def ask(self, questions, done=lambda _: None):
        return [Reply(f"{self.name} {i}", "length" if i == 3 else "stop") for i, _ in enumerate(questions)]

    def close(self) -> None:
        pass


def test_what_was_cut_is_rated_and_in_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aif, "open_checkpoint", lambda source: None)
    cut = {"prompt": "p3", "response": "of a file", "finish_reason": "length"}
    write_lines(tmp_path / "r.jsonl", [cut, *({"prompt": f"p{i}", "response": "of a file"} for i in range(3))])
    write_lines(tmp_path / "p.jsonl", [{"prompt": f"p{i}"} for i in range(4)])
    pool = f"- {{name: a, model: m}}\n- {{name: b, responses: {tmp_path / 'r.jsonl'}}}\n- {{name: c, model: m}}"
    made = of(tmp_path, "ask: rating\nmodel: m", pool, prompts=str(tmp_path / "p.jsonl"), samples=3)
    made._writers = {name: Cut(name) for name in "ac"}  # pyright: ignore
    made._draw()
    out = tmp_path / "out"
    written = [out / "answers" / f"{n}.jsonl" for n in (1, 2, 3)]
    told = [made._write(writer, path) for writer, path in zip(made._pool, written, strict=True)]
    assert told == [{"responses": 4, "of them cut at their limit": 1}] * 3
    made._gather(written)
    scores = [{"scores": [1.0, 2.0, 3.0], "unparsed": 0, "replies": []}] * 4
    write_lines(out / "judged" / "rating.jsonl", scores)
    made._assemble()
    data = read_lines(out / "data.jsonl")
    assert [[one["finish_reason"] for one in row["completions"] if one["model"] != "b"] for row in data] == [
        *([["stop", "stop"]] * 3),
        ["length", "length"],
    ]
    made._pair()
    assert {row["row"] for row in read_lines(out / "pairs.jsonl")} == {1, 2, 3}
    made._report()
    assert json.loads((out / "report.json").read_text())["responses cut at their limit, in no pair"] == 3


TWO = "- {name: a, model: /no/m}\n- {name: c, model: n}"
FOUR = "\n".join(f"- {{name: {name}, model: m}}" for name in "abcd")
LIST = "ask: list\nendpoint: {url: 'http://127.0.0.1:9/v1', model: m}"


@pytest.mark.parametrize(
    ("judge", "more", "message"),
    [
        (LIST, {"judge_dtype": "float32"}, "--judge_dtype has no effect with --judge .*, which has options of its own"),
        (LIST, {"reward_timeout": 5.0}, "--reward_timeout has no effect"),
        (LIST.replace("list", "rating"), {"critique": False}, "--critique has no effect .* asks rating and gives one"),
        (LIST.replace("list", "rating"), {"templates": "t", "samples": 4, "pool": FOUR}, "--templates has no effect"),
        (LIST.replace("http:", "htp:"), {}, "endpoint.url htp://127.0.0.1:9/v1: begins with neither http"),
        ("ask: list\nmodel: /no/judge", {}, "judge.yaml: .*/no/judge"),
        (LIST, {"pool": TWO.replace("model: n", "endpoint: {url: notaurl, model: n}")}, "writer a: .*no/m"),
        (LIST, {"pool": "- {name: b, endpoint: {url: notaurl, model: n}}\n" + TWO}, "writer b: endpoint.url notaurl"),
        (LIST, {"critique": False, "rule": "ultrafeedback_binarized"}, "takes the overall score of the critique"),
    ],
)
def test_what_a_judge_does_not_use_is_refused(judge, more, message, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        of(tmp_path, judge, **more)


@pytest.mark.parametrize(
    ("pool", "words", "message"),
    [
        ("- {name: a, model: m}\n- {name: a, model: n}", [], "names a twice"),
        ("- {name: a, model: m}", [], "1 writers, and each prompt is answered by --samples 2 different ones"),
        ("a: b", [], "holds no list of writers"),
        ("- {name: a}", [], "writer 1: give one of model, responses and endpoint.url"),
        ("- {model: a}", [], "writer 1: name is missing"),
        ("- {name: a, model: m, weight: 0}", [], "writer 1: weight 0.0 must be positive"),
        ("- {name: a, speed: 3}", [], "speed is no option here"),
        ("- {name: a, model: m}\n- {name: b, model: n}", ["--aspects", "beauty"], "--aspects beauty: known are"),
        ("- {name: a, model: m}\n- {name: b, model: n}", ["--templates", "t.json"], "--templates takes four responses"),
        ("- {name: a, model: m}\n- {name: b, model: n}", ["--repair", "ultrafeedback"], "--repair has no effect"),
        ("- {name: a, model: m}\n- {name: b, model: n}", ["--principles", "p.json"], "p.json: not readable"),
        (FOUR, ["--templates", "no.json", "--samples", "4"], "--templates has no effect with --judge length"),
        (TWO, ["--aspects", "honesty"], "--aspects has no effect with --judge length, which gives one score"),
        (TWO, ["--no-critique"], "--critique has no effect with --judge length"),
        (TWO, ["--repair", "ultrafeedback", "--rule", "ultrafeedback_binarized"], "--repair has no effect with"),
        (TWO, ["--reward_timeout", "3"], "--reward_timeout has no effect: no judge is a URL, a function of yours"),
        (TWO, ["--judge_batch_size", "1"], "--judge_batch_size has no effect with --judge length"),
        (TWO, ["--judge_dtype", "float32"], "--judge_dtype has no effect with --judge length"),
        (TWO, ["--principles", "none", "--language", "zh"], "--language has no effect with --judge length"),
        ("- {name: a, model: m}\n- {name: b, model: n}", ["--judge", "judge:x.yaml"], "--judge judge:x.yaml: not read"),
        (TWO, ["--beside", "length"], "--beside length: is --judge itself; name another"),
        (TWO, ["--beside", "/no/m"], "--beside /no/m: is none of vader, length"),
        (TWO, ["--beside", "judge:x.yaml"], "--beside judge:x.yaml: not read"),
    ],
)  # fmt: skip
def test_one_line_errors(pool, words, message, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "pool.yaml").write_text(pool)
    own = ["recipe", "aif", "--prompts", str(tmp_path / "p.jsonl"), "--pool", str(tmp_path / "pool.yaml")]
    assert main([*own, "--judge", "length", "--samples", "2", "--out", str(tmp_path / "out"), *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_one_model_under_two_names_draws_twice(tmp_path: Path) -> None:
    seeds = Counter[int]()

    def answered(body):
        if body["model"] == "judge":
            return answer(body)
        seeds[body["seed"]] += 1
        return f"I am the {'good' if seeds[body['seed']] % 2 else 'poor'} one, drawn with {body['seed']}."

    with chat_server.serving(answered) as server:
        words = setting(tmp_path, server.url)
        writer = f"endpoint: {{url: '{server.url}', model: M, temperature: 0.7}}"
        names = "".join(f"- {{name: {name}, weight: {weight}, {writer}}}\n" for name, weight in (("a", 1), ("b", 2)))
        (tmp_path / "pool.yaml").write_text(names)
        assert main([*words, "--samples", "2", "--principles", "none"]) == 0
    assert list(seeds.values()) == [13, 13]
    for row in read_lines(tmp_path / "out" / "data.jsonl"):
        assert len({one["response"] for one in row["completions"]}) == 2
