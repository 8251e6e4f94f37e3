"""README and docs/: every command line is read by the real parser, every option and page they name is there."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from dpo_jax import cli
from dpo_jax.config import Loss

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
OPEN = ("...", "CONFIG", "COMMAND")
"""Words of a line that says how a command goes, rather than one that can be typed."""
SHELL = (">", ">>", "2>", "|", "&", "&&", ";")
"""Where the words of a command end, and the shell's own begin."""


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language, without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def commands(text: str) -> list[list[str]]:
    """The words of every whole `dpo-jax` line in the bash blocks of a page; a backslash joins lines."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    ours = [line[line.index("dpo-jax") + 1 :] for line in words if "dpo-jax" in line and not {*line} & {*OPEN}]
    return [list(itertools.takewhile(lambda word: word not in SHELL, line)) for line in ours]


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where configs/ is, as in a reader's clone


@pytest.mark.usefixtures("in_root")
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if commands(text)])
def test_commands_parse(page: str) -> None:
    for line in commands(PAGES[page]):
        word, *rest = cli.split_recipe_name(line)
        try:
            cli.parse(word, rest)
        except Exception as error:
            raise AssertionError(f"{page}: dpo-jax {shlex.join(line)}: {error}") from error


def test_python_blocks_compile() -> None:
    count = 0
    for page, text in PAGES.items():
        for number, code in enumerate(blocks(text, "python")):
            compile(code, f"{page}, block {number + 1}", "exec")
            count += 1
    assert count >= 2


def test_options_exist() -> None:
    known = {name for word in cli.COMMANDS for name in cli.option_names(word)}
    sections = {name.partition(".")[0] for name in known if "." in name}
    for page, text in PAGES.items():
        # Of section.{field}, section.* and the names of files nothing can be looked up.
        named = re.findall(r"(?<![\w`/.])`?--(\w+)\.(\w+)(?![\w*{.])", text)
        missing = {f"{section}.{field}" for section, field in named if section in sections} - known
        assert not missing, f"{page}: no such option: {missing}"


def test_tables_of_losses_are_whole() -> None:
    readme, page = PAGES["README.md"], PAGES["docs/dpo.md"]
    short = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", readme[readme.index("| `--dpo.loss` |") :], re.MULTILINE)
    assert sorted(re.findall(r"\w+", " ".join(short))) == sorted(Loss.__args__)
    table = page[page.index("| `--dpo.loss` |") : page.index("With any of them:")]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(Loss.__args__)
    options = {name.removeprefix("dpo.") for name in cli.option_names("dpo") if name.startswith("dpo.")}
    rows = re.findall(r"^\| `.*", table, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[-2])} <= options


ALGORITHMS = [
    f"docs/{name}.md" for name in "dpo online_dpo sft pretraining reward ppo grpo distill rejection gatt".split()
]
ORDER = ["Example", "Data", "Equation, code, metric", "Options that matter", "Memory and speed", "What goes wrong"]
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "dpo_jax").rglob("*.py"))}


@pytest.mark.parametrize("page", ALGORITHMS)
def test_algorithm_pages_have_one_order(page: str) -> None:
    title, *parts = re.split(r"^## ", PAGES[page], flags=re.MULTILINE)
    assert [part.partition("\n")[0] for part in parts] == ORDER
    assert title.count("\n") <= 2, "the example comes first"
    example, maths = parts[0], parts[2]
    first = example.partition("```bash\n")[2].partition("```")[0]
    assert 1 <= len(first.splitlines()) <= 5
    assert commands(f"```bash\n{first}```"), "that can be typed"
    assert "report.html" in example, "where its curve is"
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", maths.partition("\n\n")[2].partition("\n\n")[0], re.MULTILINE)
    assert rows[0] == ("equation", "code in `dpo_jax/`", "metric")
    for _, code, told in rows[2:]:
        file, *names = re.findall(r"`([\w/.]+)`", code)
        for name in names:
            assert re.search(rf"^(def|class) {name}\b", SOURCES[ROOT / "dpo_jax" / file], re.MULTILINE), code
        assert ROOT / "dpo_jax" / file in SOURCES, code
        for metric in re.findall(r"`([\w/]+)`", told):
            key = metric.removeprefix("eval_")
            assert any(f'"{key}"' in text or f"/{key.rpartition('/')[2]}" in text for text in SOURCES.values()), metric


def anchors(text: str) -> set[str]:
    """What `#...` behind a page may name: its headings, as GitHub and MkDocs spell them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, heading = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), f"{page}: no {target}"
            if heading:
                assert heading in anchors(path.read_text(encoding="utf-8")), f"{page}: no heading {target}"
        for name in re.findall(r"`(docs/[\w/]+\.md)", text):
            assert (ROOT / name).exists(), f"{page}: no {name}"
