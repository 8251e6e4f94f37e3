"""What the model sees of a row: its tokens as text, with the part each of them plays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.sequences import SequenceDataset

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
