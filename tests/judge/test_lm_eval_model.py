"""Our models in lm-evaluation-harness: log-likelihoods and texts against Hugging Face's model and the harness's own."""

import json
import random
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny

from dpo_jax.cli import main
from dpo_jax.config import SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.judge import lm_eval_model
from dpo_jax.judge.lm_eval_model import ScoredModel, check_installed, sampling

CONTEXT = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model"), max_position=CONTEXT)


@pytest.fixture(scope="module")
def scored(folder: Path) -> ScoredModel:
    return ScoredModel(str(folder), mesh=runs.small_mesh(1, 1, 1), batch_size=4)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_log_likelihoods_are_those_of_the_hugging_face_model(scored: ScoredModel, reference: Any) -> None:
    import torch

    rng = random.Random(0)
    sizes = [(1, 1), (7, 3), (40, 9), (3, 60), (120, 20), (30, CONTEXT), (5, 2)]
    pairs = [([rng.randrange(3, 320) for _ in range(n)], [rng.randrange(3, 320) for _ in range(m)]) for n, m in sizes]
    greedy = reference.generate(torch.tensor([pairs[1][0]]), max_new_tokens=3, do_sample=False)[0, 7:].tolist()
    pairs.append((pairs[1][0], greedy))
    found = scored.loglikelihoods(pairs)
    assert [one[1] for one in found] == [False] * 7 + [True]
    for (context, continuation), (logp, _) in zip(pairs, found, strict=True):
        ids = (context + continuation)[-(CONTEXT + 1) :]
        with torch.no_grad():
            logps = reference(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        picked = logps[range(len(ids) - 1), ids[1:]][-len(continuation) :]
        assert np.isclose(logp, float(picked.sum()), atol=1e-3), (len(context), len(continuation))
    for bad in (([], [4]), ([4], []), ([4], [5] * (CONTEXT + 1))):
        with pytest.raises(InputError, match="both need a token"):
            scored.loglikelihoods([bad])


def test_generation_arguments() -> None:
    assert sampling({"until": ["\n"], "temperature": 0.0}, 512) == SampleConfig(
        max_new_tokens=256, temperature=0.0, stop_strings=("\n",)
    )
    drawn = sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 5}, 512)
    assert (drawn.temperature, drawn.top_p, drawn.max_new_tokens) == (0.7, 0.9, 5)
    assert sampling({"do_sample": False, "top_p": 0.9}, 512).top_p is None
    neutral = {"num_beams": 1, "top_k": 0, "top_p": 1.0, "min_p": None, "do_sample": True, "temperature": 0.5}
    assert sampling(neutral, 512) == SampleConfig(max_new_tokens=256, temperature=0.5)
    with pytest.raises(InputError, match="num_beams"):
        sampling({"num_beams": 4}, 512)
    with pytest.raises(InputError, match="256 new tokens"):
        sampling({}, 200)


def test_what_is_not_installed_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    def missing(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(lm_eval_model.metadata, "version", missing)
    assert main(["lm-eval", "--model", str(folder), "--tasks", "gsm8k"]) == 2
    assert "pip install 'dpo_jax[lm_eval]'" in capsys.readouterr().err
    monkeypatch.setattr(lm_eval_model.metadata, "version", lambda _: "0.5.0")
    with pytest.raises(InputError, match=r"0\.5\.0"):
        check_installed()
    for words in (["--tasks"], ["--tasks", "a", "--limit", "0"], ["--tasks", "a", "--num_fewshot", "-1"]):
        assert main(["lm-eval", "--model", str(folder), *words]) == 2


# ---------------------------------------------------------------- beside the harness's own model

CHOICE = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: {output}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of three tasks: one of choices, one of whole texts, one of written answers."""
    rng = random.Random(1)
    rows = [
        {
            "question": tiny.sentence(rng, 12) + (" " if i % 3 == 0 else ""),
            "choices": [tiny.sentence(rng, 1 + i % 4) for _ in range(4)],
            "answer": i % 4,
            "text": tiny.sentence(rng, 20 + 12 * i),
        }
        for i in range(12)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    more = {
        "choice": ("multiple_choice", "answer", "doc_to_choice: choices\nmetric_list:\n  - metric: acc"),
        "rolling": ("loglikelihood_rolling", '"{{text}}"', "metric_list:\n  - metric: word_perplexity"),
        "written": (
            "generate_until",
            '"{{choices[0]}}"',
            "generation_kwargs:\n  until: ['a']\n  max_gen_toks: 24\nmetric_list:\n  - metric: exact_match",
        ),
    }
    for name, (output, target, rest) in more.items():
        text = CHOICE.format(task=f"local_{name}", rows=data, output=output, target=target, more=rest)
        if name == "rolling":
            text = text.replace('"{{question}}"', '""')
        (folder / f"{name}.yaml").write_text(text)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("".join(json.dumps({"question": "q", "choices": [c, "a"], "answer": 1}) + "\n" for c in ("b", "")))
    text = CHOICE.format(
        task="empty",
        rows=empty,
        output="multiple_choice",
        target="answer",
        more="doc_to_choice: choices\ntarget_delimiter: ''",
    )
    (folder / "empty.yaml").write_text(text)
    (folder / "broken.yaml").write_text(CHOICE.format(task="broken", rows="no.jsonl", output="x", target="a", more=""))
    return folder


def _numbers(answer: Any) -> list[float]:
    """A log-likelihood, and of a choice whether it is greedy: the harness keeps them in lists of lists."""
    return [float(one) for one in np.ravel(np.asarray(answer, float))]


def test_the_harness_says_the_same_of_us_and_of_its_own_model(
    folder: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'dpo_jax[lm_eval]'")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = ["local_choice", "local_rolling", "local_written"]
    out, rows = tmp_path / "results.json", tmp_path / "rows.out.jsonl"
    words = ["lm-eval", "--model", str(folder), "--include_path", str(tasks), "--out", str(out), "--rows", str(rows)]
    assert main([*words, "--tasks", "local_*"]) == 0
    ours = json.loads(out.read_text())
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(folder), device="cpu", batch_size=4),
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks)),
    )
    for name, metric in zip(names, ("acc,none", "word_perplexity,none", "exact_match,none"), strict=True):
        assert np.isclose(ours["results"][name][metric], theirs["results"][name][metric], rtol=1e-4)
    assert ours["results"]["local_choice"]["acc,none"] == theirs["results"]["local_choice"]["acc,none"]
    said = [json.loads(line) for line in rows.read_text().splitlines()]
    for name in names:
        mine = {row["doc_id"]: row["resps"] for row in said if row["task"] == name}
        other = {row["doc_id"]: row["resps"] for row in theirs["samples"][name]}
        assert mine.keys() == other.keys()
        for at, responses in other.items():
            if name == "local_written":
                assert mine[at] == responses
                continue
            for one, two in zip(mine[at], responses, strict=True):
                values = (one[0], two[0]) if name == "local_choice" else (one, two)
                assert np.allclose(
                    np.asarray(values[0], float).ravel()[0], np.asarray(values[1], float).ravel()[0], atol=1e-3
                )
                assert name != "local_choice" or str(one[0][1]) == str(two[0][1])
    screen = capsys.readouterr()
    assert "|local_choice" in screen.out
    assert not ours.keys() & {"pretty_env_info", "git_hash", "upper_git_hash"}
    for task, message in (
        ("nothing_of_this_name", "no such task"),
        ("broken", "cannot be loaded"),
        ("empty", "task empty, row 1, choice 0: is an empty text"),
    ):
        assert main([*words[:5], "--tasks", task]) == 2
        assert message in capsys.readouterr().err
    rows.unlink()
    assert main([*words[:7], "--rows", str(out), "--tasks", "empty"]) == 2
    assert "would be written over" in capsys.readouterr().err


def test_groups_inside_groups_and_beside_tasks(
    folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'dpo_jax[lm_eval]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, inside in (("inner", ["local_choice"]), ("outer", ["inner", "local_rolling"])):
        mean = [{"metric": "acc", "weight_by_size": True}] if name == "inner" else []
        group = {"group": name, "task": inside, "aggregate_metric_list": mean}
        (tasks / f"{name}.yaml").write_text(json.dumps(group))
    words = ["lm-eval", "--model", str(folder), "--include_path", str(tasks), "--limit", "3", "--json"]
    own = {"local_choice", "local_rolling", "local_written"}
    for names, left_out in ((["inner", "local_written"], "local_rolling"), (["outer"], "local_written")):
        out = tmp_path / "groups.json"
        assert main([*words, "--tasks", *names, "--out", str(out)]) == 0
        assert own & json.loads(out.read_text())["results"].keys() == own - {left_out}
        screen = capfd.readouterr()
        assert "|Groups|" in screen.out.replace(" ", "")
        assert all(json.loads(line)["event"] in ("note", "progress", "warning") for line in screen.err.splitlines())


REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)


def test_a_template_that_refuses_system_messages(
    scored: ScoredModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'dpo_jax[lm_eval]'")
    own = tiny.folder(tmp_path / "model", max_position=CONTEXT)
    (own / "chat_template.jinja").write_text(REFUSES)
    words = ["lm-eval", "--model", str(own), "--tasks", "gsm8k", "--apply_chat_template"]
    assert main([*words, "--system_instruction", "Be brief."]) == 2
    said = capsys.readouterr().err
    assert "refuses this: no system; leave --system_instruction out" in said
    assert said.count("\n") == 1
    monkeypatch.setattr(scored.tokenizer, "chat_template", REFUSES)
    asked = [{"role": "system", "content": "of the task"}, {"role": "user", "content": "ask"}]
    assert lm_eval_model.adapter(scored).apply_chat_template(asked) == "ask"  # as the harness's `hf`
    monkeypatch.setattr(scored.tokenizer, "chat_template", "{{ raise_exception('never') }}")
    with pytest.raises(InputError, match="refuses a question"):
        lm_eval_model.adapter(scored).apply_chat_template(asked)
