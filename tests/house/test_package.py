"""Packaging and the README: what they say is what is there, and what the README shows runs."""

import ast
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tiny
from test_layers import FLOORS

from dpo_jax import __version__

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_first_screen_has_the_two_command_lines() -> None:
    first_screen = README.splitlines()[:30]
    commands = [line for line in first_screen if "pip install" in line and "&&" in line]
    assert len(commands) == 2
    assert commands[0].endswith("pip install -e . && dpo-jax demo")
    assert commands[1].endswith("pip install -e '.[test]' && pytest")
    for command in commands:
        made, entered = re.match(r"python3 -m venv (\S+) && \. (\S+)/bin/activate && ", command).groups()  # type: ignore[union-attr]
        assert made == entered


def test_file_list_is_the_tree() -> None:
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\s*(?:\* )?`(\w[\w/]*\.py)`", text, re.MULTILINE)
    package = ROOT / "dpo_jax"
    there = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
    # A room's own __init__.py only says what the room is for.
    ours = sorted(name for name in there if not name.endswith("/__init__.py"))
    assert sorted(listed) == ours, "docs/files.md: one line for each file of dpo_jax/"


def test_the_site_has_every_page() -> None:
    listed = re.findall(r"^ +- (?:[^:\n]+: )?([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages), "mkdocs.yml: one line below `nav` for each page of docs/"


def test_the_papers_page_has_every_recipe() -> None:
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    missing = [path.stem for path in (ROOT / "configs").glob("*.py") if f"`{path.stem}`" not in text]
    assert not missing, f"docs/papers.md: which paper are these from? {missing}"


def test_every_room_has_a_line_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `([\w/.]+)` \| (.+) \|$", text, re.MULTILINE)
    listed = {room: int(floor) for floor, room, _ in rows}
    package = ROOT / "dpo_jax"
    files = [path.relative_to(package) for path in package.rglob("*.py") if path != package / "__init__.py"]
    there = {f"{path.parent}/" if path.parent.name else path.name for path in files}
    assert sorted(room for _, room, _ in rows) == sorted(there), "docs/architecture.md: one line for each room"
    assert listed == {room: FLOORS[room.split("/")[0].removesuffix(".py")] for room in there}
    assert [floor for floor, _, _ in rows] == sorted((floor for floor, _, _ in rows), key=int, reverse=True)


def test_numerics_names_tests_that_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8"))
    assert len(named) > 100
    for file, name in named:
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b", text, re.MULTILINE), f"docs/numerics.md: no {name} in tests/{file}"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_readme_snippets_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "tiny")
    tiny.preferences(tmp_path / "pairs.jsonl", rows=8)
    code = blocks("python")[number].replace('"smollm2"', '"tiny"')
    exec(compile(code, f"README snippet {number}", "exec"), {})


@pytest.mark.real
@pytest.mark.slow
def test_readme_snippet_on_the_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.preferences(tmp_path / "pairs.jsonl", rows=8)
    exec(compile(blocks("python")[0], "README snippet", "exec"), {})


# Import name -> distribution, where they differ.
DISTRIBUTIONS = {
    "orbax": "orbax-checkpoint",
    "safetensors": "safetensors",
    "ml_dtypes": "ml_dtypes",
    "tensorflow_datasets": "tensorflow-datasets",
    "google": "protobuf",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def requirements() -> dict[str, str]:
    """Distribution -> bounds, of `INSTALL` in setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INSTALL":
            return dict(re.fullmatch(r"([\w-]+)(.*)", item).groups() for item in ast.literal_eval(node.value))  # type: ignore[union-attr,misc]
    raise AssertionError("setup.py has no INSTALL")


def imported() -> set[str]:
    """Distributions whose modules the package imports, anywhere in it."""
    names: set[str] = set()
    for path in (ROOT / "dpo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return {DISTRIBUTIONS.get(name, name) for name in names - {"dpo_jax"} - set(sys.stdlib_module_names)}


# Needed at run time though no file imports them: transformers renders chat templates with Jinja and reads SentencePiece
# tokenizer files through sentencepiece.
UNSEEN = {"jinja2", "sentencepiece"}
# Of the extras `math` and `json`: imported where a reward asks for them. jsonschema brings referencing.
OPTIONAL = {"math_verify", "jsonschema", "referencing", "wandb"}


def test_setup_asks_for_what_is_imported() -> None:
    assert requirements().keys() == imported() - OPTIONAL | UNSEEN


def test_lower_bounds_hold_here() -> None:
    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", version)[:3])

    for name, bounds in requirements().items():
        lower = re.match(r">=([\d.]+)", bounds)
        assert lower, f"{name}: no lower bound"
        assert numbers(metadata.version(name)) >= numbers(lower[1]), name


def test_scripts_and_helpers_of_tests_have_different_names() -> None:
    """Both folders are on the tests' path: of two files of one name only one can be imported."""
    benchmarks, support = (
        {path.stem for path in (ROOT / folder).glob("*.py")} for folder in ("benchmarks", "tests/support")
    )
    assert not benchmarks & support


def test_a_wheel_holds_the_recipes(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    words = ["setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]  # what a wheel of the package would hold
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    packed = {path.name: path.read_text() for path in (tmp_path / "dpo_jax" / "configs").glob("*.py")}
    assert packed == {path.name: path.read_text() for path in (ROOT / "configs").glob("*.py")}
    script = (
        "from dpo_jax.config import derive; from dpo_jax.config.command_line import shipped;"
        "run = derive('dpo_llama2_13b_v5e32', {'mesh.fsdp': 8});"
        "assert (run.optimizer.learning_rate, run.mesh.fsdp) == (5e-7, 8); print(shipped.find('llama2_ppo'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert Path(done.stdout.strip()) == tmp_path / "dpo_jax" / "configs" / "llama2_ppo.py"


def test_version_is_in_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    unreleased, *versions = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert unreleased.startswith("Unreleased\n")
    assert re.match(rf"{re.escape(__version__)} - \d{{4}}-\d\d-\d\d\n", versions[0])
    for part in (unreleased, *versions):
        headings = re.findall(r"^### (.+)$", part, re.MULTILINE)
        assert headings == [name for name in ("Added", "Changed", "Fixed") if name in headings], headings


def test_licence() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_ci_runs_the_readmes_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    pattern = re.search(r'grep -m1 "(.*?)" README.md', script.read_text())
    assert pattern is not None
    first = next(line for line in README.splitlines() if re.search(pattern[1], line))
    assert first.endswith("pip install -e '.[test]' && pytest")


@pytest.mark.parametrize(
    "path", [path for path in (ROOT / "dpo_jax").rglob("*.py") if path.read_text().count("\n") > 400]
)
def test_a_long_file_says_why(path: Path) -> None:
    assert "though long" in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""), path


def test_every_benchmark_is_listed() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    scripts = {path.name for kind in ("*.py", "*.sh") for path in (ROOT / "benchmarks").glob(kind)}
    assert scripts == set(re.findall(r"`(\w+\.(?:py|sh))`", text))
