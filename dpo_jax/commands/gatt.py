"""`dpo-jax gatt`: Ghost Attention (`align/gatt.py`) in the order in which it happens.

    1  samples.jsonl   the model answers user prompts turn by turn, with an instruction in every turn
    2  sft.jsonl       these dialogues in training form: the instruction in the first turn, the last answer to be learnt
                       (one that was cut, without a terminator)
    3  before.jsonl    unseen prompts with the instruction in the first turn only, answered by the model as it is
    4  sft/, model/    fine-tuning on sft.jsonl: a run like any other of `dpo-jax sft`; its model
    5  after.jsonl     as 3, with the same random numbers, by the fine-tuned model
    6  metrics.jsonl, consistency.png, report.html: which share of the answers keeps to its instruction, turn by turn

A stage that is done is not done again (`files/stages.py`); texts go on in the middle of a file, training at its last
checkpoint.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dpo_jax.align import gatt as ghost
from dpo_jax.commands import sft
from dpo_jax.complete.writing.gatt_dialogues import (
    Outline,
    Plan,
    check_room,
    check_template,
    make_plan,
    seed_of,
    write_dialogues,
)
from dpo_jax.complete.writing.writer import Writer
from dpo_jax.config import GattRun, SFTRun, sft_inside
from dpo_jax.data.rows.dialogues import parse_dialogue
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.encode_dialogue import DialogueEncoder
from dpo_jax.errors import InputError
from dpo_jax.files.day import with_day
from dpo_jax.files.folder import RunFolder, as_json, write_atomically
from dpo_jax.files.jsonl import Row, read_lines, write_lines
from dpo_jax.files.log import read_metrics, say, show_log
from dpo_jax.files.stages import Figures, Stage, Stages, last_figures
from dpo_jax.mesh import make_mesh
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.report import card, gatt as gatt_report
from dpo_jax.sample.decode import limits
from dpo_jax.weights.opened import open_checkpoint
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import check_vocabulary


def gatt(run: GattRun) -> Path:
    """The `gatt` command; returns the run folder. See the module for the stages.

    Raises `InputError` for bad input; all that can be checked before the first token is checked before.
    """
    show_log()
    out = Path(run.out)
    folder = RunFolder(out, "gatt", as_json(run))
    stages = Stages(folder)
    if stages.status == "finished":
        say(f"{out}: this run is finished; for another choose another --out")
        return out
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor, run.mesh.context)
    place = open_checkpoint(run.model)
    architecture, tokenizer = place.architecture, place.tokenizer()
    check_vocabulary(tokenizer, architecture)
    run = with_day(run, folder, tokenizer)
    encoder = ConversationEncoder.of(tokenizer, run.data)
    check_template(encoder)
    plan = make_plan(run)
    _check_lengths(run, plan, encoder, architecture)
    if run.gatt.train and not run.gatt.evaluate_only and stages.status == "new":
        sft.begin(training_run(run))  # refuses now what it would refuse after sampling
    to_learn = DialogueEncoder.of(tokenizer, run.data, train_on="last")
    model, trained = (
        Writer(
            partial(load_pretrained, source, mesh=mesh, dtype=run.train.dtype),
            tokenizer,
            encoder,
            run.sample,
            run.sample_batch_size,
            mesh=mesh,
        )
        for source in (run.model, str(out))
    )
    work = _Gatt(run, plan, to_learn, model, trained)
    stages.perform(work.stages(), run, {"--data (or --eval_data, --gatt.instructions)": plan.fingerprint})
    if run.gatt.train:
        gatt_report.write(run, out)
    stages.finish()
    made = f"the report is in {out / 'report.html'}"
    learnt = f"the dialogues are in {out / 'sft.jsonl'} (train with --data.train_on last)"
    say(f"{out}: finished; {made if run.gatt.train else learnt}")
    return out


class _Gatt:
    """The stages. Two models write: that of the options, and the trained one."""

    def __init__(self, run: GattRun, plan: Plan, encoder: DialogueEncoder, model: Writer, trained: Writer):
        self._run, self._plan, self._encoder, self._out = run, plan, encoder, Path(run.out)
        self._model, self._trained = model, trained

    def stages(self) -> list[Stage]:
        """Those that the options ask for, in order."""
        options, plan, model, out = self._run.gatt, self._plan, self._run.model, self._out
        samples, rows = out / "samples.jsonl", out / "sft.jsonl"
        asked = partial(self._write, self._model, "samples", plan.training, "training", "every")
        before, after = (
            partial(self._write, writer, name, plan.evaluation, "evaluation", "first")
            for writer, name in ((self._model, "before"), (self._trained, "after"))
        )
        heading = f"{len(plan.training)} dialogues of {options.turns} turns, the instruction in every turn"
        unseen = f"{len(plan.evaluation)} unseen dialogues of {options.evaluated_turns} turns"
        learning = [
            Stage(heading, (model,), samples, asked),
            Stage("dialogues to learn from", (samples,), rows, self._rows),
        ]
        measuring = Stage(f"{unseen} before training", (model,), out / "before.jsonl", before)
        if options.evaluate_only:
            return [measuring]
        if not options.train:
            return learning
        return [
            *learning,
            measuring,
            Stage("fine-tuning on the dialogues", (model, rows), out / "sft", self._train),
            Stage(f"{unseen} after training", (out / "sft",), out / "after.jsonl", after),
        ]

    def _write(
        self, writer: Writer, name: str, outlines: Sequence[Outline], purpose: str, where: ghost.Where
    ) -> Figures:
        path, seed = self._out / f"{name}.jsonl", self._run.train.seed
        rows = write_dialogues(writer, path, name, outlines, seed=seed, purpose=purpose, where=where)
        judged = [row["kept"] for row in rows if row["kept"] is not None]
        return {"answers": len(rows)} | ({"kept": sum(judged) / len(judged)} if judged else {})

    def _rows(self) -> Figures:
        path = self._out / "samples.jsonl"
        rows, left_out = training_rows(self._run, self._plan.training, read_lines(path), self._encoder)
        if not rows:
            words = "; ".join(f"{count} x {reason}" for reason, count in left_out)
            raise InputError(f"{path}: no answer can be learnt: {words}")
        write_lines(self._out / "sft.jsonl", rows)
        return {"dialogues": len(rows)} | {f"left out ({reason})": count for reason, count in left_out}

    def _train(self) -> Figures:
        """Train, and bring the model to OUT/model."""
        self._model.close()
        folder = sft.train(training_run(self._run))
        for name in ("adapter", "model"):
            if (folder / name).is_dir():
                (folder / name).rename(self._out / name)
                for file, content in self._card(folder, adapter=name == "adapter").items():
                    write_atomically(self._out / name / file, content)
        return last_figures(folder, {"loss": "loss"})

    def _card(self, folder: Path, *, adapter: bool) -> dict[str, bytes]:
        """What tells of the model, by name."""
        rows, fingerprints = read_metrics(folder / "metrics.jsonl"), {"the data": self._plan.fingerprint}
        basis, options = card.Basis.of(open_checkpoint(self._run.model)), as_json(self._run)
        told = {"steps": "", "fingerprints": fingerprints, "rows": rows}
        return dataclasses.replace(card.of_run("gatt", options, options, basis, **told), adapter=adapter).files()


# ---------------------------------------------------------------- before the first token


def _check_lengths(run: GattRun, plan: Plan, encoder: ConversationEncoder, architecture: LlamaConfig) -> None:
    """Raise `InputError` where a dialogue may grow beyond the model's context, or beyond what is trained of it."""
    new, context = run.sample.max_new_tokens, min(limits(architecture).values())
    of_model = "the model's context"
    if plan.training:
        room, limit = context, of_model
        if run.gatt.train and run.data.max_length < context:
            room, limit = run.data.max_length, "--data.max_length"
        check_room(encoder, plan.training, where="every", new=new, room=room, limit=limit)
    if plan.evaluation:
        check_room(encoder, plan.evaluation, where="first", new=new, room=context, limit=of_model)


# ---------------------------------------------------------------- training


def training_rows(
    run: GattRun, outlines: Sequence[Outline], samples: Sequence[Row], encoder: DialogueEncoder
) -> tuple[list[Row], list[tuple[str, int]]]:
    """The rows of sft.jsonl: `messages` in training form, of which the last is to be learnt: that of `turn`.

    Returns them with what was left out: (reason, how often), the most frequent first.
    """
    options = run.gatt
    said = {(row["dialogue"], row["turn"]): row for row in samples}
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    for i, outline in enumerate(outlines):
        terse = random.Random(seed_of(run.train.seed, "short", i)).random() < options.short
        instruction = outline.instruction.short if terse else None
        for turn in [options.turns] if options.train_turns == "last" else range(1, options.turns + 1):
            last = said[i, turn]
            if options.keep == "consistent" and not last["kept"]:
                left_out["does not keep to its instruction"] += 1
            else:
                spoken = [said[i, t]["answer"] for t in range(1, turn + 1)]
                messages = ghost.training_form(instruction or outline.instruction.text, outline.users, spoken)
                row: Row = {"messages": [m.as_dict() for m in messages], "finish_reason": last["finish_reason"]}
                row |= {"dialogue": i, "turn": turn}
                try:
                    encoder.render(parse_dialogue(row))
                except BadRow as problem:
                    left_out[problem.reason] += 1
                else:
                    rows.append(row)
    return rows, left_out.most_common()


def training_run(run: GattRun) -> SFTRun:
    """The SFT run inside: what `dpo-jax sft` would be told."""
    # Our own rows, which have been rendered once, are none of them bad.
    return sft_inside(run, Path(run.out), data={"train_on": ghost.TRAIN_ON}, on_bad_rows="refuse")
