"""Control tokens, and texts that spell them: text is text.

A template writes control tokens (turn ends, headers), people write texts, and a tokenizer is given both in one string,
in which it cannot tell them apart. Here what a text spells is encoded as the characters that it is, and only what the
template wrote becomes a control token:

    hide      a text's spellings of control tokens become marks, which mean nothing to the template that renders them
    encode    control tokens that stand in the rendered text are the template's: they get other names, as they have in a
              copy of the tokenizer; the marks become again what the text spelled, which is no token of that copy

Where no text spells one, the tokenizer itself is used.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property

from tokenizers import Tokenizer

from dpo_jax.data.rows.problems import BadRow

# Characters of a private use area that open and close the marks and the names.
_HIDDEN, _WRITTEN, _CLOSE = "\uf6d1", "\uf6d2", "\uf6d3"
_OURS = re.compile(f"[{_HIDDEN}{_WRITTEN}{_CLOSE}]")


class ControlTokens:
    """The control tokens of a tokenizer.

    Attributes:
      texts: id -> how the token is spelled.
    """

    def __init__(self, backend: Tokenizer, texts: Mapping[int, str]):
        """Args: the tokenizer, without post-processor; its control tokens."""
        self.texts = dict(texts)
        self._backend = backend
        self._ids = {text: i for i, text in texts.items()}
        unknown = getattr(backend.model, "unk_token", None)  # it may stand for any character
        self._unknown = None if unknown is None else backend.token_to_id(unknown)
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def find(self, text: str) -> str | None:
        """The first control token that `text` spells."""
        found = self._spelled.search(text)
        return None if found is None else found[0]

    def hide(self, texts: Sequence[str]) -> list[str] | None:
        """`texts` with marks in place of the control tokens that they spell; None where they spell none.

        Raises `BadRow` where they hold characters that the marks are made of, too.
        """
        if not any(self.find(text) for text in texts):
            return None
        if any(_OURS.search(text) for text in texts):
            detail = "beside a control token that is spelled there; remove U+F6D1, U+F6D2 and U+F6D3"
            raise BadRow("the text holds characters for private use", detail, "noise")
        return [self._spelled.sub(lambda found: f"{_HIDDEN}{self._ids[found[0]]}{_CLOSE}", text) for text in texts]

    def encode(self, text: str) -> list[int]:
        """Ids of a text with marks, without BOS: a mark is what was spelled, what is spelled now is a control token.

        Raises `BadRow` where the tokenizer makes a control token of what was spelled all the same.
        """
        named, written = self._spelled.subn(lambda found: _name(self._ids[found[0]]), text)
        spelled = re.sub(f"{_HIDDEN}(\\d+){_CLOSE}", lambda found: self.texts[int(found[1])], named)
        ids = self._renamed.encode(spelled, add_special_tokens=False).ids
        if sum(i in self.texts and i != self._unknown for i in ids) != written:
            detail = f"{self.find(spelled)!r}, which the tokenizer has no other ids for; spell it differently"
            raise BadRow("the text holds a control token of the tokenizer", detail, "noise")
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text without BOS, all of it text."""
        hidden = self.hide([text])
        return self._backend.encode(text, add_special_tokens=False).ids if hidden is None else self.encode(hidden[0])

    def encode_behind(self, text: str, answer: str) -> list[int]:
        """Ids of two texts in one, without BOS: control tokens are read in `text`, and `answer` is text."""
        hidden = self.hide([answer])
        if hidden is None:
            return self._backend.encode(text + answer, add_special_tokens=False).ids
        if _OURS.search(text):
            raise BadRow("the text holds characters for private use", "remove U+F6D1, U+F6D2 and U+F6D3", "noise")
        return self.encode(text + hidden[0])

    @cached_property
    def _renamed(self) -> Tokenizer:
        """The tokenizer with other names for its control tokens, the same in all else."""
        raw = json.loads(self._backend.to_str())
        names = {text: _name(i) for text, i in self._ids.items()}
        for token in raw["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = raw["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
        else:  # Unigram's pieces and scores
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model:
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            model["merges"] = [pair for pair in pairs if "".join(pair) not in names]
        return Tokenizer.from_str(json.dumps(raw))


def _name(token: int) -> str:
    return f"{_WRITTEN}{token}{_CLOSE}"
