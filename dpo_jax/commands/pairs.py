"""`dpo-jax pairs`: preference pairs out of scored lists, by a named rule, or of solutions made wrong in one place."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.config import PairsRun
from dpo_jax.data.rows.binarise import mean_of_aspects, overall_score, pick, repaired
from dpo_jax.data.rows.comparisons import Comparison
from dpo_jax.data.rows.corrupt import corrupt, edit_distance
from dpo_jax.data.rows.dialogues import CUT, parse_dialogue
from dpo_jax.data.rows.layouts import LIST_COLUMNS
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.preferences import pair_row
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.comparison_sets import parse_responses
from dpo_jax.data.sources.checked_rows import CheckedRows
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import Row, write_lines
from dpo_jax.files.log import say
from dpo_jax.judge.loading import check_output
from dpo_jax.judge.rewards.file_of_judgements import Scores, judged, read_scores
from dpo_jax.report import html, terminal


class _Scored(NamedTuple):
    """A row: its responses, a score of each (None: left out), and who wrote them (None where it does not say)."""

    found: Comparison
    scores: tuple[float | None, ...]
    models: tuple[str | None, ...]
    contradictions: int
    again: int
    cut: int = 0
    unscored: int = 0


def pairs(run: PairsRun) -> Path:
    """Write `run.out`: prompt, chosen, rejected, score_chosen, score_rejected, the row, and the models where known.

    Returns the path. Raises `InputError`.
    """
    out = check_output(run.out, run.data.files, run.scores)
    if run.rule == "corrupt":
        return _corrupted(run, out)
    source = CheckedRows(run.data.files, None, columns=run.data.columns)
    told = None if run.scores is None else read_scores(run.scores)

    def beside(chunk: Sequence[tuple[int, tuple[dict[str, Any], _Scored]]]) -> Iterator[tuple[int, _Scored] | BadRow]:
        for number, (row, one) in chunk:
            try:
                yield number, _without_cut(row, one if told is None else _with_scores(one, number, told, run))
            except BadRow as problem:
                yield problem

    rows, _ = source.collect(lambda row: (row, _scored(row, run)), beside, run.on_bad_rows)
    if told is not None and (other := told.keys() - set(range(1, source.rows_read + 1))):
        raise InputError(
            f"--scores {run.scores}: row {min(other)} is none of the {source.rows_read} rows of {run.data.files}; "
            "give the file that dpo-jax judge wrote of them"
        )
    dropped: Counter[str] = Counter()
    wins: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    made: list[Row] = []
    for number, one in rows:
        at = [i for i, score in enumerate(one.scores) if score is not None]
        scores = [score for score in one.scores if score is not None]
        key = f"{run.seed} {number}"
        for chosen, rejected in pick(scores, run.rule, key=key, strict=run.ties == "strict", dropped=dropped):
            if one.found.responses[at[chosen]] == one.found.responses[at[rejected]]:
                dropped["both responses are the same"] += 1
                continue
            made.append(_pair(number, one, at[chosen], at[rejected]))
            names = one.models[at[chosen]], one.models[at[rejected]]
            wins[str(names[0])] += 1
            seen.update(map(str, names))
    contradictions = sum(one.contradictions for _, one in rows)
    again = sum(one.again for _, one in rows)
    left_out = [f"{count} times: {reason}" for reason, count in dropped.items()]
    if cut := sum(one.cut for _, one in rows):
        left_out.append(f"{cut} responses left out: they were cut")
    if unscored := sum(one.unscored for _, one in rows):
        left_out.append(f"{unscored} responses left out: the judge gave them no score")
    if not made:
        raise InputError(f"{run.data.files}: no pair is left of {len(rows)} rows; {'; '.join(left_out)}")
    write_lines(out, made)
    said = [f"{len(made)} pairs of {len(rows)} rows by {run.rule}", *left_out]
    if contradictions:
        done = f"repaired, {again} of them left out: judge them again" if run.repair else "not repaired (--repair)"
        said.append(f"{contradictions} overall scores of 10 contradict their aspects: {done}")
    say(f"{out}: {'; '.join(said)}")
    if set(seen) != {"None"}:
        cells = [(name, count, wins[name], f"{wins[name] / count:.2f}") for name, count in seen.most_common()]
        head = ("model", "pairs", "chosen", "share")
        terminal.show(terminal.table("Which model wins how often", html.Table(head, cells)))
    return out


def _corrupted(run: PairsRun, out: Path) -> Path:
    """Right solutions against themselves with one place made wrong; `edit_distance` in characters beside them."""
    kind = run.settled.corrupt
    source = CheckedRows(run.data.files, None, columns=run.data.columns)
    rows, _ = source.collect(parse_dialogue, list, run.on_bad_rows)
    made: list[Row] = []
    shares: list[float] = []
    for number, one in rows:
        *prompt, answer = one.messages
        found = corrupt(answer.content, kind, key=f"{run.seed} {number}")
        if found is None:
            continue
        distance = edit_distance(answer.content, found.text)
        shares.append(distance / max(len(answer.content), len(found.text)))
        told = {"row": number, "edit_distance": distance, "changed": list(found.changed)}
        made.append(_texts(prompt, answer.content, found.text) | told)
    if not made:
        raise InputError(f"{run.data.files}: no solution has a {kind} to change; try the other --corrupt")
    write_lines(out, made)
    mean = float(np.mean([row["edit_distance"] for row in made]))
    say(
        f"{out}: {len(made)} pairs of {len(rows)} rows, one {kind} changed in each; edit distance {mean:.1f} characters"
        f" on average, {np.mean(shares):.1%} of the longer text; {len(rows) - len(made)} rows have no {kind} to change"
    )
    return out


def _texts(prompt: Sequence[Message], chosen: str, rejected: str) -> Row:
    single = len(prompt) == 1 and prompt[0].role == "user"
    return pair_row(prompt[0].content if single else [message.as_dict() for message in prompt], chosen, rejected)


def _scored(row: dict[str, Any], run: PairsRun) -> _Scored:
    """Raises `BadRow` for a row without the scores that the rule takes."""
    found = parse_responses(row)
    entries = row.get("completions")
    entries = entries if isinstance(entries, list) and all(isinstance(x, dict) for x in entries) else None
    count = len(found.responses)
    models = tuple(one.get("model") for one in entries) if entries else (None,) * count
    annotated = bool(entries) and all("annotations" in one for one in entries or ())
    overall = run.rule == "ultrafeedback_binarized"
    if not annotated and (overall or run.repair):
        option = f"--rule {run.rule}" if overall else "--repair ultrafeedback"
        raise BadRow(f"{option} takes UltraFeedback's schema", "completions with annotations and overall_score")
    if run.scores is not None:
        return _Scored(found, (None,) * count, models, 0, 0)
    if not annotated or entries is None:
        if len(found.scores) != count:
            raise BadRow("no score for each response", "dpo-jax judge gives some, and --scores reads them")
        return _Scored(found, found.scores, models, 0, 0)
    read = [repaired(one) for one in entries]
    contradictions, again = sum(bad for _, bad, _ in read), sum(more for _, _, more in read)
    if overall:
        both = zip(entries, read, strict=True)
        plain = tuple(value if run.repair else overall_score(one) for one, (value, _, _) in both)
        return _Scored(found, plain, models, contradictions, again if run.repair else 0)
    return _Scored(found, tuple(mean_of_aspects(one) for one in entries), models, contradictions, 0)


def _with_scores(one: _Scored, number: int, told: dict[int, Scores], run: PairsRun) -> _Scored:
    """With a judge's scores. Raises `BadRow` where it has none of this row, or judged other texts."""
    found, given = one.found, told.get(number)
    if given is None:
        raise BadRow("not judged", f"--scores {run.scores} has no such row")
    if len(given.scores) != len(found.responses):
        counts = f"{len(given.scores)} scores in --scores {run.scores} of {len(found.responses)} responses"
        raise BadRow("not as many scores as responses", counts)
    if given.judged not in (None, judged(found.messages, found.responses)):
        raise BadRow("other texts were judged", f"--scores {run.scores} is of other data, or of another order of it")
    return one._replace(scores=given.scores, unscored=given.scores.count(None))


def _without_cut(row: dict[str, Any], one: _Scored) -> _Scored:
    """Those that were cut without a score: as pairs have whole responses, DPO would learn that they end there."""
    found = next((row[name] for name in LIST_COLUMNS if isinstance(row.get(name), list)), [])
    cut = {i for i, entry in enumerate(found) if isinstance(entry, dict) and entry.get("finish_reason") == CUT}
    scores = tuple(None if i in cut else score for i, score in enumerate(one.scores))
    return one._replace(scores=scores, cut=len(cut))


def _pair(number: int, one: _Scored, chosen: int, rejected: int) -> Row:
    texts = one.found.responses
    pair = _texts(one.found.messages, texts[chosen], texts[rejected])
    pair |= {"score_chosen": one.scores[chosen], "score_rejected": one.scores[rejected], "row": number}
    if one.models[chosen] is not None:
        pair |= {"chosen_model": one.models[chosen], "rejected_model": one.models[rejected]}
    return pair
