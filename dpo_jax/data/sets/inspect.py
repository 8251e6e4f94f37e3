"""What the model sees of a row: its tokens as text, with the part each of them plays.

And what comparisons look like, by source: the columns of Llama 2's Table 6 (Touvron et al. 2023).

comparisons   pairs that prefer one response: a list of K ranked ones holds several
turns         mean number of the user's messages in a dialogue
tokens of an example    of a dialogue with one response, without a template
tokens of a prompt      of one message of the user
tokens of a response    of one message of the assistant, those that are compared among them

An example of one turn is a prompt and a response; so are the paper's rows of one turn (Stanford SHP: 338.3 = 199.5 +
138.8).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from dpo_jax.data.rows.comparisons import Comparison, parse_comparison
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.sequences import SequenceDataset
from dpo_jax.data.sources.checked_rows import CheckedRows, OnBadRows

Part = Literal["prompt", "response", "format", "terminator"]

_BROKEN = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """Some neighbouring tokens (one, unless they share a character) as text.

    `counts` says whether they enter the log-probability sums; all of the response does.
    """

    ids: tuple[int, ...]
    text: str
    part: Part

    @property
    def counts(self) -> bool:
        return self.part != "prompt"


def pieces(dataset: PreferenceDataset, tokenizer: PreTrainedTokenizerBase, index: int, response: int) -> list[Piece]:
    """The tokens of row `index` (position in the data set) with one of its responses (0 chosen, 1 rejected).

    "format" marks header and turn-end tokens, where the data set was loaded with format masks; "terminator" the token
    that ends the response, unless it was cut by the length limit.
    """
    at = index * dataset.responses_per_prompt + response
    prompt, ids = dataset.prompts[index].tolist(), dataset.responses[at].tolist()
    parts: list[Part] = ["response"] * len(ids)
    if dataset.formats is not None:
        parts = ["format" if f else "response" for f in dataset.formats[at]]
    if ids and ids[-1] in dataset.terminators:
        parts[-1] = "terminator"
    in_front: list[Part] = ["prompt"] * len(prompt)
    return _decode([*prompt, *ids], in_front + parts, tokenizer)


def sequence_pieces(dataset: SequenceDataset, tokenizer: PreTrainedTokenizerBase, index: int) -> list[Piece]:
    """The tokens of sequence `index` (position in the data set): "prompt" is what the loss does not count."""
    ids, targets = dataset.tokens[index].tolist(), dataset.targets[index].tolist()
    parts: list[Part] = [
        "prompt" if not target else "terminator" if token in dataset.terminators else "response"
        for token, target in zip(ids, targets, strict=True)
    ]
    return _decode(ids, parts, tokenizer)


def _decode(ids: list[int], parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Text token by token. Tokens that hold parts of one character are put together, for they have no text alone."""
    found: list[Piece] = []
    start = 0
    for end in range(1, len(ids) + 1):
        # The token in front keeps SentencePiece from dropping the space that opens a text.
        before = ids[max(start - 1, 0) : start]
        lead = cast(str, tokenizer.decode(before))
        text = cast(str, tokenizer.decode([*before, *ids[start:end]]))
        same_part = end < len(ids) and parts[end] == parts[start]
        if text.endswith(_BROKEN) and same_part and end - start < 4:
            continue
        found.append(Piece(tuple(ids[start:end]), text[len(lead) :], parts[start]))
        start = end
    return found


# ---------------------------------------------------------------- comparisons by source

UNNAMED = "(no source)"


@dataclass
class SourceFigures:
    """Sums over the rows of a source, and their means."""

    comparisons: int = 0
    rows: int = 0
    user: list[int] = field(default_factory=list)
    """Tokens of each message of the user."""
    assistant: list[int] = field(default_factory=list)
    """Likewise of the assistant, responses too."""
    examples: list[float] = field(default_factory=list)
    """Tokens of each dialogue with a response, the mean of its responses."""

    def figures(self) -> tuple[int, float, float, float, float]:
        """comparisons; turns; tokens of an example, of a prompt, of a response."""
        means = [sum(found) / max(len(found), 1) for found in (self.examples, self.user, self.assistant)]
        return self.comparisons, len(self.user) / self.rows, means[0], means[1], means[2]


def comparison_table(
    source: str, tokenizer: PreTrainedTokenizerBase, *, columns: str | None, limit: int | None, on_bad_rows: OnBadRows
) -> list[tuple[str, SourceFigures]]:
    """Of each value of the column `source`, by name, and at the end under "all" of all rows; ties are no comparisons.

    Raises `InputError` for rows that cannot be used.
    """
    found, total = dict[str, SourceFigures](), SourceFigures()

    def encode(chunk: Sequence[tuple[int, Comparison]]) -> list[None]:
        texts = [text for _, row in chunk for text in (*(m.content for m in row.messages), *row.responses)]
        ids = cast(list[list[int]], tokenizer(texts, add_special_tokens=False)["input_ids"])
        lengths = iter(map(len, ids))
        for _, row in chunk:
            said = [(message.role, next(lengths)) for message in row.messages]
            responses = [next(lengths) for _ in row.responses]
            name = row.evidence.get("source")
            for to in (found.setdefault(str(name) if name is not None else UNNAMED, SourceFigures()), total):
                _add(to, row, said, responses)
        return [None for _ in chunk]

    rows = CheckedRows(source, limit, columns=columns, compared=True)
    rows.collect(parse_comparison, encode, on_bad_rows)
    return [*sorted(found.items()), ("all", total)] if found else []


def _add(to: SourceFigures, row: Comparison, said: list[tuple[str, int]], responses: list[int]) -> None:
    places: Any = row.places
    to.comparisons += sum(places[i] != places[j] for i in range(len(places)) for j in range(i))
    to.rows += 1
    to.user += [count for role, count in said if role == "user"]
    to.assistant += [*(count for role, count in said if role == "assistant"), *responses]
    to.examples.append(sum(count for _, count in said) + sum(responses) / len(responses))
