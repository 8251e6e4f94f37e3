"""`dpo-jax gatt`: Ghost Attention (`align/gatt.py`) in the order in which it happens.

    1  samples.jsonl   the model answers user prompts turn by turn, with an instruction in every turn
    2  sft.jsonl       these dialogues in training form: the instruction in the first turn, the last answer to be learnt
                       (one that was cut, without a terminator)
    3  before.jsonl    unseen prompts with the instruction in the first turn only, answered by the model as it is
    4  sft/, model/    fine-tuning on sft.jsonl: a run like any other of `dpo-jax sft`; its model
    5  after.jsonl     as 3, with the same random numbers, by the fine-tuned model
    6  metrics.jsonl, consistency.png, report.html: which share of the answers keeps to its instruction, turn by turn

A stage whose file is there is not done again; texts go on in the middle of a file, training at its last checkpoint.
"""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.align import gatt as ghost
from dpo_jax.commands import sft
from dpo_jax.commands.config_keys import with_config_keys
from dpo_jax.complete.gatt_dialogues import Outline, Plan, Writer, check_room, check_template, make_plan, seed_of
from dpo_jax.complete.responses import terminators
from dpo_jax.config import GattRun, SFTRun
from dpo_jax.data.rows.dialogues import parse_dialogue
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.encode_dialogue import DialogueEncoder
from dpo_jax.errors import InputError
from dpo_jax.files.day import with_day
from dpo_jax.files.folder import RunFolder, as_json, write_atomically
from dpo_jax.files.jsonl import Row, read_lines, write_lines
from dpo_jax.files.log import say, show_log
from dpo_jax.mesh import make_mesh
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.report import gatt as gatt_report
from dpo_jax.weights.fingerprint import fingerprint
from dpo_jax.weights.pretrained import load_pretrained, read_architecture
from dpo_jax.weights.tokenizer import check_vocabulary, load_tokenizer

INPUTS = "inputs.json"
"""What the dialogues of a run follow from; written when its folder is claimed."""


@with_config_keys
def gatt(run: GattRun) -> Path:
    """The `gatt` command; returns the run folder. See the module for the stages.

    Raises `InputError` for bad input; all that can be checked before the first token is checked before.
    """
    show_log()
    out = Path(run.out)
    folder = RunFolder(out, "gatt", as_json(run))
    status = folder.open()
    if status == "finished":
        say(f"{out}: this run is finished; for another choose another --out")
        return out
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    architecture = read_architecture(run.model)
    tokenizer = load_tokenizer(run.model)
    check_vocabulary(tokenizer, architecture)
    run = with_day(run, folder, tokenizer)
    encoder = ConversationEncoder(tokenizer, run.data.template, run.data.date)
    check_template(encoder)
    plan = make_plan(run)
    _check_lengths(run, plan, encoder, architecture)
    if run.gatt.train and not run.gatt.evaluate_only and status == "new":
        sft.begin(training_run(run))  # refuses now what it would refuse after sampling
    _claim(run, folder, plan)

    options = run.gatt
    writers = _Writers(run, tokenizer, encoder, mesh)
    before = out / "before.jsonl"
    if not options.evaluate_only:
        say(f"[1/5] {len(plan.training)} dialogues of {options.turns} turns, the instruction in every turn")
        samples = writers.write(run.model, out / "samples.jsonl", "samples", plan.training, "training", "every")
        rows, left_out = training_rows(
            run, plan.training, samples, DialogueEncoder(tokenizer, run.data.template, "last", run.data.date)
        )
        say(f"[2/5] {len(rows)} dialogues to learn from" + "".join(f"; left out: {n} x {r}" for r, n in left_out))
        if not rows:
            raise InputError(f"{out / 'samples.jsonl'}: no answer can be learnt: {_words(left_out)}")
        if not (out / "sft.jsonl").exists():
            write_lines(out / "sft.jsonl", rows)
        if not options.train:
            folder.finish()
            say(f"{out}: finished; the dialogues are in {out / 'sft.jsonl'} (train with --data.train_on last)")
            return out
        say(f"[3/5] {len(plan.evaluation)} unseen dialogues of {options.evaluated_turns} turns before training")
    writers.write(run.model, before, "before", plan.evaluation, "evaluation", "first")
    writers.release()
    if not options.evaluate_only:
        say("[4/5] fine-tuning on the dialogues")
        _fine_tune(run, out)
        say("[5/5] the unseen dialogues after training")
        writers.write(str(out), out / "after.jsonl", "after", plan.evaluation, "evaluation", "first")
        writers.release()
    gatt_report.write(run, out)
    folder.finish()
    say(f"{out}: finished; the report is in {out / 'report.html'}")
    return out


# ---------------------------------------------------------------- before the first token


def _check_lengths(run: GattRun, plan: Plan, encoder: ConversationEncoder, architecture: LlamaConfig) -> None:
    """Raise `InputError` where a dialogue may grow beyond the model's context, or beyond what is trained of it."""
    new, context = run.sample.max_new_tokens, architecture.max_position
    if architecture.sliding_window is not None:
        context = min(context, architecture.sliding_window)
    of_model = "the model's context"
    if plan.training:
        room, limit = context, of_model
        if run.gatt.train and run.data.max_length < context:
            room, limit = run.data.max_length, "--data.max_length"
        check_room(encoder, plan.training, where="every", new=new, room=room, limit=limit)
    if plan.evaluation:
        check_room(encoder, plan.evaluation, where="first", new=new, room=context, limit=of_model)


def _claim(run: GattRun, folder: RunFolder, plan: Plan) -> None:
    """Make the folder this run's; refuse to go on where the files behind its options have changed."""
    inputs = folder.path / INPUTS
    now = {"plan": plan.fingerprint}
    if inputs.exists():
        if json.loads(inputs.read_text()) != now:
            raise InputError(
                f"{folder.path}: the prompts or instructions have changed since this run began; restore the files, or"
                " choose another --out"
            )
        return
    folder.claim(as_json(run))
    write_atomically(inputs, json.dumps(now) + "\n")


# ---------------------------------------------------------------- writing dialogues


class _Writers:
    """Lets models write; the one at work stays loaded until another is asked for."""

    def __init__(self, run: GattRun, tokenizer: PreTrainedTokenizerBase, encoder: ConversationEncoder, mesh: Mesh):
        self._run, self._tokenizer, self._encoder, self._mesh = run, tokenizer, encoder, mesh
        self._loaded: Writer | None = None

    def write(
        self, source: str, path: Path, label: str, outlines: Sequence[Outline], purpose: str, where: ghost.Where
    ) -> list[Row]:
        """`Writer.write` by the model `source`, which is loaded only where there is something left to write."""
        if path.exists():
            say(f"{label}: from {path}")
            return read_lines(path)
        self._loaded = self._loaded or self._load(source)
        return self._loaded.write(path, label, outlines, purpose=purpose, where=where)

    def release(self) -> None:
        """Make room for another model."""
        self._loaded = None

    def _load(self, source: str) -> Writer:
        run = self._run
        model, variables = load_pretrained(source, mesh=self._mesh, dtype=run.train.dtype)
        return Writer(
            model,
            variables,
            fingerprint(variables),
            self._tokenizer,
            self._encoder,
            terminators(model, self._encoder, run.sample),
            self._mesh,
            run.sample_batch_size,
            run.train.seed,
        )


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


def _words(left_out: Sequence[tuple[str, int]]) -> str:
    return "; ".join(f"{count} x {reason}" for reason, count in left_out)


def training_run(run: GattRun) -> SFTRun:
    """The SFT run inside: what `dpo-jax sft` would be told."""
    out = Path(run.out)
    return SFTRun(
        model=run.model,
        out=str(out / "sft"),
        lora=run.lora,
        optimizer=run.optimizer,
        data=dataclasses.replace(
            run.data, files=str(out / "sft.jsonl"), train_on=ghost.TRAIN_ON, limit=None, columns=None
        ),
        train=run.train,
        checkpoint=run.checkpoint,
        mesh=run.mesh,
        energy=run.energy,
        sft=run.sft,
    )


def _fine_tune(run: GattRun, out: Path) -> None:
    """Train, and bring the model to OUT/model."""
    if (out / "model").is_dir():
        say(f"fine-tuning: done, the model is in {out / 'model'}")
        return
    training = training_run(run)
    folder = sft.train(training)
    for name in ("adapter", "model"):  # the model last: where it is, all is done
        if (folder / name).is_dir():
            (folder / name).rename(out / name)
