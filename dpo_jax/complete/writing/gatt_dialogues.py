"""Dialogues of `dpo-jax gatt`: planned before the first token, then written by a model turn after turn."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from dpo_jax.align import gatt
from dpo_jax.complete.writing.writer import Draw, Some, Writer
from dpo_jax.config import GattRun
from dpo_jax.data.sources.attributes import languages
from dpo_jax.data.sources.instructions import LANGUAGES, Instruction, read_instructions, synthesise
from dpo_jax.data.sources.user_turns import Turns, apart_from, chain, read_user_turns, split
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import Row, read_lines
from dpo_jax.files.log import say


@dataclass(frozen=True)
class Outline:
    """A dialogue of which the answers are still to be written: what holds for them, and what the user says."""

    instruction: Instruction
    users: Turns


@dataclass(frozen=True)
class Plan:
    """All dialogues of a run.

    Attributes:
      training: to sample and to learn from; none with --gatt.evaluate_only.
      evaluation: on prompts of which training has none; none with --gatt.no_train.
    """

    training: tuple[Outline, ...]
    evaluation: tuple[Outline, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that is said and checked."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


def seed_of(seed: int, purpose: str, turn: int = 0) -> int:
    """A seed in [0, 2^32) for one purpose of a run, and one turn."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {turn}".encode()).digest()[:4], "big")


def make_plan(run: GattRun) -> Plan:
    """Read instructions and prompts. A pure function of the options and the files. Raises `InputError`."""
    options, seed = run.gatt, run.train.seed
    pool = _instructions(run)
    checked = tuple(one for one in pool if one.checks)
    if options.train and not checked:
        raise InputError(
            f"{options.instructions}: no instruction has a check, so nothing can be evaluated; add a column 'check', or"
            " stop at the data with --gatt.train false"
        )
    learnt = checked if options.keep == "consistent" else pool
    if not learnt:
        raise InputError(f"{options.instructions}: --gatt.keep consistent needs instructions with a column 'check'")
    rows = read_user_turns(run.data.files, limit=run.data.limit, columns=run.data.columns, on_bad_rows=run.on_bad_rows)
    source = run.eval_data or run.data.files
    if options.evaluate_only:
        training, held = (), rows
    elif not options.train:
        training, held = rows, ()
    elif run.eval_data is not None:
        training = rows
        held = apart_from(
            read_user_turns(run.eval_data, columns=run.data.columns, on_bad_rows=run.on_bad_rows), training
        )
    else:
        training, held = split(rows, options.settled.holdout, seed)

    def outlines(
        purpose: str, source: str, said: Sequence[Turns], about: Sequence[Instruction], turns: int, count: int
    ) -> tuple[Outline, ...]:
        chains = chain(said, turns=turns, count=count, seed=seed_of(seed, purpose), source=source)
        return tuple(Outline(about[i % len(about)], users) for i, users in enumerate(chains))

    kept = f"{source}, the part kept for the evaluation"
    return Plan(
        training=()
        if options.evaluate_only
        else outlines(
            "training", f"{run.data.files}, the part for training", training, learnt, options.turns, options.dialogues
        ),
        evaluation=()
        if not options.train
        else outlines("evaluation", kept, held, checked, options.evaluated_turns, options.eval_dialogues),
    )


def _instructions(run: GattRun) -> tuple[Instruction, ...]:
    options = run.gatt
    known = languages()
    if options.made and "language" in options.kinds:
        known = tuple(code for _, code in LANGUAGES)
    for code in options.languages:
        if code not in known:
            raise InputError(f"--gatt.languages {code} is unknown; choose among {', '.join(known)}")
    pool: list[Instruction] = []
    if options.instructions is not None:
        found = read_instructions(options.instructions, languages=options.languages, on_bad_rows=run.on_bad_rows)
        checked = sum(bool(one.checks) for one in found)
        say(f"{options.instructions}: {len(found)} different instructions, {checked} of them with a check")
        pool += found
    pool += synthesise(
        options.made,
        seed=seed_of(run.train.seed, "instructions"),
        kinds=options.kinds,
        combine=options.combine,
        languages=options.languages,
    )
    return tuple(dict.fromkeys(pool))


def check_room(
    encoder: ConversationEncoder, outlines: Sequence[Outline], *, where: gatt.Where, new: int, room: int, limit: str
) -> None:
    """Raise `InputError` where the longest of the dialogues may not fit `room` tokens, saying how many turns do.

    Args:
      encoder: of the model's tokenizer and template.
      outlines, where: what is said, and in which turns the instruction stands.
      new: tokens of an answer at most.
      limit: what `room` is, in words.
    """

    def longest(turns: int) -> int:
        asked = (gatt.asking(o.instruction.text, o.users[:turns], ["a"] * (turns - 1), where=where) for o in outlines)
        return max(len(encoder.prompt_ids(messages)) for messages in asked) + turns * new

    turns = len(outlines[0].users)
    if (tokens := longest(turns)) <= room:
        return
    fit = next((t for t in range(turns - 1, 0, -1) if longest(t) <= room), 0)
    raise InputError(
        f"{turns} turns with answers of up to {new} tokens may take {tokens} tokens, and {limit} is {room}: {fit} of"
        " them fit; lower --gatt.turns (--gatt.eval_turns) or --sample.max_new_tokens"
    )


def check_template(encoder: ConversationEncoder) -> None:
    """Raise `InputError` where the chat template does not show a model in its third turn what the first turn said."""
    asked = [
        encoder.prompt_ids(gatt.asking(word, ("a", "b", "c"), ("d", "e"), where="first")) for word in ("first", "other")
    ]
    if asked[0] == asked[1]:
        raise InputError(
            "the chat template leaves earlier turns out, so an instruction of the first is gone; name another with"
            " --data.template"
        )


def write_dialogues(
    writer: Writer, path: Path, label: str, outlines: Sequence[Outline], *, seed: int, purpose: str, where: gatt.Where
) -> list[Row]:
    """The answers of all dialogues, judged, one row each, kept in `path`; or read them where they are there.

    All dialogues advance together, a turn at a time. An answer depends on its dialogue so far, `purpose`, the seed,
    its turn and the number of its dialogue, not on what is written beside it.
    """
    if path.exists():
        say(f"{label}: from {path}")
        return read_lines(path)
    settings = {
        "weights": writer.weights,
        "dialogues": hashlib.sha256(json.dumps([asdict(o) for o in outlines]).encode()).hexdigest(),
        "sample": asdict(writer.config),
        "seed": seed,
        "purpose": purpose,
        "where": where,
    }
    turns = len(outlines[0].users)

    def draws(rows: list[Row]) -> Iterator[Draw]:
        for turn in range(1, turns + 1):
            said = {(row["dialogue"], row["turn"]): row["answer"] for row in rows}
            asked = (
                gatt.asking(o.instruction.text, o.users, [said[i, t] for t in range(1, turn)], where=where)
                for i, o in enumerate(outlines)
            )
            prompts = [writer.encoder.prompt_ids(messages) for messages in asked]
            requests = {(i, turn): (i, 0) for i in range(len(outlines))}
            yield Draw(prompts, requests, seed_of(seed, purpose, turn), partial(_rows, outlines, turn))

    return writer.write(
        path,
        label,
        settings,
        draws,
        total=len(outlines) * turns,
        key=lambda row: (row["dialogue"], row["turn"]),
        counted="answers",
        note=lambda rows: f"turn {rows[-1]['turn']}  ",
    )


def _rows(outlines: Sequence[Outline], turn: int, some: Some) -> Iterator[Row]:
    for (index, _), response in some:
        # A cut answer may end inside a character of several bytes.
        answer = response.text.rstrip("\N{REPLACEMENT CHARACTER}")
        instruction, user = outlines[index].instruction, outlines[index].users[turn - 1]
        checks = {check.kind: check(answer) for check in instruction.checks}
        yield {
            "dialogue": index,
            "turn": turn,
            "instruction": instruction.text,
            "user": user,
            "answer": answer,
            "checks": checks,
            "kept": all(checks.values()) if checks else None,
            "finish_reason": response.finish_reason,
            "ids": response.ids,
        }
