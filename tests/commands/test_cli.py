"""The command line as words: parsing, names, recipes, one-line errors. No command does its work here."""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from dpo_jax import __version__, cli, voice
from dpo_jax.config import DPORun, names
from dpo_jax.config.command_line import completion
from dpo_jax.config.options import left_out
from dpo_jax.errors import InputError, Stopped

ROOT = Path(__file__).resolve().parents[2]
GIVEN = ["--model", "m", "--data", "d.jsonl", "--out", "o"]


def error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of complaint of `dpo-jax words...`, which must exit with code 2."""
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("dpo-jax: error: ")
    assert said.err.count("\n") == 1
    return said.err.removeprefix("dpo-jax: error: ").strip()


def test_sections_and_renamed_options() -> None:
    words = [*GIVEN, "--eval_data", "e.jsonl", "--data.max_length", "64", "--dpo.loss", "ipo", "--lora.rank=8"]
    run = cli.parse("dpo", [*words, "--lora.targets", "q_proj", "v_proj", "--optimizer.clip_norm", "None"])
    assert type(run) is DPORun
    assert (run.model, run.data.files, run.out, run.eval_data) == ("m", "d.jsonl", "o", "e.jsonl")
    assert (run.data.max_length, run.data.max_prompt_length) == (64, None)
    assert (run.dpo.loss, run.lora.rank, run.lora.targets) == ("ipo", 8, ("q_proj", "v_proj"))
    assert run.optimizer.clip_norm is None


def test_defaults_are_those_of_config() -> None:
    assert cli.parse("dpo", GIVEN) == DPORun(model="m", data="d.jsonl", out="o")


@pytest.mark.parametrize("spelled", ["--on-bad-rows", "--on_bad_rows"])
def test_hyphens_and_underscores(spelled: str) -> None:
    run = cli.parse("dpo", [*GIVEN, spelled, "skip", "--data.max-prompt-length", "9", "--data.no-shuffle"])
    assert (run.on_bad_rows, run.data.max_prompt_length, run.data.shuffle) == ("skip", 9, False)


def test_switches_take_true_and_false() -> None:
    words = [*GIVEN, "--gatt.train", "false", "--gatt.holdout", "0.5", "--data.shuffle=false"]
    with pytest.raises(InputError, match=r"no effect with --gatt\.no_train"):
        cli.parse("gatt", words)
    run = cli.parse("gatt", [*GIVEN, "--gatt.evaluate-only", "true", "--data.shuffle=true", "--gatt.train"])
    assert (run.gatt.evaluate_only, run.data.shuffle, run.gatt.train) == (True, True, True)
    assert run.data.max_length == 4096, "the section's own default"
    assert cli.main(["gatt", *GIVEN, "--gatt.train", "perhaps"]) == 2


@pytest.mark.parametrize("word", cli.COMMANDS)
def test_every_command_parses_and_explains_itself(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    required = [name for name, needed in cli.option_names(word).items() if needed]
    if word == "generate":
        required.append("prompt")
    if word in ("ppo", "grpo"):  # or an environment
        required.append("reward")
    if word == "extend-vocab":
        required.append("tokenizer")
    if word in ("judge", "mt-bench judge"):
        required.append("model")
    if word == "judge":  # or --sheet
        required.append("out")
    if word == "recipe llama3" and "sft_data" not in required:
        required.append("sft_data")
    first = [str(ROOT / "configs" / "zephyr_ddpo.py")] if word in ("plan", "bench") else []
    several = {"models": ("y",), "runs": ("y",)}  # one model is no average
    parsed = cli.parse(
        word, first + [part for name in required for part in (f"--{name}", "zsh", *several.get(name, ()))]
    )
    assert type(parsed) is cli.COMMANDS[word].options
    assert cli.main([word, "--help"]) == 0
    text = capsys.readouterr().out
    assert "{None}|" not in text, "of what may be left out help says what it is"
    for name in cli.option_names(word):
        assert f"--{name}" in text
    assert len(re.findall(r"^  --[\w.]+", text, re.MULTILINE)) == len(
        set(re.findall(r"^  --[\w.]+", text, re.MULTILINE))
    )
    examples = re.findall(r"^  dpo-jax (.+)", text, re.MULTILINE)
    assert examples
    for line in (shlex.split(one.partition(" > ")[0]) for one in examples):
        word_of, *rest = cli.split_recipe_name(line)
        assert word_of == word
        cli.parse(word, rest)
    for name in left_out(cli.COMMANDS[word].options):
        assert f"--{name} " not in text


def test_every_option_is_documented() -> None:
    files = sorted((ROOT / "dpo_jax" / "config").rglob("*.py"))
    for cls in (node for file in files for node in ast.parse(file.read_text()).body):
        if isinstance(cls, ast.ClassDef):
            assert ast.get_docstring(cls), cls.name
            if any(ast.unparse(base) == "NamedTuple" for base in cls.bases):
                continue  # a value made of options
            for field, after in zip(cls.body, [*cls.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and not re.search(
                    r": \w+Config = |= no_option", ast.unparse(field)
                ):
                    text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert text, f"{cls.name}.{ast.unparse(field.target)} has no text for --help"


def test_help_begins_with_what_most_runs_need(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["dpo", "zephyr_ddpo", "--help"]) == 0
    text = capsys.readouterr().out
    head, first, *rest = re.split(r"\n(?=[a-z][a-z ]*:(?: .*)?\n)", text[text.index("examples:") :])
    assert "dpo-jax dpo --model smollm2" in head
    shown = re.findall(r"^  --([\w.]+)", first, re.MULTILINE)
    assert shown[:3] == ["model", "data", "out"]
    assert len(shown) == 10
    assert {"dpo.beta", "lora.rank"} < {*shown}
    assert "(default: 5e-07)" in first, "the CONFIG's own learning rate"
    assert [part.partition(":")[0] for part in rest][:2] == ["other options", "data"]
    assert max(map(len, text.replace(head, "").splitlines())) <= 100


COMPLETED = {
    "dpo-jax dp": "dpo",
    "dpo-jax dpo --optimizer.sch": "--optimizer.schedule",
    "dpo-jax dpo --optimizer.schedule=con": "--optimizer.schedule=constant",
    "dpo-jax dpo --dpo.loss apo_d": "apo_down",
    "dpo-jax dpo --lora.targets q_proj v": "v_proj",
    "dpo-jax dpo --lora.rank 8 --lora.al": "--lora.alpha",
    "dpo-jax dpo --data.shuffle t": "true",
    "dpo-jax dpo zephyr_q": "zephyr_qlora",
    "dpo-jax dpo --online --online.sam": "--online.samples",
    "dpo-jax mt-bench s": "show",
    "dpo-jax configs show llama3_rounds_": "llama3_rounds_dpo",
    "dpo-jax plan dp": "dpo dpo_llama2",
    "dpo-jax plan dpo --online --online.sam": "--online.samples",
    "dpo-jax plan grpo --ppo.group_s": "--ppo.group_size",
}


def nobody(folder: Path) -> dict[str, str]:
    """The environment of someone without settings."""
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8", "TERM": "dumb"}


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here: apt-get install fish")
def test_completion_in_fish(tmp_path: Path) -> None:
    (tmp_path / ".script").write_text(completion.script("fish"))
    ask = "source .script; for c in $argv; complete -C $c | string join ' '; end; true"
    done = subprocess.run(
        ["fish", "-c", ask, *COMPLETED], capture_output=True, text=True, cwd=tmp_path, env=nobody(tmp_path), check=True
    )
    told = dict(zip(COMPLETED, (line.replace("\t", " ") for line in done.stdout.splitlines()), strict=True))
    for typed, expected in COMPLETED.items():
        assert told[typed].startswith(expected), typed


ZSH = """
zmodload zsh/zpty
zpty inner "zsh -f -i"
zpty -w inner "PS1='> '; source ./script; print rea''dy"
zpty -r inner seen '*ready*> *'
for typed in "$@"; do
  zpty -n -w inner "$typed"$'\\t'"#end"
  zpty -r inner seen '*#end*'
  print -r -- ${(V)seen//[[:cntrl:]]/ }
  zpty -n -w inner $'\\x15'
done
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here: apt-get install zsh")
def test_completion_in_zsh(tmp_path: Path) -> None:
    """A zsh that is typed into: what stands on its line after the tabulator key."""
    (tmp_path / "script").write_text(completion.script("zsh"))
    typed = [words for words, expected in COMPLETED.items() if " " not in expected]
    done = subprocess.run(
        ["zsh", "-f", "-c", ZSH, "zsh", *typed],
        capture_output=True, text=True, cwd=tmp_path, env=nobody(tmp_path), check=True, timeout=60,
    )  # fmt: skip
    for words, line in zip(typed, done.stdout.splitlines(), strict=True):
        assert f"{words.rpartition(' ')[0]} {COMPLETED[words]}" in line, words


def test_names_of_other_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--lr; here that is --optimizer.learning_rate (" in error(capsys, "dpo", *GIVEN, "--lr", "1e-4")
    assert "here that is --out" in error(capsys, "dpo", *GIVEN, "--output-dir", "x")
    assert "--num_generations; here that is --ppo.group_size" in error(capsys, "grpo", *GIVEN, "--num_generations", "4")
    assert "here that is" not in error(capsys, "dpo", *GIVEN, "--num_generations", "4"), "it has no such option"
    assert "a run goes on by the same command" in error(capsys, "dpo", *GIVEN, "--resume_from_checkpoint", "x")
    assert "did you mean --optimizer.learning_rate" in error(capsys, "dpo", *GIVEN, "--learning_rate", "1")
    every = {name for word in cli.COMMANDS for name in cli.option_names(word)}
    assert {name for here in names.ELSEWHERE.values() for name in here} <= every


@pytest.mark.parametrize(("word", "heading"), [("dpo", "## Options of DPO"), ("grpo", "## Options of GRPO")])
def test_every_name_of_the_table_is_answered_as_the_table_has_it(word: str, heading: str) -> None:
    page = (ROOT / "docs" / "coming_from.md").read_text()
    lines = page.split(heading)[1].split("\n## ")[0].splitlines()
    known, asked = cli.option_names(word), 0
    for cells in [line.strip("|").split("|") for line in lines if line.startswith("| ")][1:]:
        here = set(re.findall(r"--([\w.]+)", cells[-1]))
        for name in re.findall(r"`(\w+)[`:]", "|".join(cells[:-1])):
            if name in known or not here & known.keys() or name in ("template", "LogCompletionsCallback"):
                continue
            told = set(re.findall(r"--([\w.]+)", cli._guess(name, known, "--")))
            assert told & here, f"{name}: {told or 'nothing'}, and the table says {here}"
            asked += 1
    assert asked > 12


def test_greedy_leaves_out_what_defaults_filter_with() -> None:
    assert cli.parse("chat", ["--model", "m"]).sample.top_p == 0.9
    assert cli.parse("chat", ["--model", "m", "--sample.temperature", "0"]).sample.top_p is None
    with pytest.raises(InputError, match="have no effect at temperature 0"):
        cli.parse("chat", ["--model", "m", "--sample.temperature", "0.0", "--sample.top_p", "0.5"])


def test_help_as_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help"]) == 0
    overview = capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == overview
    assert cli.main(["help", "sft"]) == 0
    assert "usage: dpo-jax sft" in capsys.readouterr().out


def test_completion_in_bash(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(completion.script("bash"))
    ask = 'source ./script; try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _dpo_jax; echo "${COMPREPLY[*]}"; }\n'
    cases = {
        ("dpo-jax", "dp"): "dpo",
        ("dpo-jax", "mt-bench", "s"): "show",
        ("dpo-jax", "dpo", "zephyr_q"): "zephyr_qlora",
        ("dpo-jax", "recipe", "llama3", "llama3_r"): "llama3_rounds llama3_rounds_dpo",
        ("dpo-jax", "dpo", "--optimizer.sch"): "--optimizer.schedule",
        ("dpo-jax", "dpo", "--optimizer.schedule", ""): "constant linear cosine",
        ("dpo-jax", "sft", "--data.sh"): "--data.shuffle",
        ("dpo-jax", "dpo", "--onl"): "--online",
        ("dpo-jax", "dpo", "--online", "--online.sam"): "--online.samples",
        ("dpo-jax", "recipe", "llama3", "--js"): "--json",
        ("dpo-jax", "configs", "s"): "show",
        ("dpo-jax", "configs", "show", "llama3_r"): "llama3_rounds llama3_rounds_dpo",
        ("dpo-jax", "completion", ""): "bash zsh fish",
        ("dpo-jax", "reward", "tulu3_"): "tulu3_rm",
        ("dpo-jax", "dpo", "--optimizer.schedule", "="): "constant linear cosine",
        ("dpo-jax", "dpo", "--optimizer.schedule", "=", "co"): "constant cosine",
        ("dpo-jax", "dpo", "--optimizer.schedule=l"): "--optimizer.schedule=linear",
        ("dpo-jax", "dpo", "--dpo.loss", "apo"): "apo_zero apo_down apo_zero_unpaired",
        ("dpo-jax", "dpo", "--lora.targets", "q_proj", "v"): "v_proj",
        ("dpo-jax", "dpo", "--lora.rank", "8", "--lora.al"): "--lora.alpha",
        ("dpo-jax", "dpo", "--lora.rank", "8", "--dpo.bet"): "--dpo.beta",
        ("dpo-jax", "dpo", "--data.shuffle", ""): "true false",
        ("dpo-jax", "plan", "rm_llama2_7"): "rm_llama2_7b_v5e16",
        ("dpo-jax", "plan", "dpo", "--online", "--online.sam"): "--online.samples",
        ("dpo-jax", "configs", "--q"): "",
        ("dpo-jax", "dpo", "--model", "mod"): "",
    }
    lines = [f"try {shlex.join(words)}" for words in cases]
    done = subprocess.run(
        ["bash", "-c", ask + "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines() == list(cases.values())
    assert done.stderr == ""


def test_how_it_talks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.parse("dpo", [*GIVEN, "--quiet"]) == cli.parse("dpo", GIVEN) == cli.parse("dpo", ["--json", *GIVEN])
    assert cli.parse("win-rate", ["--answers", "a", "--against", "b", "--judgments", "j", "--json"]).json
    assert cli.main(["dpo", *GIVEN, "--quiet", "--json"]) == 2
    assert "one of them" in json.loads(capsys.readouterr().err)["text"]
    assert "--quiet has no effect" in error(capsys, "configs", "--quiet")
    assert cli.main(["dpo", *GIVEN, "--json", "--data.limit", "0"]) == 2
    said = json.loads(capsys.readouterr().err)
    assert (said["event"], said["code"]) == ("error", 2)
    assert "--data.limit 0 must be at least 1" in said["text"]
    assert error(capsys, "dpo", *GIVEN, "--quiet", "--data.limit", "0").startswith("--data.limit")
    for words in (["--json", "true"], ["--json=true"], ["--json", "--no_quiet"]):
        assert cli._split_voice("lm-eval", ["--tasks", "gsm8k", *words]) == (["--tasks", "gsm8k"], "json")
    for words in (["--json", "false"], ["--json=false"], ["--json", "--no-json"]):
        assert cli._split_voice("dpo", words) == ([], "lines")
    assert "is a switch" in error(capsys, "dpo", *GIVEN, "--quiet=2")
    assert "unknown option ---quiet" in error(capsys, "dpo", *GIVEN, "---quiet")
    assert cli.main(["dpp", "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["code"] == 2
    voice.tell({"event": "progress", "figures": {"loss": float("nan"), "a": -float("inf"), "step": 1}})
    assert json.loads(capsys.readouterr().err)["figures"] == {"loss": None, "a": None, "step": 1}


def test_what_is_logged_is_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "semi.csv").write_text("prompt;chosen;rejected\na;b;c\n")
    words = ["--data", str(tmp_path / "semi.csv"), "--function", "length", "--out", str(tmp_path / "o"), "--json"]
    assert cli.main(["judge", *words]) == 0
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert any("semicolons" in one.get("text", "") for one in said)


def test_a_mistyped_file_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.folder(tmp_path / "runs" / "first")
    (tmp_path / "pairs.jsonl").write_text("")
    (tmp_path / "mine.py").write_text("")
    model = ["--model", str(tmp_path / "runs" / "first"), "--out", str(tmp_path / "o")]
    said = error(capsys, "dpo", *model, "--data", str(tmp_path / "pair.josnl"))
    assert f"did you mean {tmp_path / 'pairs.jsonl'}?" in said
    said = error(capsys, "eval", "--model", str(tmp_path / "runs" / "frist"), "--data", str(tmp_path / "pairs.jsonl"))
    assert f"did you mean {tmp_path / 'runs' / 'first'}?" in said
    assert f"did you mean {tmp_path / 'mine.py'}?" in error(capsys, "dpo", str(tmp_path / "mime.py"))


def test_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--data.max_lengh; did you mean --data.max_length?" in error(capsys, "dpo", *GIVEN, "--data.max_lengh", "3")
    assert "did you mean --optimizer.learning_rate?" in error(capsys, "dpo", *GIVEN, "--learning-rate", "3")
    assert "--optimizer.lr" in error(capsys, "dpo", *GIVEN, "--optimizer.lr=3")
    assert "unknown option -m" in error(capsys, "dpo", "-m", "x")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert error(capsys, "demos").startswith("unknown command demos; did you mean demo?")
    # Algorithms that are not there are unknown, not stubs.
    assert error(capsys, "dispo").startswith("unknown command dispo; did you mean dpo?; commands are demo, dpo, sft")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "m"], "missing --data and --out"),
        ([*GIVEN, "--data.max_length", "many"], "--data.max_length: invalid literal for int() with base 10: 'many'"),
        ([*GIVEN, "--dpo.loss", "dop"], "invalid choice 'dop' for argument '--dpo.loss'"),
        ([*GIVEN, "--dpo.loss"], "Missing value for argument '--dpo.loss'"),
        ([*GIVEN, "stray"], "Unrecognized options: stray"),
        ([*GIVEN, "--data.shuffle", "False"], "Unrecognized options: False"),
        # A section's own check comes through word for word.
        ([*GIVEN, "--data.max_length", "8", "--data.max_prompt_length", "8"], "--data.max_length 8 must exceed"),
        ([*GIVEN, "--dpo.simpo_gamma", "1"], "--dpo.simpo_gamma has no effect with --dpo.loss sigmoid; it"),
        ([*GIVEN, "--lora.alpha", "4"], "--lora.alpha has no effect without --lora.rank"),
        ([*GIVEN, "--lora.rank", "4", "--lora.alpha", "0"], "--lora.alpha 0.0 must be positive"),
        ([*GIVEN, "--train.batch_size", "8", "--train.accumulate", "3"], "--train.batch_size 8 does not divide by"),
        ([*GIVEN, "--train.steps", "1", "--train.epochs", "1"], "give --train.steps or --train.epochs, not both"),
    ],
)  # fmt: skip
def test_one_line_for_what_does_not_parse(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error(capsys, "dpo", *words).startswith(expected)


@pytest.mark.parametrize("word", ["eval", "logps", "score", "prepare", "rejection", "ppo"])
def test_a_second_file_where_one_is_taken(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = error(capsys, word, "--model", "m", "--data", "a.jsonl", "b.jsonl")
    assert said.startswith(f"--data takes one source in dpo-jax {word}, and b.jsonl is a second: run it for each, or")
    assert "--data takes one source" in error(capsys, word, "--data=a.jsonl", "b.jsonl")


def test_an_option_without_effect_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--data.shuffle has no effect in dpo-jax eval" in error(capsys, "eval", *GIVEN[:4], "--data.shuffle")
    assert "--beta has no effect without --reference" in error(capsys, "eval", *GIVEN[:4], "--beta", "1")
    assert "without --samples" in error(capsys, "eval", *GIVEN[:4], "--sample.top_k", "5")
    assert "--dpo.beta" in error(capsys, "logps", *GIVEN, "--dpo.beta", "1")


# Chains of commands have tests of their own.
RECIPES = [path for path in sorted((ROOT / "configs").glob("*.py")) if "dpo-jax recipe " not in path.read_text()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes(path: Path) -> None:
    text = path.read_text()
    (word,) = [word for word in cli.COMMANDS if f"dpo-jax {word} configs/{path.name}" in text]
    if word == "extend-vocab":  # the one recipe that trains nothing
        run = cli.parse(word, [str(path), "--model", "m", "--data", "a", "b", "--to", "o", "--pieces", "9"])
        assert (run.data, run.pieces) == (("a", "b"), 9)
    else:
        open_too = {
            "llama2_rm_safe": ["--mix_data", "h.jsonl"],
            "llama2_ppo": ["--reward", "h", "--safety_reward", "s"],
            "ppo_llama2_7b_v5p8": ["--reward", "h", "--safety_reward", "s"],
            "ppo_llama2_7b_a100x8": ["--reward", "h", "--safety_reward", "s"],
            "llama2_rejection": ["--reward", "h"],
            "smollm2_rejection": ["--eval_data", "e"],
        }
        more = open_too.get(path.stem, [])
        run = cli.parse(word, [str(path), *GIVEN, *more, "--optimizer.learning_rate", "0.7"])
        assert (run.data.files, run.optimizer.learning_rate) == ("d.jsonl", 0.7)
    assert (type(run), run.model) == (cli.COMMANDS[word].options, "m")
    assert any(year in text for year in ("2022", "2023", "2024")), "a recipe says where its numbers come from"


def test_recipes_hold_the_published_numbers() -> None:
    paper = cli.parse("dpo", [str(ROOT / "configs" / "dpo_paper.py"), *GIVEN])
    assert (paper.optimizer.name, paper.optimizer.learning_rate) == ("rmsprop", 1e-6)
    assert (paper.dpo.beta, paper.train.batch_size, paper.optimizer.clip_norm) == (0.1, 64, 10.0)
    assert (paper.optimizer.warmup_steps, paper.data.max_length, paper.data.max_prompt_length) == (150, 512, 256)
    safety = cli.parse("reward", [str(ROOT / "configs" / "llama2_rm_safe.py"), *GIVEN, "--mix_data", "h.jsonl"])
    assert (safety.mix, safety.reward.margin, safety.optimizer.floor, safety.train.batch_size) == (
        0.1,
        "small",
        0.1,
        512,
    )
    chat = cli.parse("ppo", [str(ROOT / "configs" / "llama2_ppo.py"), *GIVEN, "--reward", "h", "--safety_reward", "s"])
    assert (chat.train.batch_size, chat.ppo.minibatches, chat.ppo.epochs, chat.ppo.clip) == (512, 8, 1, 0.2)
    assert (chat.optimizer.learning_rate, chat.optimizer.b2, chat.ppo.kl_coefficient) == (1e-6, 0.95, 0.01)
    best = cli.parse("rejection", [str(ROOT / "configs" / "llama2_rejection.py"), *GIVEN, "--reward", "h"])
    assert (best.rejection.samples, best.rejection.temperatures, best.rejection.pool) == (10, (1.2, 1.3), "all")
    assert (best.optimizer.learning_rate, best.train.batch_size, best.data.max_length) == (2e-5, 64, 4096)
    zephyr = cli.parse("dpo", [str(ROOT / "configs" / "zephyr_ddpo.py"), *GIVEN])
    assert (zephyr.train.batch_size, zephyr.train.epochs, zephyr.optimizer.learning_rate) == (32, 3, 5e-7)
    llama2 = cli.parse("sft", [str(ROOT / "configs" / "llama2_pretrain.py"), *GIVEN])
    assert llama2.train.batch_size * llama2.data.max_length == 4 * 2**20
    made = llama2.optimizer
    assert (made.b1, made.b2, made.eps, made.weight_decay, made.clip_norm) == (0.9, 0.95, 1e-5, 0.1, 1.0)
    assert (made.schedule, made.learning_rate, made.floor, made.warmup_steps) == ("cosine", 3e-4, 0.1, 2000)
    llama3 = cli.parse("dpo", [str(ROOT / "configs" / "llama3_dpo.py"), *GIVEN])
    assert (llama3.dpo.nll_coefficient, llama3.dpo.mask_format_tokens, llama3.optimizer.learning_rate) == (
        0.2,
        True,
        1e-5,
    )


def test_several_sources_are_one_word_or_many() -> None:
    many = ["--model", "m", "--data", "a.jsonl:0.7", "b.txt:0.3", "--out", "o", "--data.kind", "text"]
    assert cli.parse("sft", many).data.files == "a.jsonl:0.7,b.txt:0.3"
    for words in (["--data", "a:1,b:2"], ["--data=a:1", "b:2"], ["--data", "a:1", "b:2"]):
        run = cli.parse("sft", ["--model", "m", *words, "--eval_data", "e", "f", "--out", "o"])
        assert (run.data.files, run.eval_data) == ("a:1,b:2", "e,f")


def test_a_recipe_leaves_open_what_the_command_line_must_give(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "configs" / "dpo_paper.py")
    assert error(capsys, "dpo", path, "--data", "d", "--out", "o").startswith("missing --model: the CONFIG leaves")
    assert error(capsys, "dpo", path, "--model", "m", "--out", "o").startswith("missing --data")
    model = cli.parse("dpo", [str(ROOT / "configs" / "smollm2_hh_dpo.py"), "--data", "d", "--out", "o"]).model
    assert model == "smollm2"


def test_steps_on_the_command_line_replace_a_recipes_epochs() -> None:
    run = cli.parse("dpo", [str(ROOT / "configs" / "zephyr_ddpo.py"), *GIVEN, "--train.steps", "5"])
    assert (run.train.steps, run.train.epochs) == (5, None)
    run = cli.parse("dpo", [str(ROOT / "configs" / "zephyr_ddpo.py"), *GIVEN, "--optimizer.warmup_steps", "5"])
    assert (run.optimizer.warmup_steps, run.optimizer.warmup_ratio) == (5, None)
    path = str(ROOT / "configs" / "llama2_rm_helpful.py")
    assert cli.parse("reward", [path, *GIVEN]).optimizer.warmup_min == 5
    run = cli.parse("reward", [path, *GIVEN, "--optimizer.warmup_steps", "9"])
    assert (run.optimizer.warmup_steps, run.optimizer.warmup_min) == (9, None)


def test_bad_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def recipe(text: str) -> str:
        (tmp_path / "c.py").write_text(text)
        return error(capsys, "dpo", str(tmp_path / "c.py"), *GIVEN)

    assert "c.py: must define `config`, a dpo_jax.config.DPORun; it is NoneType" in recipe("x = 1")
    assert "c.py: SyntaxError" in recipe("config = = 1")
    assert "c.py: ModuleNotFoundError" in recipe("import no_such_module_at_all")
    assert "c.py: --lora.rank -1 must be" in recipe("from dpo_jax.config import LoraConfig\nLoraConfig(rank=-1)")
    assert "no such CONFIG file" in error(capsys, "dpo", str(tmp_path / "none.py"), *GIVEN)
    assert "CONFIG must be a Python file" in error(capsys, "dpo", "pairs.jsonl", *GIVEN)
    assert "--ppo.preset dapo is one" in error(capsys, "grpo", "dapo", *GIVEN)


def test_derived_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def recipe(text: str) -> list[str]:
        (tmp_path / "d.py").write_text(f"from dpo_jax.config import derive\nconfig = derive({text})\n")
        return [str(tmp_path / "d.py"), *GIVEN]

    base = cli.parse("dpo", [str(ROOT / "configs" / "zephyr_ddpo.py"), *GIVEN])
    assert cli.parse("dpo", recipe("'zephyr_ddpo'")) == base
    run = cli.parse("dpo", recipe("'zephyr_ddpo', {'train.steps': 5, 'train.epochs': None, 'holdout': 0.5}"))
    assert (run.train.steps, run.train.epochs, run.train.batch_size, run.holdout) == (5, None, 32, 0.5)
    assert "d.py: no CONFIG zephyr_dpo comes with this dpo_jax; did you mean zephyr_" in error(
        capsys, "dpo", *recipe("'zephyr_dpo'")
    )
    assert "d.py: TrainConfig has no option step; it" in error(capsys, "dpo", *recipe("'dpo_paper', {'train.step': 1}"))
    assert "DPORun has no option model.x" in error(capsys, "dpo", *recipe("'dpo_paper', {'model.x': 1}"))
    assert "give --train.steps or --train.epochs" in error(capsys, "dpo", *recipe("'dpo_paper', {'train.steps': 1}"))


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(args: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", stop)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "dpo-jax: interrupted\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_a_signal_stopped_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    def stop(args: list[str]) -> int:
        raise Stopped(number)

    monkeypatch.setattr(cli, "_run", stop)
    assert cli.main(["recipe", "frontier"]) == code
    assert capsys.readouterr().err == "", "the run has said how to go on"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dpo-jax {__version__}\n"
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"  {word} " in overview for word in cli.COMMANDS)
    assert cli.main([]) == 2


def test_help_does_not_start_jax() -> None:
    script = "import sys; from dpo_jax.cli import main; main(['dpo', '--help']); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, cwd=ROOT)
    assert done.returncode == 0, "dpo-jax --help imports jax"


def test_module_entry() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dpo_jax", "dp"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.startswith("dpo-jax: error: unknown command dp; did you mean dpo?")
    assert "Traceback" not in done.stderr
