"""Rows that compare responses to one prompt -> one form, whatever the layout.

Understood layouts, told apart by their columns under the names of `layouts.py`:

* Preference pairs as in `preferences.py`: `chosen`, `rejected`. Beside them, where known: `rating` (see `ratings.py`),
  `margin`, `score_chosen` and `score_rejected`, or `agreement` (share of the annotators who agree).
* Lists of replies: a prompt, and `responses`, `output`, `outputs` or `completions`: a list of texts, messages, or
  objects with `response` (or `text`, `completion`, `answer`). The best stands first, unless a judgement, in the objects
  or beside the list, says otherwise (see `judgements.py`). Without a prompt each is a conversation; all but its last
  message is the prompt, the same in all.
* Two responses: a prompt, and `response_a`, `response_b` (or response1, response_1, answer_a, completion_a, output_a
  ...), with `score_a`, `score_b` (score1 ...), or with the votes of annotators, `annotator1`, `annotator2`, ...: 1 the
  first, 2 the second, 0 a tie.

The prompt is `prompt`, `messages`, `conversations`, `question`, or `instruction` with `input` and `history`, and
`system` or `system_prompt`. Labels for auxiliary heads stand in `labels`: {head: [label of each response, in the row's
order]}, a label being a class, for overlapping classes a list of classes, or null. Labels `safety` of `safe` and
`unsafe` also say in which of Llama 2's bins a row is (`safety_bin`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpo_jax.config import ClassHead, RewardLossConfig, Ties
from dpo_jax.data.rows.judgements import judged
from dpo_jax.data.rows.layouts import COMPARISON_COLUMNS, LIST_COLUMNS, PROMPT_COLUMNS
from dpo_jax.data.rows.messages import SYSTEM_COLUMNS, Message, columns_of, response_of, text_of, turns_of
from dpo_jax.data.rows.preferences import (
    ASSISTANT,
    Pair,
    blank_response,
    one_turn,
    parse_pair,
    parse_prompt,
)
from dpo_jax.data.rows.problems import BadRow, Severity
from dpo_jax.data.rows.ratings import Evidence, evidence_of, margin_of
from dpo_jax.data.rows.readable import Readable, readable

REPLY_KEYS = ("response", "text", "completion", "answer")
"""Keys of an entry of such a list that hold its text."""

EXTRAS = ("rating", "source", "score_gap", "agreement", "safety")
"""What a row tells that evaluation groups by."""

SAFETY = "safety"
"""The head whose labels tell Llama 2's bins."""
SAFETY_BINS = ("chosen safe only", "both safe", "both unsafe", "rejected safe only")
"""Of a safety comparison (Touvron et al. 2023, section 3.2.1: 18 %, 47 % and 35 % of theirs; the last was left out)."""

_UNDERSTOOD = "understood are chosen + rejected, a list in responses, and the layouts of docs/data.md"


@dataclass(frozen=True)
class Comparison:
    """A prompt and its responses.

    Attributes:
      messages: the prompt, a user message last.
      responses: the texts, in the row's order.
      places: place of each response, 0 the best, equal for ties; None where the row does not compare them.
      raw: (prompt, responses ...) as the row spells them; None where only a template can join the prompt.
      evidence: what the row gives of rating, margin, score_gap, agreement and source.
      scores: of a list of replies, where it has them; empty otherwise.
      labels: the column `labels`, which `labels_of` reads.
      names: what to call each response in a message.
      unplaced: why `places` is None, where it is.
    """

    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    places: tuple[int, ...] | None
    raw: tuple[str | None, ...] | None
    evidence: dict[str, Evidence] = field(default_factory=dict)
    scores: tuple[float, ...] = ()
    labels: Any = field(default_factory=dict)
    names: tuple[str, ...] = ()
    unplaced: BadRow | None = None


def parse_comparison(row: dict[str, Any]) -> Comparison:
    """Read one row of any layout (see the module). Raises `BadRow`: which field, and how to mend it."""
    found = parse_replies(readable(row))
    for name, text in zip(found.names, found.responses, strict=True):
        if not text.strip():
            raise blank_response(name)
    return found


def parse_preference(
    row: dict[str, Any], *, needs_pairs: bool = True, compared: bool = True, ties: Ties | None = None
) -> Pair:
    """Read one row as a pair: of more than two responses the best and the worst. Raises `BadRow`, for a tie too.

    `ties`: of `--dpo.ties`, if there is that option.
    """
    row = readable(row)
    if not compares_replies(row):
        return parse_pair(row, needs_pairs=needs_pairs, compared=compared)
    found = parse_comparison(row)
    places = found.places
    if places is None:
        raise found.unplaced or BadRow("nothing says which response is better")
    best, worst = places.index(0), len(places) - 1 - places[::-1].index(max(places))
    if places[best] == places[worst]:
        detail = "remove such rows" if ties is None else "leave ties out with --dpo.ties drop"
        raise BadRow("a tie: no response is better", detail, _tie(ties))
    chosen, rejected = found.responses[best], found.responses[worst]
    if chosen == rejected:
        raise BadRow("'chosen' and 'rejected' are the same", "such a row prefers nothing: remove it")
    raw = (
        None if found.raw is None or found.raw[0] is None else (found.raw[0], found.raw[1 + best], found.raw[1 + worst])
    )
    extras = {name: found.evidence[name] for name in ("rating", "margin", "source") if name in found.evidence}
    if found.scores:
        extras |= {"score_chosen": found.scores[best], "score_rejected": found.scores[worst]}
    return Pair(found.messages, chosen, rejected, raw, extras)


def compares_replies(row: Readable) -> bool:
    """Whether `row` holds a list of responses, and not a pair."""
    return not {"chosen", "rejected"} & row.keys() and any(isinstance(row.get(name), list) for name in LIST_COLUMNS)


def parse_replies(row: Readable, *, compared: bool = True) -> Comparison:
    """`parse_comparison` of any responses, blank ones too; those of a pair may be the same if not `compared`."""
    if "chosen" in row or "rejected" in row:
        return _pair(row, compared)
    lists = [name for name in LIST_COLUMNS if isinstance(row.get(name), list)]
    if len(lists) > 1:
        raise BadRow("several fields give replies", f"{', '.join(lists)}; keep one of them")
    if not lists:
        raise BadRow("no responses to compare", f"{columns_of(row)}; {_UNDERSTOOD}")
    return _listed(row, lists[0])


# ---------------------------------------------------------------- layouts


def _pair(row: Readable, compared: bool) -> Comparison:
    pair = parse_pair(row, compared=compared)
    assert pair.chosen is not None, "a pair has both"
    assert pair.rejected is not None, "a pair has both"
    evidence = {name: pair.extras[name] for name in ("rating", "margin", "source") if name in pair.extras}
    scores = [pair.extras[name] for name in ("score_chosen", "score_rejected") if name in pair.extras]
    if len(scores) == 2:
        evidence["score_gap"] = _gap(*scores)
    if "agreement" in row:
        evidence["agreement"] = evidence_of(row["agreement"], "agreement")
    answers = (pair.chosen, pair.rejected)
    names = ("'chosen'", "'rejected'")
    return Comparison(pair.messages, answers, (0, 1), pair.raw, evidence, labels=row.get("labels", {}), names=names)


def _gap(better: Evidence, worse: Evidence) -> Evidence:
    if isinstance(better, BadRow):
        return better
    return worse if isinstance(worse, BadRow) else evidence_of(float(better) - float(worse), "score_gap")


def _listed(row: Readable, column: str) -> Comparison:
    k = len(row[column])
    if k == 1 and "responses" in row.sources:
        raise BadRow("a scored answer without another to the same prompt", "neighbouring rows are compared", "lost")
    if k < 2:
        detail = "it takes two replies at least: remove the row"
        raise BadRow(f"a list of {k} in '{column}' compares nothing", detail, "noise")
    separate = len(row.sources.get(column, ())) > 1
    names = tuple(f"'{row.called(column, i)}'" if separate else f"reply {i + 1}" for i in range(k))
    replies = [_reply(value, row.called(column, i)) for i, value in enumerate(row[column])]
    texts = tuple(text for _, text in replies)
    messages, raw = _prompt(row, [context for context, _ in replies], row.called(column))
    if raw is not None and raw.rstrip().endswith(ASSISTANT):
        spelled, texts = (raw, *texts), tuple(one_turn(text) for text in texts)
    else:
        spelled = None if raw is None else (raw, *texts)
    try:
        found = judged(row, column, COMPARISON_COLUMNS)
    except BadRow as problem:  # who only scores the responses needs no places
        found = problem
    evidence = _told_evidence(row)
    comparison = Comparison(messages, texts, None, spelled, evidence, labels=row.get("labels", {}), names=names)
    if isinstance(found, BadRow):
        return replace(comparison, unplaced=found)
    return replace(comparison, places=found.places, scores=found.scores, evidence={**found.evidence, **evidence})


def _reply(value: object, column: str) -> tuple[tuple[Message, ...], str]:
    """(what stands before it, if it is a conversation; the text) of an entry of a list."""
    if isinstance(value, dict) and not {"role", "from"} & value.keys():
        names = [name for name in REPLY_KEYS if value.get(name) is not None]
        if len(names) != 1:
            raise BadRow(f"an entry of '{column}' has no text", f"{columns_of(value)}; write response and score")
        return (), text_of(value[names[0]], names[0])
    return response_of(value, column)


def _prompt(
    row: Readable, contexts: Sequence[tuple[Message, ...]], column: str
) -> tuple[tuple[Message, ...], str | None]:
    columns = (*PROMPT_COLUMNS, "messages", "input", "context", "history", *SYSTEM_COLUMNS, "tools")
    told = {name: row[name] for name in columns if name in row}
    if any(contexts):
        if told.keys() - {*SYSTEM_COLUMNS, "tools"}:
            raise BadRow(f"a reply in '{column}' is a conversation", "give each reply alone")
        if any(turns_of(context) != turns_of(contexts[0]) for context in contexts):
            raise BadRow("no shared prompt", f"the messages before the last differ in '{column}'; remove the row")
        told["messages"] = [message.as_dict() for message in contexts[0]]
    return parse_prompt(row.of(told))


def _told_evidence(row: Readable) -> dict[str, Evidence]:
    names = ("rating", "margin", "agreement", "source")
    told = {name: row[name] for name in names if name in row}
    if isinstance(told.get("rating"), list):  # it rates each reply
        del told["rating"]
    return {name: evidence_of(value, name) for name, value in told.items()}


def labels_of(found: Comparison, head: str) -> list[Any]:
    """The label of each response for one head, null where it has none. Raises `BadRow`."""
    k = len(found.responses)
    if not isinstance(found.labels, dict):
        raise BadRow("'labels' does not fit the responses", f"write {{head: [label, ...]}}, {k} labels for each head")
    labels = found.labels.get(head) or [None] * k
    if not isinstance(labels, list) or len(labels) != k:
        raise BadRow(f"'labels: {head}' does not fit the responses", f"write a list of {k} labels, one a response")
    return labels


# ---------------------------------------------------------------- what is learnt from a row


def safety_bin(found: Comparison, order: Sequence[int], rules: RewardLossConfig) -> str | None:
    """Which of the best and the worst response is safe, by the labels `safety`: one of `SAFETY_BINS`, or None without.

    Raises `BadRow` where the rules leave out what prefers an unsafe response to a safe one.
    """
    labels = found.labels.get(SAFETY) if isinstance(found.labels, dict) else None
    if not isinstance(labels, list) or len(labels) != len(found.responses):
        return None
    pair = labels[order[0]], labels[order[-1]]
    if any(label not in ("safe", "unsafe") for label in pair):
        return None
    if pair == ("unsafe", "safe") and rules.exclude_unsafe_chosen:
        raise BadRow("the chosen response is unsafe, and another is safe", "--reward.exclude_unsafe_chosen", "lost")
    pairs = (("safe", "unsafe"), ("safe", "safe"), ("unsafe", "unsafe"), ("unsafe", "safe"))
    return SAFETY_BINS[pairs.index(pair)]


def ordered(found: Comparison, rules: RewardLossConfig) -> list[int]:
    """The responses to learn from, best first: indices into the row's. Raises `BadRow` for a tie.

    Of more than `rules.max_replies` the best, the worst, and some evenly between are kept.
    """
    if found.places is None:
        raise found.unplaced or BadRow("nothing says which response is better")
    places = found.places
    order = sorted(range(len(places)), key=lambda i: places[i])
    if rules.max_replies is not None and len(order) > rules.max_replies:
        steps = rules.max_replies - 1
        order = [order[round(i * (len(order) - 1) / steps)] for i in range(rules.max_replies)]
    if len({places[i] for i in order}) == 1:
        raise BadRow("a tie: no response is better", "leave ties out with --reward.ties drop", _tie(rules.ties))
    return order


def _tie(ties: Ties | None) -> Severity:
    return "lost" if ties == "drop" else "bad"


def marks(found: Comparison, order: Sequence[int], rules: RewardLossConfig) -> list[float]:
    """Marks of the responses learnt from, whose differences are the margins of their pairs. Raises `BadRow`."""
    scale = rules.settled.margin_scale
    if rules.margin == "score_gap" and found.scores:
        return [scale * (found.scores[i] - found.scores[order[-1]]) for i in order]
    if len(order) == 2:
        return [margin_of(rules.margin, scale, found.evidence), 0.0]
    detail = f"only scores give each pair of its {len(order)} replies a margin: add 'scores' and take score_gap"
    raise BadRow(f"a ranked list under --reward.margin {rules.margin}", f"{detail}, or set --reward.max_replies 2")


def label_of(value: Any, head: ClassHead) -> Any:
    """The label of one response as numbers: a class (-1: none), or 1, 0 or -1 for each class. Raises `BadRow`."""
    if value is None:
        return [-1] * len(head.classes) if head.overlapping else -1
    if head.overlapping != isinstance(value, list):
        kind = "a list of classes" if head.overlapping else "one class"
        raise BadRow(f"a label of '{head.name}' must be {kind}", f"it is {str(value)[:40]!r}")
    for name in value if head.overlapping else [value]:
        if name not in head.classes:
            raise BadRow(
                f"an unknown class of '{head.name}'", f"{str(name)[:40]!r}; known are {', '.join(head.classes)}"
            )
    return [int(name in value) for name in head.classes] if head.overlapping else head.classes.index(value)
