"""Rows that compare responses to one prompt -> one form, whatever the layout.

Understood layouts, told apart by their columns (a column that is null counts as absent):

* Preference pairs as in `preferences.py`: `chosen`, `rejected`. Beside them, where known: `rating` (see `ratings.py`),
  `margin`, `score_chosen` and `score_rejected`, or `agreement` (share of the annotators who agree).
* Lists of replies: a prompt, and `responses`, `output`, `outputs` or `completions`: a list of texts, messages, or
  objects with `response` (or `text`, `completion`). The best stands first, unless scores or ranks, in the objects or
  beside the list, say otherwise (see `judgements.py`).
* Two responses: a prompt, and `response_a`, `response_b` (or response1, response_1, answer_a, completion_a, output_a
  ...), with `score_a`, `score_b` (score1 ...), or with the votes of annotators, `annotator1`, `annotator2`, ...: 1 the
  first, 2 the second, 0 a tie.

The prompt is `prompt`, `messages`, `conversations`, `question`, or `instruction` with `input` and `history`, and
`system` or `system_prompt`. Labels for auxiliary heads stand in `labels`: {head: [label of each response, in the row's
order]}, a label being a class, for overlapping classes a list of classes, or null.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_jax.config import ClassHead, RewardLossConfig
from dpo_jax.data import judgements
from dpo_jax.data.dialogues import history_of, parse_dialogue
from dpo_jax.data.judgements import judged
from dpo_jax.data.messages import SYSTEM_COLUMNS, Message, columns_of, response_of, text_of
from dpo_jax.data.preferences import COLUMNS, PROMPT_COLUMNS, Extra, parse_pair, parse_prompt
from dpo_jax.data.problems import BadRow
from dpo_jax.data.ratings import majority, margin_of, number_of, votes_of

LIST_COLUMNS = ("responses", "output", "outputs", "completions")
REPLY_KEYS = ("response", "text", "completion")
"""Keys of an entry of such a list that hold its text."""
OWN_COLUMNS = frozenset((*LIST_COLUMNS, *judgements.COLUMNS, "messages", "history", "labels", "agreement"))
"""Columns that are read here, beside those of `preferences.COLUMNS` and of `is_numbered`."""

EXTRAS = ("rating", "source", "score_gap", "agreement")
"""What a row tells that evaluation groups by."""

_NUMBERED = re.compile(r"(response|answer|completion|output)_?(a|b|[0-2])")
_SCORE = re.compile(r"score_?(a|b|[0-2])|annotator_?\d+")
_UNDERSTOOD = (
    "understood are chosen + rejected, a list in responses or output, and response_a + response_b with score_a + "
    "score_b or annotator1, annotator2, ..."
)


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
      labels: head -> label of each response.
      unplaced: why `places` is None, where it is.
    """

    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    places: tuple[int, ...] | None
    raw: tuple[str | None, ...] | None
    evidence: dict[str, Extra] = field(default_factory=dict)
    scores: tuple[float, ...] = ()
    labels: dict[str, list[Any]] = field(default_factory=dict)
    unplaced: BadRow | None = None


def is_numbered(column: str) -> bool:
    """Whether `column` is one of two responses, its score, or a vote."""
    return bool(_NUMBERED.fullmatch(column) or _SCORE.fullmatch(column))


def parse_comparison(row: dict[str, Any]) -> Comparison:
    """Read one row of any layout (see the module). Raises `BadRow`: which field, and how to mend it."""
    row = {name: value for name, value in row.items() if value is not None}
    found = _parse(row)
    for name, text in zip(_told(found, row), found.responses, strict=True):
        if not text.strip():
            # Where models wrote the responses some are blank, and there is no token to score.
            raise BadRow(f"empty completion: {name} is blank", "give it a text", "lost")
    return found


def parse_responses(row: dict[str, Any]) -> Comparison:
    """Read one row of responses to be scored: a comparison, or a prompt with a single answer. Raises `BadRow`."""
    row = {name: value for name, value in row.items() if value is not None}
    if any(isinstance(row.get(name), list) for name in LIST_COLUMNS) or len(_numbered(row)) == 2 or "chosen" in row:
        return _parse(row)
    dialogue = parse_dialogue(row)
    if dialogue.messages[-1].role != "assistant":
        raise BadRow("no answer at the end: the last turn is the user's", "give its answer")
    return Comparison(dialogue.messages[:-1], (dialogue.messages[-1].content,), None, dialogue.raw)


def _parse(row: dict[str, Any]) -> Comparison:
    if "chosen" in row or "rejected" in row:
        return _pair(row)
    lists = [name for name in LIST_COLUMNS if isinstance(row.get(name), list)]
    if len(lists) > 1:
        raise BadRow("several fields give replies", f"{', '.join(lists)}; keep one of them")
    if lists:
        return _listed(row, lists[0])
    names = _numbered(row)
    if len(names) == 2:
        return _two(row, names)
    raise BadRow("no responses to compare", f"{columns_of(row)}; {_UNDERSTOOD}")


def _numbered(row: dict[str, Any]) -> list[str]:
    return sorted(name for name in row if _NUMBERED.fullmatch(name))


def _told(found: Comparison, row: dict[str, Any]) -> list[str]:
    """What to call each response in an error."""
    if "chosen" in row:
        return ["'chosen'", "'rejected'"]
    names = _numbered(row)
    if len(names) == len(found.responses) == 2:
        return [f"'{name}'" for name in names]
    return [f"reply {i}" for i in range(1, len(found.responses) + 1)]


# ---------------------------------------------------------------- layouts


def _pair(row: dict[str, Any]) -> Comparison:
    pair = parse_pair(row)
    assert pair.chosen is not None, "a pair has both"
    assert pair.rejected is not None, "a pair has both"
    evidence = {name: pair.extras[name] for name in ("rating", "margin", "source") if name in pair.extras}
    if {"score_chosen", "score_rejected"} <= pair.extras.keys():
        evidence["score_gap"] = float(pair.extras["score_chosen"]) - float(pair.extras["score_rejected"])
    if "agreement" in row:
        evidence["agreement"] = number_of(row["agreement"], "agreement")
    answers = (pair.chosen, pair.rejected)
    return Comparison(pair.messages, answers, (0, 1), pair.raw, evidence, labels=_labels(row, 2))


def _listed(row: dict[str, Any], column: str) -> Comparison:
    messages, raw = _prompt(row)
    texts = [_reply(value, column) for value in row[column]]
    k = len(texts)
    if k < 2:
        raise BadRow(f"a list of {k} in '{column}' compares nothing", "it takes two replies at least: remove the row")
    found = judged(row, column, COLUMNS | OWN_COLUMNS)
    unknown, (places, scores) = (found, (None, ())) if isinstance(found, BadRow) else (None, found)
    evidence = _told_evidence(row)
    if scores and k == 2:
        evidence["score_gap"] = abs(scores[0] - scores[1])
    spelled = None if raw is None else (raw, *texts)
    return Comparison(messages, tuple(texts), places, spelled, evidence, scores, _labels(row, k), unknown)


def _reply(value: object, column: str) -> str:
    """The text of an entry of a list."""
    if isinstance(value, dict) and not {"role", "from"} & value.keys():
        names = [name for name in REPLY_KEYS if name in value]
        if len(names) != 1:
            raise BadRow(f"an entry of '{column}' has no text", f"{columns_of(value)}; write response and score")
        return text_of(value[names[0]], names[0])
    context, text = response_of(value, column)
    if context:
        raise BadRow(f"a reply in '{column}' is a conversation", "give each reply alone")
    return text


def _two(row: dict[str, Any], names: list[str]) -> Comparison:
    messages, raw = _prompt(row)
    texts = [_reply(row[name], name) for name in names]
    endings = [(_NUMBERED.fullmatch(name) or [""])[2] for name in names]
    scored = [next((c for c in (f"score_{e}", f"score{e}") if c in row), None) for e in endings]
    votes = votes_of(row)
    evidence, places = _told_evidence(row), None
    if votes and any(scored):
        raise BadRow("scores and votes compare the responses twice", "keep one of them")
    if votes:
        winner, share = majority(votes)
        places = {0: (0, 0), 1: (0, 1), 2: (1, 0)}[winner]
        evidence["agreement"] = share
    elif all(scored):
        first, second = (number_of(row[str(name)], str(name)) for name in scored)
        places = (0, 0) if first == second else (0, 1) if first > second else (1, 0)
        evidence["score_gap"] = abs(first - second)
    elif any(scored):
        raise BadRow("a score of one response only", f"'{next(filter(None, scored))}'; give both a score")
    spelled = None if raw is None else (raw, *texts)
    return Comparison(messages, tuple(texts), places, spelled, evidence, labels=_labels(row, 2))


def _prompt(row: dict[str, Any]) -> tuple[tuple[Message, ...], str | None]:
    columns = (*PROMPT_COLUMNS, "messages", "input", *SYSTEM_COLUMNS, "tools")
    messages, raw = parse_prompt({name: row[name] for name in columns if name in row})
    if "history" in row and (history := history_of(row["history"])):
        if raw is None and messages[0].role != "system":
            raise BadRow("'history' beside a list of messages", "put all of the dialogue into one of them")
        messages, raw = (*messages[:-1], *history, messages[-1]), None
    return messages, raw


def _told_evidence(row: dict[str, Any]) -> dict[str, Extra]:
    evidence: dict[str, Extra] = {}
    for name in ("rating", "margin", "agreement", "source"):
        if name in row and not isinstance(row[name], list):  # a list has one value a reply
            text = name == "source" or (name == "rating" and isinstance(row[name], str))
            evidence[name] = text_of(row[name], name) if text else number_of(row[name], name)
    return evidence


def _labels(row: dict[str, Any], k: int) -> dict[str, list[Any]]:
    labels = row.get("labels", {})
    fits = isinstance(labels, dict) and all(isinstance(v, list) and len(v) == k for v in labels.values())
    if not fits:
        raise BadRow("'labels' does not fit the responses", f"write {{head: [label, ...]}}, {k} labels for each head")
    return labels


# ---------------------------------------------------------------- what is learnt from a row


def ordered(found: Comparison, rules: RewardLossConfig) -> list[int]:
    """The responses to learn from, best first: indices into the row's. Raises `BadRow` for a tie.

    Of more than `rules.max_replies` the best, the worst, and some evenly between are kept.
    """
    if found.places is None:
        raise found.unplaced or BadRow(
            "nothing says which response is better", "give scores (score_a, score_b), or votes (annotator1 ...)"
        )
    places = found.places
    order = sorted(range(len(places)), key=lambda i: places[i])
    if rules.max_replies is not None and len(order) > rules.max_replies:
        steps = rules.max_replies - 1
        order = [order[round(i * (len(order) - 1) / steps)] for i in range(rules.max_replies)]
    if len({places[i] for i in order}) == 1:
        raise BadRow("a tie: no response is better", "leave ties out with --reward.ties drop", _tie(rules))
    return order


def _tie(rules: RewardLossConfig) -> Any:
    return "lost" if rules.ties == "drop" else "bad"


def marks(found: Comparison, order: Sequence[int], rules: RewardLossConfig) -> list[float]:
    """Marks of the responses learnt from, whose differences are the margins of their pairs. Raises `BadRow`."""
    scale = 1.0 if rules.margin_scale is None else rules.margin_scale
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
