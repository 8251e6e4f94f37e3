"""`dpo-jax recipe dsft`: dialogues for distilled SFT, written by a teacher and filtered, in stages.

seeds.jsonl                  the seed prompts, equal ones left out
answers-0.jsonl              the teacher's answers to them
for r = 1 ... --write.rounds:
    instructions-{r}.jsonl   what the teacher makes of each pair; too close to a kept one: dropped
    answers-{r}.jsonl        its answers to those
turn-{t}.jsonl               for t = 2 ... --write.turns: the user's turn and its answer, both by the teacher
data.jsonl                   what the filters keep; dropped.jsonl: what not, and why; report.json, report.md
replies/                     of the teacher, by a hash of all that decides them
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpo_jax.commands.recipes.chain import perform
from dpo_jax.complete.asking.answers import Answerer
from dpo_jax.complete.asking.self_instruct import Teacher, unlike
from dpo_jax.config import DSFTRun
from dpo_jax.data.rows import dialogue_filters as filters
from dpo_jax.data.rows.dialogues import parse_dialogue
from dpo_jax.data.rows.preferences import parse_prompt
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.rows.truecase import truecased
from dpo_jax.data.sources.attributes import identify, languages
from dpo_jax.data.sources.duplicates import NearTexts
from dpo_jax.data.sources.files import read_rows
from dpo_jax.errors import InputError, naming
from dpo_jax.files.folder import write_atomically, write_json
from dpo_jax.files.jsonl import Row, read_lines, write_lines
from dpo_jax.files.log import say
from dpo_jax.files.stages import Figures, Stage
from dpo_jax.judge.rewards.refusals import refusal
from dpo_jax.mesh import make_mesh


def recipe(run: DSFTRun) -> Path:
    """The `recipe dsft` command; returns its folder. See the module for the stages. Raises `InputError`."""
    return perform("dsft", run, lambda run, out: DSFT(run, out).stages(), _show, found="report.json")


def _show(report: dict[str, Any], out: Path) -> None:
    say(f"{out / 'data.jsonl'}: {report['kept']} dialogues; report.md says the rest")


class DSFT:
    """The stages."""

    def __init__(self, run: DSFTRun, out: Path):
        """Raises `InputError` for options that cannot be kept to."""
        if run.model is None and run.endpoint.url is None:
            raise InputError("who is the teacher? Give --endpoint.url URL and --endpoint.model M, or --model MODEL")
        if unknown := sorted(set(run.filter.languages) - set(languages())):
            raise InputError(f"--filter.languages {' '.join(unknown)}: known are {', '.join(languages())}")
        self._run, self._out = run, out
        self._phrases = filters.phrase_lists(run.filter.phrases) if run.filter.feelings else {}
        self._asker = Answerer(run, out / "replies", partial(make_mesh, run.mesh.data, run.mesh.fsdp, run.mesh.tensor))
        self._teacher = Teacher(self._asker, run.write.language, run.seed, lambda text: refusal(text) == "full")

    def stages(self) -> list[Stage]:
        """All of them, in order."""
        out, run = self._out, self._run
        teacher = str(run.model or run.endpoint.url)
        stages = [Stage("seed prompts", (run.prompts,), out / "seeds.jsonl", self._seeds)]
        before = out / "seeds.jsonl"
        answers = []
        for number in range(run.write.rounds + 1):
            if number:
                path, work = out / f"instructions-{number}.jsonl", partial(self._refine, number)
                stages.append(Stage(f"round {number}: instructions", (teacher, before), path, work))
                before = path
            path = out / f"answers-{number}.jsonl"
            work = partial(self._answer, before, path)
            stages.append(Stage(f"round {number}: answers", (teacher, before), path, work))
            before = path
            answers.append(path)
        inputs = answers
        for turn in range(2, run.write.turns + 1):
            path = out / f"turn-{turn}.jsonl"
            stages.append(Stage(f"turn {turn}", (teacher, *inputs), path, partial(self._turn, tuple(inputs), path)))
            inputs = [path]
        heldout = (*run.filter.heldout, *run.filter.phrases)
        work = partial(self._filter, tuple(inputs))
        stages.append(Stage("filters", (*inputs, *heldout), out / "data.jsonl", work))
        return stages

    # ---------------------------------------------------------------- what the teacher writes

    def _seeds(self) -> Figures:
        rows, seen, read = [], set(), 0
        for number, row in read_rows(self._run.prompts):
            read += 1
            with naming(f"{self._run.prompts}: row {number}"):
                messages, _ = parse_prompt(row)
                if [message.role for message in messages] != ["user"]:
                    raise InputError("a seed prompt is one message of a user, no dialogue")
            if messages[0].content not in seen:
                seen.add(messages[0].content)
                rows.append({"seed": number, "round": 0, "messages": [messages[0].as_dict()]})
        write_lines(self._out / "seeds.jsonl", rows)
        return {"prompts": len(rows), "equal ones left out": read - len(rows)}

    def _answer(self, source: Path, path: Path) -> Figures:
        rows = read_lines(source)
        found = iter(self._teacher.answered(_going(rows)))
        return self._written(path, [row if "dropped" in row else next(found) for row in rows])

    def _refine(self, number: int) -> Figures:
        before = [read_lines(self._out / f"answers-{r}.jsonl") for r in range(number)]
        made = self._teacher.refined(_going(before[-1]))
        # A seed prompt counts as kept even where it got no answer.
        kept = [row for r in before for row in r if row["messages"] and row.get("close_to") is None]
        path = self._out / f"instructions-{number}.jsonl"
        return self._written(path, unlike(made, kept, self._run.write.rouge))

    def _turn(self, sources: Sequence[Path], path: Path) -> Figures:
        """A dialogue to which the teacher does not find a further turn ends where it was."""
        rows = [row for source in sources for row in read_lines(source)]
        going = [row for row in _going(rows) if "ended" not in row]
        asked = self._teacher.asked_on(going)
        answered = iter(self._teacher.answered(_going(asked)))
        said = [row if "dropped" in row else next(answered) for row in asked]
        further = iter([
            old | {"ended": new["dropped"]} if "dropped" in new else new for old, new in zip(going, said, strict=True)
        ])  # fmt: skip
        return self._written(path, [row if {"dropped", "ended"} & row.keys() else next(further) for row in rows])

    def _written(self, path: Path, rows: Sequence[Row]) -> Figures:
        write_lines(path, rows)
        dropped = Counter(row.get("dropped") for row in rows)
        figures: dict[str, int | str] = {"kept": dropped.pop(None, 0), **{str(why): n for why, n in dropped.items()}}
        if ended := sum("ended" in row for row in rows):
            figures["dialogues that ended early"] = ended
        return figures | ({"teacher": self._asker.told} if self._asker.told else {})

    # ---------------------------------------------------------------- filters

    def _filter(self, sources: Sequence[Path]) -> Figures:
        self._asker.close()
        options = self._run.filter
        rows = [row for source in sources for row in read_lines(source)]
        heldout, near = self._heldout(), NearTexts(options.near or 1.0)
        checks: list[filters.Filter] = [filters.says(self._phrases)] if self._phrases else []
        if options.refusals:
            checks.append(_refuses)
        checks.append(filters.length(options.least_characters, options.most_characters))
        if options.languages:
            checks.append(filters.language(options.languages, identify))
        kept, dropped, changed = [], [], 0
        for row in rows:
            if "dropped" in row:
                dropped.append(row)
                continue
            if options.truecase:
                cased = [m | {"content": truecased(m["content"])} for m in row["messages"]]
                changed += cased != row["messages"]
                row = row | {"messages": cased}
            why: dict[str, Any] = {}
            reason = next((found for check in checks if (found := check(row["messages"]))), None)
            if reason is None and (found := _overlap(row, heldout)):
                reason, why = "overlap with held-out files", {"close_to": found[0], "similarity": found[1]}
            name = f"seed {row['seed']}, round {row['round']}"
            if reason is None and options.near is not None:
                text = "\n".join(f"{m['role']}: {m['content']}" for m in row["messages"])
                if found := near.near(text, name):
                    reason, why = "nearly equal to a kept dialogue", {"close_to": found[0], "similarity": found[1]}
            if reason is None:
                kept.append(row)
            else:
                dropped.append(row | {"dropped": reason, **why})
        return self._report(kept, dropped, changed)

    def _heldout(self) -> NearTexts:
        """What users say in the held-out files."""
        found = NearTexts(self._run.filter.near or 1.0)
        for file in self._run.filter.heldout:
            for number, row in read_rows(file):
                try:
                    messages = parse_dialogue(row).messages
                except BadRow:
                    with naming(f"--filter.heldout {file}: row {number}"):
                        messages = parse_prompt(row)[0]
                found.keep([m.content for m in messages if m.role == "user"], f"{file}: row {number}")
        return found

    def _report(self, kept: Sequence[Row], dropped: Sequence[Row], changed: int) -> Figures:
        reasons = Counter(row["dropped"] for row in dropped)
        turns = Counter(sum(m["role"] == "user" for m in row["messages"]) for row in kept)
        seeds = read_lines(self._out / "seeds.jsonl")
        report = {
            "seed prompts": len(seeds),
            "kept": len(kept),
            "kept by round": dict(sorted(Counter(str(row["round"]) for row in kept).items())),
            "kept by turns of the user": {str(n): count for n, count in sorted(turns.items())},
            "ended before their last turn": dict(Counter(row["ended"] for row in kept if "ended" in row)),
            "truecased": changed,
            "dropped": dict(reasons.most_common()),
        }
        lines = ["# Dialogues for distilled SFT", ""]
        lines += [f"* {name}: {value}" for name, value in report.items() if not isinstance(value, dict)]
        for name, value in report.items():
            if isinstance(value, dict) and value:
                lines += ["", f"| {name} | dialogues |", "|---|---|", *(f"| {k} | {n} |" for k, n in value.items())]
        write_lines(self._out / "dropped.jsonl", dropped)
        write_json(self._out / "report.json", report, ensure_ascii=False)
        write_atomically(self._out / "report.md", "\n".join(lines) + "\n")
        if not kept:
            raise InputError(f"{self._out}: no dialogue is left; report.md says why: {dict(reasons.most_common(3))}")
        write_lines(self._out / "data.jsonl", kept)
        return {"kept": len(kept), "dropped": len(dropped)}


def _going(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "dropped" not in row]


def _refuses(messages: filters.Turns) -> str | None:
    return "an answer refuses" if any(refusal(answer) == "full" for answer in filters.answers(messages)) else None


def _overlap(row: Row, heldout: NearTexts) -> tuple[str, float] | None:
    said = (m["content"] for m in row["messages"] if m["role"] == "user")
    return next((found for text in said if (found := heldout.near(text, "", keep=False))), None)
