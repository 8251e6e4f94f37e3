"""`dpo-jax mt-bench judge`: judgements of answers, single or in pairs, in FastChat's files."""

from pathlib import Path

from dpo_jax.complete.asking.answers import deciding, open_asker, weights_of
from dpo_jax.complete.asking.reply_cache import key_of
from dpo_jax.config import MTBenchJudgeRun
from dpo_jax.data.sources.questions import check_complete, read_answers, read_questions
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import RowsFile, check_own
from dpo_jax.files.log import ProgressBar, say
from dpo_jax.judge.asked.judging import warn_of_family
from dpo_jax.judge.asked.mt_bench import Prompts, matches, requests, rows
from dpo_jax.judge.loading import check_output
from dpo_jax.mesh import make_mesh

_AT_ONCE = 256  # matches between two writes of the file


def judge(run: MTBenchJudgeRun) -> Path:
    """Write `run.out`, a row for each answer or pair and turn, and return its path.

    Every request is made before the first is sent. Raises `InputError`.
    """
    out = check_output(Path(run.out).expanduser(), run.questions, *run.answers, run.references, run.prompts)
    questions = read_questions(run.questions)
    answers = read_answers(run.answers, questions)
    check_complete(answers, questions)
    references: dict[int, tuple[str, ...]] = {}
    if run.references is not None:
        found = read_answers((run.references,), questions)
        if len(found) != 1:
            raise InputError(f"--references {run.references}: holds answers of {', '.join(found)}; give those of one")
        [references] = found.values()
    prompts = Prompts(run.prompts, run.settled.language, pairs=run.mode != "single")
    todo = matches(questions, tuple(answers), run.mode, run.baseline)
    asked = [requests(match, prompts, answers, references) for match in todo]
    name = str(run.endpoint.model or run.model)
    check_own(out, lambda row: "turn" in row and (row.get("judge") or [None])[0] == name, f"judgements of {name}")
    warn_of_family(name, set(answers))
    mesh = None if run.model is None else make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    asker = open_asker(run, Path(run.cache or f"{out}.replies").expanduser(), mesh)
    settings = {
        **deciding(run, weights_of(asker)),
        "mode": [run.mode, run.baseline],
        "asked": key_of({"all": [[list(one.messages), one.version] for some in asked for one in some]}),
    }
    with RowsFile(out, settings) as file, ProgressBar("judged", len(todo), done=len(file.rows)) as bar:
        while (start := len(file.rows)) < len(todo):
            some = slice(start, start + _AT_ONCE)
            replies = asker.ask([question for own in asked[some] for question in own])
            file.append(rows(todo[some], asked[some], iter(replies), prompts, name))
            bar.update(len(file.rows))
        done = file.finish()
    unread = sum(row.get("score") == -1 or "error" in (row.get("g1_winner"), row.get("g2_winner")) for row in done)
    kind = "FastChat's" if run.prompts is not None else "ours: not comparable with published figures"
    say(f"{out}: {len(done)} judgements of {name}, {unread} of them without a reading; prompts: {kind}")
    return out
