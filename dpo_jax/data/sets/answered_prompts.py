"""Prompts with an answer each: a file of dialogues, of which the last answer stands apart."""

from collections.abc import Iterator

import numpy as np

from dpo_jax.config import DataConfig
from dpo_jax.data.rows.dialogues import Dialogue, parse_dialogue
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.prompts import Prompt, PromptDataset
from dpo_jax.data.sources.checked_rows import CheckedRows, Numbered, OnBadRows, check_ids
from dpo_jax.data.tokens.chat_tokenizer import end_of
from dpo_jax.data.tokens.cuts import RowCut
from dpo_jax.data.tokens.encode import ConversationEncoder, Encoded
from dpo_jax.data.tokens.ragged import Ragged


def load_answered_prompts(
    source: str,
    encoder: ConversationEncoder,
    config: DataConfig,
    *,
    longest: int,
    answer: int,
    vocab_size: int,
    on_bad_rows: OnBadRows = "refuse",
) -> tuple[PromptDataset, Ragged]:
    """The prompts of a file of dialogues, and the last answer of each, its terminator included.

    Args: as `load_prompts`, and `answer`: of a longer one the first so many tokens are kept.

    Raises `InputError` as `load_prompts` does.
    """
    rows = CheckedRows(source, config.limit, columns=config.columns)

    def encoded(dialogue: Dialogue) -> Encoded | BadRow:
        *prompt, last = dialogue.messages
        try:
            rendered = encoder.render_group(tuple(prompt), (last.content,), dialogue.raw)
        except BadRow as problem:
            return problem
        return encoder.encode([rendered], compared=False)[0]

    def encode(chunk: Numbered[Dialogue]) -> Iterator[tuple[Prompt, np.ndarray, np.ndarray, RowCut] | BadRow]:
        for number, dialogue in chunk:
            found = encoded(dialogue)
            if isinstance(found, BadRow):
                yield found
                continue
            ids, response = found.prompt, found.responses[0]
            check_ids(int(max(ids.max(), response.max())), vocab_size, number)
            response = response[:-1] if dialogue.cut else response
            lost, first = max(len(ids) - longest, 0), dialogue.messages[0]
            cut = RowCut(lost, int(len(response) > answer), lost > 0 and first.role == "system")
            prompt = Prompt(dialogue.messages[:-1], None if dialogue.raw is None else dialogue.raw[0])
            yield prompt, end_of(ids, longest, encoder.bos), response[:answer], cut

    found, read = rows.collect(parse_dialogue, encode, on_bad_rows)
    prompts, ids, answers, cuts = zip(*found, strict=True)
    data = PromptDataset(
        ids=Ragged.of(ids, np.int32),
        prompts=tuple(prompts),
        safety=np.zeros(len(prompts), bool),
        cuts=cuts,
        **read,
    )
    return data, Ragged.of(answers, np.int32)
