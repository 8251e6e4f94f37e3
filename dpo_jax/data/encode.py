"""Conversations -> token ids, and which of them count.

* The ids of prompt + response are the ids of the whole rendered conversation. It is rendered with and without the last
  turn, and the boundary in the text is where the answer begins, after the template's header for it.
* A token that straddles the boundary (a newline of the header merged with one of the answer) belongs to the response.
  As both responses share one prompt, the prompt is the longest common run of tokens that lie before the boundary in
  both; whatever header token this leaves over opens the response.
* A response ends with exactly one terminator: the special token that the template writes after an answer, else EOS.
  What the template writes behind it is left out. An answer that spells the terminator itself does not get a second one.
* BOS stands at the very start, once, if the template writes it or the tokenizer adds it; never before the response.
* A control token inside the text of a conversation would end the answer early, or begin a turn that nobody wrote: such
  rows are left out. (Not with `raw`, where the texts are taken as they stand.)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.messages import Message
from dpo_jax.data.preferences import Pair
from dpo_jax.data.problems import BadRow
from dpo_jax.data.templates import RAW, ChatTemplate
from dpo_jax.errors import InputError

_PROBE = "Quicksilver"
_SAME = "'chosen' and 'rejected' are the same tokens"


@dataclass(frozen=True)
class Rendered:
    """A pair as text: the whole conversations, and where their answers begin and end.

    Attributes:
      wholes: prompt, answer and terminator text, for chosen and rejected; None for an absent one.
      boundary: character at which the answers begin, the same in both.
      ends: character at which the answer's own text ends and the template's turn end begins, for each.
    """

    wholes: tuple[str | None, str | None]
    boundary: int
    ends: tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """A pair as ids: prompt int32 [p], responses int32 [r] each (length 0 = absent), formats bool [r] each.

    `formats` is True at the tokens of a response that the template wrote (header and turn end).
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    formats: tuple[np.ndarray, ...]


class ConversationEncoder:
    """Renders and tokenises conversations with one tokenizer and one template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None):
        """Args: a fast tokenizer; a template name (see `templates.py`), or None for the tokenizer's own.

        Raises `InputError` when they do not fit together.
        """
        if not tokenizer.is_fast:
            raise InputError("the tokenizer has no fast form (tokenizer.json); save one with transformers")
        # A copy without post-processor: it adds no BOS and trims no spaces off the offsets (the ids are the same).
        self._backend = Tokenizer.from_str(cast(Tokenizer, tokenizer.backend_tokenizer).to_str())
        self._backend.post_processor = None
        self._backend.no_padding()
        self._backend.no_truncation()
        bos = cast(int | None, tokenizer.bos_token_id)
        self._added_bos = bos if bos is not None and tokenizer("a")["input_ids"][0] == bos else None
        self._eos = cast(int | None, tokenizer.eos_token_id)
        self._special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._closers = self._special.keys() - {bos, cast(int | None, tokenizer.unk_token_id)} | {self._eos}
        longest_first = sorted(self._special.values(), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._template = None if template == RAW else ChatTemplate(tokenizer, template)
        probe = self._probe()
        self._tail, self._closing, self._terminator = self._turn_end(probe[probe.rindex(_PROBE) + len(_PROBE) :])
        # Some templates open every turn with the token that the tokenizer calls BOS; there it marks no start.
        written = self._backend.encode(probe, add_special_tokens=False).ids
        self.bos = bos if bos is not None and written[0] == bos and written.count(bos) == 1 else self._added_bos

    @property
    def terminators(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's turn end, and EOS."""
        return tuple(dict.fromkeys(i for i in (self._terminator, self._eos) if i is not None))

    def _probe(self) -> str:
        """A short conversation under the template: what it writes around the answer `_PROBE`."""
        if self._template is None:
            return _PROBE
        problems: list[BadRow] = []
        for system in ((), (Message("system", "a"),)):  # some templates demand a system message
            try:
                text = self._template.render((*system, Message("user", "a"), Message("assistant", _PROBE)))
            except BadRow as problem:
                problems.append(problem)
                continue
            if _PROBE in text:
                return text
            raise InputError("the chat template does not write assistant messages; name one with --data.template")
        raise InputError(f"{problems[0]}; name another with --data.template") from problems[0]

    def _turn_end(self, tail: str) -> tuple[str, str, int]:
        """(what the template writes after an answer, the part of it that counts, the id of the terminator)."""
        encoding = self._backend.encode(tail, add_special_tokens=False)
        for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._special:
                return tail, tail[:end], token
        if self._eos is None:
            raise InputError("neither the template nor the tokenizer has a token that ends an answer; add an EOS token")
        return tail, tail.rstrip(), self._eos

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def prompt_ids(self, prompt: Sequence[Message] | str, *, max_length: int | None = None) -> list[int]:
        """Ids to generate an answer from: messages under the template, or with `raw` a text.

        Of a prompt of more than `max_length` tokens, BOS and the end are kept.
        """
        if self._template is None:
            if not isinstance(prompt, str):
                raise InputError("--data.template raw takes prompts as text, not as messages")
            text = prompt
        else:
            messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
            text = self._template.render(messages, generation=True)
        ids = np.asarray(self._with_bos(self._backend.encode(text, add_special_tokens=False).ids), np.int32)
        return _end_of(ids, len(ids) if max_length is None else max_length, self.bos).tolist()

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if self._added_bos is None or ids[:1] == [self._added_bos] else [self._added_bos, *ids]

    # ---- pairs -------------------------------------------------------------------------------------------------------

    def render(self, pair: Pair) -> Rendered:
        """The texts of a pair. Raises `BadRow` where the template cannot render it."""
        if self._template is None:
            return self._render_raw(pair)
        for text in (*(m.content for m in pair.messages), *map(self._unclosed, (pair.chosen, pair.rejected))):
            if text is not None and (found := self._control.search(text)):
                detail = f"{found[0]!r} would be read as such; spell it differently"
                raise BadRow("the text holds a control token of the tokenizer", detail, "noise")
        prompt = self._template.render(pair.messages, generation=True)
        wholes: list[str | None] = []
        ends, boundaries = [], []
        for answer in map(self._unclosed, (pair.chosen, pair.rejected)):
            if answer is None:
                wholes.append(None)
                ends.append(0)
                continue
            whole = self._template.render((*pair.messages, Message("assistant", answer)))
            start, end = len(prompt), len(whole) - len(self._tail)
            if not whole.startswith(prompt):
                # The header for generation may be more than what stands before a given answer (an opened <think>, say).
                bare = self._template.render(pair.messages)
                start = whole.rfind(answer.strip(), len(bare), end) if whole.startswith(bare) else -1
            if start < 0 or not whole.endswith(self._tail):
                detail = "what it writes around the answer depends on the answer; name another template"
                raise BadRow("the chat template renders the prompt differently with an answer", detail)
            boundaries.append(start)
            ends.append(end)
            wholes.append(whole[:end] + self._closing)
        return Rendered((wholes[0], wholes[1]), min(boundaries), (ends[0], ends[1]))

    def _unclosed(self, answer: str | None) -> str | None:
        """`answer` without terminators that it spells itself at its end."""
        closings = [self._special[i] for i in self.terminators if i in self._special]
        while answer is not None and (found := next((c for c in closings if answer.rstrip().endswith(c)), None)):
            answer = answer.rstrip().removesuffix(found)
        return answer

    def _render_raw(self, pair: Pair) -> Rendered:
        if pair.raw is None:
            detail = "it consists of several messages; name a template that joins them"
            raise BadRow("--data.template raw takes prompts as plain text", detail)
        prompt, *answers = pair.raw
        wholes = [None if a is None else prompt + a for a in answers]
        return Rendered((wholes[0], wholes[1]), len(prompt), (len(wholes[0] or ""), len(wholes[1] or "")))

    def encode(self, rows: Sequence[Rendered]) -> list[Encoded | BadRow]:
        """Ids of many pairs at once (in parallel), untruncated; a `BadRow` where a pair has nothing to learn from."""
        texts = [whole for row in rows for whole in row.wholes if whole is not None]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        out: list[Encoded | BadRow] = []
        for row in rows:
            present = [(None if whole is None else next(encodings)) for whole in row.wholes]
            try:
                out.append(self._split(row, present))
            except BadRow as problem:
                out.append(problem)
        return out

    def _split(self, row: Rendered, encodings: Sequence[Encoding | None]) -> Encoded:
        parts = [
            None if whole is None or encoding is None else self._part(encoding, row.boundary, end, len(whole))
            for whole, encoding, end in zip(row.wholes, encodings, row.ends, strict=True)
        ]
        present = [part for part in parts if part is not None]
        length = min(part.start for part in present)
        if len(present) == 2:
            if present[0].ids == present[1].ids:
                raise BadRow(_SAME, "they differ in nothing that the template keeps", "lost")
            length = _common(present[0].ids, present[1].ids, length)
        if length == 0:
            raise BadRow("empty prompt: no token stands before the answer", "give the row a prompt")
        responses, formats = [], []
        for part in parts:
            ids, start, stop = part or _Part([], 0, 0)
            at = np.arange(length, max(len(ids), length))
            responses.append(np.asarray(ids[length:], np.int32))
            formats.append((at < start) | (at >= stop))
        return Encoded(np.asarray(present[0].ids[:length], np.int32), tuple(responses), tuple(formats))

    def _part(self, encoding: Encoding, boundary: int, end: int, length: int) -> "_Part":
        ids = list(encoding.ids)
        start, stop = _first_token(encoding, boundary, length), _first_token(encoding, end, length)
        if not ids or ids[-1] not in self._closers:
            ids.append(self._terminator)
        stop = min(stop, len(ids) - 1)  # a raw text may spell its terminator itself
        if stop <= start:
            raise BadRow("empty completion: no token of the answer is left", severity="lost")
        with_bos = self._with_bos(ids)
        shift = len(with_bos) - len(ids)
        return _Part(with_bos, start + shift, stop + shift)


class _Part(NamedTuple):
    """A whole conversation: its ids, and the first token of the answer and of the turn end behind it."""

    ids: list[int]
    start: int
    stop: int


def _first_token(encoding: Encoding, character: int, length: int) -> int:
    """Index of the first token that holds `character` or a later one (a character may vanish in normalisation)."""
    for position in range(character, length):
        if (token := encoding.char_to_token(position)) is not None:
            return token
    return len(encoding.ids)


def _common(a: list[int], b: list[int], limit: int) -> int:
    """Length of the longest common prefix of `a` and `b`, at most `limit`."""
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def truncate(encoded: Encoded, *, max_length: int, max_prompt_length: int, bos: int | None) -> Encoded:
    """Keep the end of an over-long prompt (behind its BOS), then the start of each response.

    The prompt gets at most `max_prompt_length` tokens, prompt and response at most `max_length`. A cut response has no
    terminator. Raises `BadRow` where chosen and rejected differ in nothing that is left.
    """
    prompt = _end_of(encoded.prompt, max_prompt_length, bos)
    room = max_length - len(prompt)
    responses = tuple(r[:room] for r in encoded.responses)
    if np.array_equal(responses[0], responses[1]):
        raise BadRow(_SAME, f"the first {room} of them; raise --data.max_length", "lost")
    return Encoded(prompt, responses, tuple(f[:room] for f in encoded.formats))


def _end_of(prompt: np.ndarray, length: int, bos: int | None) -> np.ndarray:
    """The last `length` tokens of a prompt, its BOS among them if it has one."""
    if len(prompt) <= length:
        return prompt
    if length > 1 and prompt[0] == bos:
        return np.concatenate([prompt[:1], prompt[len(prompt) - length + 1 :]])
    return prompt[len(prompt) - length :]
