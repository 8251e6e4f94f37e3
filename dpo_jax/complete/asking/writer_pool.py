"""A pool of writers: who answers which prompt under which principle, and what each of them writes.

UltraFeedback (Cui et al. 2023, section 3): for each prompt four models are drawn from a pool, and for each completion a
principle and one of its system prompts. Here writers have weights: they are drawn one after the other without
replacement, each in proportion to the weights of those that are left. A draw depends on the seed and on the prompt's
row alone. The principles' texts are this project's (`prompts/principles.json`), or those of a file.
"""

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dpo_jax.complete.asking.answers import Answer
from dpo_jax.complete.asking.chat_client import Question
from dpo_jax.complete.asking.yaml_options import fields_of, read_yaml
from dpo_jax.config.recipes.aif import WriterConfig
from dpo_jax.data.sets.comparison_sets import parse_responses
from dpo_jax.data.sources.files import read_rows
from dpo_jax.errors import InputError, naming

Principles = Mapping[str, Sequence[str]]
Messages = Sequence[Mapping[str, str]]


def read_pool(file: str) -> tuple[WriterConfig, ...]:
    """The writers of a YAML file. Raises `InputError` for one that is none, or names a writer twice."""
    known = [field.name for field in dataclasses.fields(WriterConfig)]
    with naming(f"--pool {file}"):
        found = read_yaml(file)
        if not isinstance(found, list) or not found:
            raise InputError("holds no list of writers; write - name: NAME and below it model, responses or endpoint")
        writers = []
        for number, one in enumerate(found, 1):
            with naming(f"writer {number}"):
                fields = fields_of(WriterConfig, one, "", known)
                if "name" not in fields:
                    raise InputError("name is missing")
                writers.append(WriterConfig(**fields))
        names = [writer.name for writer in writers]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"names {twice} twice; a response is to say which of two wrote it")
    return tuple(writers)


def read_principles(source: str, language: str) -> dict[str, list[str]]:
    """System prompts by principle: `source` is ours, none ({}), or a file. Raises `InputError`."""
    if source == "none":
        return {}
    if source == "ours":
        text = resources.files("dpo_jax.complete").joinpath("prompts", "principles.json").read_text(encoding="utf-8")
        return dict(json.loads(text)[language])
    try:
        found = json.loads(Path(source).expanduser().read_text(encoding="utf-8"))
        whole = isinstance(found, dict) and found and all(isinstance(v, list) and v for v in found.values())
        if not whole or not all(isinstance(text, str) and text.strip() for v in found.values() for text in v):
            raise ValueError("it is to hold {principle: [text, ...]}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--principles {source}: not readable as principles: {error}") from error
    return dict(found)


def as_key(messages: Messages) -> str:
    """By which the responses of a file find their prompt."""
    return json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)


def read_responses(file: str) -> dict[str, list[Answer]]:
    """Prompt -> the responses to it, of any file of responses; with the row's `finish_reason` where it has one of one
    response, as `dpo-jax generate` writes it. Raises `InputError`."""
    found: dict[str, list[Answer]] = {}
    for number, row in read_rows(file):
        with naming(f"{file}: row {number}"):
            one = parse_responses(row)
        reason = row.get("finish_reason") if len(one.responses) == 1 else None
        reason = reason if isinstance(reason, str) else None
        made = [Answer(text, None, reason) for text in one.responses if text.strip()]
        found.setdefault(as_key([m.as_dict() for m in one.messages]), []).extend(made)
    return found


def drawn(
    writers: Sequence[WriterConfig], able: Sequence[bool], count: int, principles: Principles, key: str
) -> list[dict[str, Any]] | None:
    """Who answers one prompt: [{"model", "principle", "custom_system_prompt"}]; None: fewer than `count` are able to.

    Args:
      able: of each writer, whether it can: a file may hold no response to the prompt.
      key: of the draw: the seed and the row.
    """
    rng, left = random.Random(key), [writer for writer, can in zip(writers, able, strict=True) if can]
    if len(left) < count:
        return None
    found = []
    for _ in range(count):
        at = rng.choices(range(len(left)), [writer.weight for writer in left])[0]
        writer = left.pop(at)
        one: dict[str, Any] = {"model": writer.name, "principle": None, "custom_system_prompt": None}
        if principles and writer.responses is None:  # what was written before followed none of ours
            one["principle"] = rng.choice(list(principles))
            one["custom_system_prompt"] = rng.choice(list(principles[one["principle"]]))
        found.append(one)
    return found


def question(messages: Messages, system: str | None, seed: int) -> Question:
    """What a writer is asked: the prompt, with the principle's text at the head of its system message."""
    told = [dict(message) for message in messages]
    if system is not None:
        if told[0]["role"] == "system":
            told[0]["content"] = f"{system}\n\n{told[0]['content']}"
        else:
            told.insert(0, {"role": "system", "content": system})
    return Question(tuple(told), seed=seed)


def from_file(responses: Mapping[str, Sequence[Answer]], messages: Messages, key: str) -> Answer:
    """A response of a file to a prompt, drawn by `key` where there are several."""
    there = responses.get(as_key(messages), ())
    return random.Random(key).choice(list(there)) if there else Answer("", "no response in the file")
