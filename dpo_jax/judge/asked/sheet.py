"""People as judges: a page with two responses side by side, and the verdicts that come back from it.

The page needs no server and fetches nothing. Which response stands left is drawn from the seed and the row, and the
page does not say whose it is. A verdict is a line of CSV: `item` (a row's number and a hash of what was shown, in which
order), `verdict` (A, B or tie; blank: none) and, where there is one, `rater`. Such a file may be filled in by hand.
What was shown otherwise, to another seed say, is refused by its hash.
"""

import base64
import hashlib
import html
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from dpo_jax.data.sources.files import read_rows
from dpo_jax.errors import InputError, nearest
from dpo_jax.headers import told
from dpo_jax.judge.asked.judging import SHARES, Item, Judgement
from dpo_jax.report.statistics import cohen_kappa, gwet_ac1, table

log = logging.getLogger(__name__)
COLUMNS = ("item", "verdict", "rater")
LONGEST = 16 * 2**20
"""Bytes of a file of verdicts."""
_NAME = 80
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }
section { border-top: 1px solid #ccc; padding: 1rem 0 } .text { white-space: pre-wrap; overflow-wrap: anywhere }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } .two div { background: #f6f6f6; padding: .6rem }
label { margin-right: 1.5rem } header { position: sticky; top: 0; background: #fff; padding: .6rem 0 }
"""
_SCRIPT = """
const sections = [...document.querySelectorAll("section")], rater = document.getElementById("rater");
const kept = "dpo-jax " + document.documentElement.dataset.page;
let unsaved = false;
const chosen = one => one.querySelector("input:checked")?.value ?? "";
const count = () => {
  document.getElementById("count").textContent = `${sections.filter(chosen).length} of ${sections.length} chosen`;
};
try {
  const [name, said] = JSON.parse(localStorage.getItem(kept) ?? '["", {}]');
  rater.value = name;
  for (const one of sections)
    for (const input of one.querySelectorAll("input")) input.checked = input.value === said[one.id];
} catch { /* nothing is kept where the browser does not allow it */ }
document.addEventListener("input", () => {
  unsaved = true;
  count();
  const said = Object.fromEntries(sections.map(one => [one.id, chosen(one)]));
  try { localStorage.setItem(kept, JSON.stringify([rater.value, said])); } catch {}
});
addEventListener("beforeunload", event => { if (unsaved) event.preventDefault(); });
count();
document.getElementById("save").onclick = () => {
  const name = rater.value.replace(/[^\\p{L}\\p{N} ._-]/gu, "").replace(/^[ -]+/, "").trim();
  const lines = ["item,verdict,rater", ...sections.map(one => [one.id, chosen(one), name].join(","))];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\\n") + "\\n"], { type: "text/csv" }));
  link.download = "verdicts.csv";
  link.click();
  unsaved = false;
};
"""
_TITLE = "<title>Which response is better?</title>"


def is_page(path: Path) -> bool:
    """Whether a file is such a page, which may be written anew."""
    with path.open("rb") as file:
        return _TITLE.encode() in file.read(1024)


def shown(item: Item, seed: int) -> tuple[str, tuple[int, int]]:
    """What an item is called on the page, and which response stands left and right."""
    order = (0, 1) if random.Random(f"{seed} {item.number}").random() < 0.5 else (1, 0)
    said = [[message.as_dict() for message in item.messages], [item.responses[i] for i in order], seed]
    return f"{item.number}-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]}", order


def page(items: Sequence[Item], seed: int) -> str:
    """The page: all items in an order drawn by the seed. Raises `InputError` where one has not two responses."""
    order = list(items)
    random.Random(seed).shuffle(order)
    parts = []
    for number, item in enumerate(order, 1):
        if len(item.responses) != 2:
            raise InputError(f"row {item.number}: {len(item.responses)} responses; --sheet shows two side by side")
        name, (left, right) = shown(item, seed)
        asked = "\n\n".join(f"{message.role}: {message.content}" for message in item.messages)
        two = "".join(f'<div class="text">{html.escape(item.responses[i])}</div>' for i in (left, right))
        choices = "".join(
            f'<label><input type="radio" name="{name}" value="{value}"> {text}</label>'
            for value, text in (("A", "left is better"), ("B", "right is better"), ("tie", "equally good"))
        )
        parts.append(
            f'<section id="{name}"><h2>{number} of {len(order)}</h2><p class="text">{html.escape(asked)}</p>'
            f'<div class="two">{two}</div><p>{choices}</p></section>'
        )
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    own = hashlib.sha256("".join(parts).encode()).hexdigest()[:12]
    return (
        f'<!doctype html><html lang="en" data-page="{own}"><meta charset="utf-8"><meta '
        f'http-equiv="Content-Security-Policy" content="{policy}">{_TITLE}<style>{_STYLE}</style>'
        f'<header><label>Your name <input id="rater" maxlength="{_NAME}"></label>'
        '<button id="save">Save verdicts.csv</button> <span id="count"></span></header>'
        f"{''.join(parts)}<script>{_SCRIPT}</script></html>\n"
    )


def read_verdicts(files: Sequence[str], items: Sequence[Item], seed: int) -> list[dict[str, str]]:
    """Of each item what each rater said: name -> "a" (the row's first response is better), "b" or "tie".

    A file without the column `rater` is one rater's, who is called as the file. Raises `InputError`, which names file
    and line.
    """
    known = {name: (i, order) for i, item in enumerate(items) for name, order in [shown(item, seed)]}
    found: list[dict[str, str]] = [{} for _ in items]
    for file in files:
        path = Path(file).expanduser()
        for number, row in _rows(path):
            where = f"{file}: row {number} below the names"
            if row["item"] not in known:
                raise InputError(f"{where}: item {told(row['item'])} was not shown: give --data and --seed of the page")
            at, order = known[row["item"]]
            said = row["verdict"].lower()
            if not said:
                continue
            if said not in SHARES:
                raise InputError(f"{where}: verdict {told(row['verdict'])} is none of A, B and tie")
            rater = row["rater"] or Path(path.name.removesuffix(".gz").removesuffix(".zst")).stem
            if len(rater) > _NAME or rater[0] in "=+-@" or not rater.isprintable():
                raise InputError(f"{where}: rater {told(rater)} is no name")
            if rater in found[at]:
                raise InputError(f"{where}: {rater} has judged item {row['item']} in an earlier row; keep one")
            found[at][rater] = said if said == "tie" else "ab"[order["ab".index(said)]]
    if not any(found):
        raise InputError(f"{', '.join(files)}: no line holds a verdict")
    return found


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(number, cells of `COLUMNS`) of each row that is not blank, as spreadsheets write them. Raises `InputError`."""
    if not path.is_file():
        raise InputError(f"{path}: no such file{nearest(str(path))}; --read takes files of verdicts")
    if path.stat().st_size > LONGEST:
        raise InputError(f"{path}: is larger than {LONGEST // 2**20} MiB; a file of verdicts is small")
    for number, row in read_rows(str(path)):
        named: dict[str, str] = {}
        for name, cell in row.items():
            if (key := name.strip().lower()) in named:
                raise InputError(f"{path}: its first line names the column {key!r} twice")
            named[key] = "" if cell is None else str(cell).strip()
        if not {"item", "verdict"} <= named.keys():
            raise InputError(f"{path}: the first line is to be {','.join(COLUMNS)}, and not {told(','.join(row))}")
        if number == 1 and (others := named.keys() - {*COLUMNS, ""}):
            log.warning("%s: not read: %s", path, told(", ".join(sorted(others))))
        if any(named.values()):
            yield number, {name: named.get(name, "") for name in COLUMNS}


def judgements(verdicts: Sequence[Mapping[str, str]]) -> list[Judgement]:
    """Of each item what most raters said; equally many on two sides are a tie, and nobody is no verdict."""
    found = []
    for said in verdicts:
        replies = tuple({"rater": rater, "read": one} for rater, one in sorted(said.items()))
        counts = Counter(said.values()).most_common()
        if not counts:
            found.append(Judgement((None, None), None, None, 1, ()))
            continue
        verdict = counts[0][0] if len(counts) == 1 or counts[0][1] > counts[1][1] else "tie"
        found.append(Judgement(SHARES[verdict], verdict, None, 0, replies))
    return found


def rater_agreement(verdicts: Sequence[Mapping[str, str]]) -> list[tuple[str, str, int, float, float, float]]:
    """Of each two raters with an item in common: names, items, agreement, Cohen's kappa, Gwet's AC1 (three kinds)."""
    raters, found = sorted({rater for said in verdicts for rater in said}), []
    kinds = list(SHARES)
    for one, other in combinations(raters, 2):
        both = [(kinds.index(said[one]), kinds.index(said[other])) for said in verdicts if {one, other} <= said.keys()]
        if both:
            first, second = np.asarray(both, int).T
            shares = table(first, second, len(kinds))
            found.append((one, other, len(both), float(np.trace(shares)), cohen_kappa(shares), gwet_ac1(shares)))
    return found
