"""Preference pairs, and prompts with any number of answers -> token ids, and which of them count.

(What begins and ends an answer: see `chat_tokenizer.py`.)

* The ids of prompt + response are the ids of the whole rendered conversation. It is rendered with and without the last
  turn, and the boundary in the text is where the answer begins, after the template's header for it.
* A token that straddles the boundary (a newline of the header merged with one of the answer) belongs to the response.
  As the responses share one prompt, the prompt is the longest common run of tokens that lie before the boundary in
  all; whatever header token this leaves over opens the response.
* A response ends with exactly one terminator; there is never a BOS before it. (For reward models: `ScoredEncoder`.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding

from dpo_jax.config.sections import prompt_room
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.preferences import Pair
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.tokens.chat_tokenizer import ChatTokenizer, behind, end_of, first_token
from dpo_jax.data.tokens.cuts import RowCut

_SAME = "'chosen' and 'rejected' are the same tokens"
_TWO_SAME = "two of the replies are the same tokens"


@dataclass(frozen=True)
class Rendered:
    """A prompt with its answers as text: the whole conversations, and where their answers begin and end.

    Attributes:
      wholes: prompt, answer and terminator text, for chosen and rejected, or as many answers as there are; None for an
        absent one.
      boundary: character at which the answers begin, the same in all.
      ends: character at which the answer's own text ends and the template's turn end begins, for each.
      system: the prompt begins with a system message.
    """

    wholes: tuple[str | None, ...]
    boundary: int
    ends: tuple[int, ...]
    system: bool = False


@dataclass(frozen=True)
class Encoded:
    """A pair as ids: prompt int32 [p], responses int32 [r] each (length 0 = absent), formats bool [r] each.

    `formats` is True at the tokens of a response that the template wrote (header and turn end).
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    formats: tuple[np.ndarray, ...]


class ConversationEncoder(ChatTokenizer):
    """Renders and tokenises preference pairs with one tokenizer and one template."""

    @property
    def _ending(self) -> str:
        """What closes a response, of the text that the template writes behind it."""
        return self._closing

    @property
    def endings(self) -> tuple[int, ...]:
        """Ids that a whole response ends with."""
        return self.terminators

    def render(self, pair: Pair) -> Rendered:
        """The texts of a pair. Raises `BadRow` where the template cannot render it."""
        return self.render_group(pair.messages, (pair.chosen, pair.rejected), pair.raw)

    def render_group(
        self, messages: tuple[Message, ...], texts: Sequence[str | None], raw: Sequence[str | None] | None
    ) -> Rendered:
        """The texts of a prompt and its answers (None for an absent one); `raw`: (prompt, answers ...) as spelled."""
        if self._template is None:
            return self._render_raw(raw)
        answers = [None if a is None else self._unclosed(a) for a in texts]
        self._refuse_control(messages, [a for a in answers if a is not None])
        prompt = self._render(messages, generation=True)
        wholes: list[str | None] = []
        ends, boundaries = [], []
        for answer in answers:
            if answer is None:
                wholes.append(None)
                ends.append(0)
                continue
            whole = self._render((*messages, Message("assistant", answer)))
            start, end = self._answer_in(whole, prompt, messages, answer)
            boundaries.append(start)
            ends.append(end)
            wholes.append(whole[:end] + self._ending)
        return Rendered(tuple(wholes), min(boundaries), tuple(ends), messages[0].role == "system")

    def _render_raw(self, raw: Sequence[str | None] | None) -> Rendered:
        if raw is None or raw[0] is None:
            detail = "it consists of several messages; name a template that joins them"
            raise BadRow("--data.template raw takes prompts as plain text", detail)
        prompt, *answers = raw
        assert prompt is not None, "it was looked at above"
        wholes = tuple(None if a is None else prompt + a for a in answers)
        return Rendered(wholes, len(prompt), tuple(len(whole or "") for whole in wholes))

    def encode(self, rows: Sequence[Rendered], *, compared: bool = True) -> list[Encoded | BadRow]:
        """Ids of many pairs at once (in parallel), untruncated; a `BadRow` where a pair has nothing to learn from.

        With `compared` false the answers are not for comparison, and may be the same.
        """
        texts = [whole for row in rows for whole in row.wholes if whole is not None]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        out: list[Encoded | BadRow] = []
        for row in rows:
            present = [(None if whole is None else next(encodings)) for whole in row.wholes]
            try:
                out.append(self._split(row, present, compared))
            except BadRow as problem:
                out.append(problem)
        return out

    def _split(self, row: Rendered, encodings: Sequence[Encoding | None], compared: bool) -> Encoded:
        parts = [
            None if whole is None or encoding is None else self._part(encoding, row.boundary, end, len(whole))
            for whole, encoding, end in zip(row.wholes, encodings, row.ends, strict=True)
        ]
        present = [part for part in parts if part is not None]
        length = min(part.start for part in present)
        if compared and _repeats([part.ids for part in present]):
            raise same_tokens("they differ in nothing that the template keeps", len(parts))
        for other in present[1:]:
            length = _common(present[0].ids, other.ids, length)
        if length == 0:
            raise BadRow("empty prompt: no token stands before the answer", "give the row a prompt")
        responses, formats = [], []
        for part in parts:
            ids, start, stop = part or _Part([], 0, 0)
            at = np.arange(length, max(len(ids), length))
            responses.append(np.asarray(ids[length:], np.int32))
            formats.append((at < start) | (at >= stop))
        return Encoded(np.asarray(present[0].ids[:length], np.int32), tuple(responses), tuple(formats))

    def _closed(self, ids: list[int]) -> list[int]:
        """The ids of a whole conversation with a terminator at their end."""
        return ids if ids and ids[-1] in self._closers else [*ids, self._terminator]

    def _part(self, encoding: Encoding, boundary: int, end: int, length: int) -> "_Part":
        ids = self._closed(encoding.ids)
        start, stop = first_token(encoding, boundary, length), first_token(encoding, end, length)
        # A raw text may spell its terminator itself.
        last = len(ids) - 1 if ids and ids[-1] in self._closers else len(ids)
        stop = min(stop, last)
        if min(behind(encoding, end, length), last) <= start:
            raise BadRow("empty completion: no token of the answer is left", severity="noise")
        with_bos = self._with_bos(ids)
        shift = len(with_bos) - len(ids)
        return _Part(with_bos, start + shift, stop + shift)


class ScoredEncoder(ConversationEncoder):
    """The same for reward models, which score the last token of the whole rendered template.

    There `transformers` reads a rendered dialogue (the last token that is not padding). So a response ends here with
    all that the template writes behind it, such as ChatML's newline, and with nothing else: a template without a turn
    end gets no EOS. With `raw` a response ends with its one terminator, as elsewhere.
    """

    @property
    def _ending(self) -> str:
        return self._tail

    def _closed(self, ids: list[int]) -> list[int]:
        return super()._closed(ids) if self._template is None else ids

    def whole_ids(self, prompt: Sequence[Message] | str, response: str) -> list[int]:
        """Ids of a prompt and a response up to the one to score at; what they spell is text.

        Messages (or a text that a user says) under the template; with `raw` a text, taken as it stands, and the
        response behind it. Any response will do, a blank one too: it is closed like all others. Raises `BadRow` where
        the template refuses the conversation.
        """
        if self._template is None:
            assert isinstance(prompt, str), "raw prompts are text"
            return self._with_bos([*self._control.encode_behind(prompt, response), self._terminator])
        messages = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
        return self._with_bos(self._rendered_ids((*messages, Message("assistant", response)), generation=False))

    @property
    def endings(self) -> tuple[int, ...]:
        """Ids that a whole response ends with; none where the template writes nothing behind it."""
        if self._template is None:
            return self.terminators
        return tuple(self._ids(self._tail)[-1:])


class _Part(NamedTuple):
    """A whole conversation: its ids, and the first token of the answer and of the turn end behind it."""

    ids: list[int]
    start: int
    stop: int


def _common(a: list[int], b: list[int], limit: int) -> int:
    """Length of the longest common prefix of `a` and `b`, at most `limit`."""
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def _repeats(answers: Sequence[list[int]]) -> bool:
    return len({tuple(ids) for ids in answers}) < len(answers)


def same_tokens(detail: str, responses: int = 2) -> BadRow:
    """What to raise where two of so many responses are the same tokens."""
    return BadRow(_SAME if responses == 2 else _TWO_SAME, detail, "lost")


def truncate(
    encoded: Encoded, max_length: int, max_prompt_length: int | None, *, bos: int | None, compared: bool = True
) -> Encoded:
    """Keep the end of an over-long prompt (behind its BOS), then the start of each response.

    Prompt and response get at most `max_length` tokens; what of it the prompt gets, `prompt_room` says of the longest
    response. A cut response has no terminator. Raises `BadRow` where two of the responses differ in nothing that is
    left, if they are `compared`.
    """
    most = prompt_room(max(map(len, encoded.responses)), max_length, max_prompt_length)
    prompt = end_of(encoded.prompt, most, bos)
    room = max_length - len(prompt)
    responses = tuple(r[:room] for r in encoded.responses)
    if compared and _repeats([r.tolist() for r in responses if len(r)]):
        raise same_tokens(f"the first {room} of them; raise --data.max_length", len(responses))
    return Encoded(prompt, responses, tuple(f[:room] for f in encoded.formats))


def cut_of(whole: Encoded, kept: Encoded, *, system: bool) -> RowCut:
    """What `truncate` cut off a row; `system`: its prompt began with a system message."""
    shorter = sum(len(a) > len(b) for a, b in zip(whole.responses, kept.responses, strict=True))
    prompt = len(whole.prompt) - len(kept.prompt)
    return RowCut(prompt, shorter, system and prompt > 0)
