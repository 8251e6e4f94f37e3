"""What comparisons look like, by source: the columns of Llama 2's Table 6 (Touvron et al. 2023).

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
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from dpo_jax.data.rows.comparisons import Comparison, parse_comparison
from dpo_jax.data.sources.checked_rows import CheckedRows, OnBadRows

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
