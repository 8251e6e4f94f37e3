"""`dpo-jax rejection`: from a model, prompts and a reward to a better model, by the best of K of its own responses.

The stages of a run (`files/stages.py`), each a file or folder. A stage that is done is not done again; sampling and
judging go on in the middle of a file, fine-tuning from its newest checkpoint.

    iteration-0/pool.jsonl       --rejection.pool_from, judged by this run's reward
    iteration-0/heldout.jsonl    the held-out prompts, answered by the model to be trained; heldout_scores.jsonl
    iteration-1/samples.jsonl    K responses to every prompt at each temperature
    iteration-1/scores.jsonl     the reward of each
    iteration-1/curves.json      the reward against K
    iteration-1/pool.jsonl       the best response to each prompt so far
    iteration-1/sft.jsonl        those of them that are learnt
    iteration-1/sft/             `dpo-jax sft` on them: a run like any other
    iteration-1/heldout.jsonl    the held-out prompts, answered by the new model; heldout_scores.jsonl
    iteration-2/ ...
    model/, pool.jsonl, metrics.jsonl, report.html, figures/*.png
"""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.commands import sft
from dpo_jax.complete.writing.k_responses import key_of, write_responses
from dpo_jax.complete.writing.writer import Writer, open_writer
from dpo_jax.config import RejectionRun, sft_inside
from dpo_jax.data.sets.prompts import PromptDataset, load_prompts
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.templates import RAW, writes_date
from dpo_jax.errors import InputError
from dpo_jax.files.folder import as_json, write_json
from dpo_jax.files.jsonl import Row, read_lines, write_lines, write_once
from dpo_jax.files.log import read_metrics
from dpo_jax.files.stages import Figures, Stage, Stages, last_figures
from dpo_jax.judge.rewards import pool as best_responses
from dpo_jax.judge.rewards.scores import Judges, write_scores
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.model.quantised import kind_of
from dpo_jax.model.variables import shardings
from dpo_jax.report import rejection as rejection_report
from dpo_jax.train.row_data import read_alike
from dpo_jax.train.session import Training
from dpo_jax.weights.integrity.folder import new_folder, write_beside
from dpo_jax.weights.opened import open_checkpoint
from dpo_jax.weights.tokenizer import check_vocabulary, load_tokenizer

_SAMPLES, _HELDOUT = 1, 2
"""They set the draws of the iterations and of the held-out prompts apart, which one seed decides."""


def train(config: RejectionRun) -> Path:
    """Run rejection sampling; return the run folder. Resumed and refused as every training (`train/session.py`)."""
    training = Training.begin(config, "rejection")
    if training is None:
        return Path(config.out)
    run = _Run(config, training)
    stages = Stages(training.folder)
    stages.perform(run.stages(), run.config, run.inputs)
    told = run.report()
    stages.finish()
    out = training.out
    training.say(told)
    training.say(f"{out}: finished; the model is in {out / 'model'}, the report in {out / 'report.html'}")
    training.publish()
    return out


class _Run:
    """One run at work: its checked inputs, and its stages.

    Attributes:
      config, training: the options, and what is around them.
      out: the run folder.
      data, heldout: the prompts, and the held-out ones (None: there are none).
      judges: the reward.
      inputs: fingerprints of all that the run begins with.
    """

    def __init__(self, config: RejectionRun, training: Training[RejectionRun]):
        """Check all input. Raises `InputError`."""
        architecture, tokenizer = training.read_model_shape()
        self.config, self.training, self.out = (config := training.config), training, training.out
        architectures = [_language_model(config.model, architecture)]
        if config.rejection.student is not None:
            architectures.append(_read_student(config, training))
        if config.lora.rank and open_checkpoint(config.trained, merged=True).has_adapters:
            raise InputError(
                f"{config.trained}: has adapters already; leave --lora.rank out, or merge them with dpo-jax convert"
            )
        encoder = ConversationEncoder.of(tokenizer, config.data)
        self.tokens = encoder.text_ids
        self.data = self._load(config.data.files, encoder, architectures)
        self.heldout = None
        if config.eval_data is not None:
            self.heldout = self._load(config.eval_data, encoder, architectures)
            own = [prompt.plain for prompt in self.data.prompts]
            _check_apart(self.heldout, config.data.files, own, self.data.row_numbers.tolist())
        self.judges = Judges(config, mesh=training.mesh, batch_size=training.eval_batch_size)
        self.judges.try_out(self.data, self.heldout)
        before = config.rejection.pool_from
        self._before = [] if before is None else best_responses.read_pool(before)
        if self.heldout is not None:
            earlier = [row["prompt"] for row in self._before]
            _check_apart(self.heldout, str(before), earlier, range(1, len(earlier) + 1))
        self._first = 1 + max((row["iteration"] for row in self._before), default=0)
        self.inputs = {
            "--data": self.data.fingerprint,
            "--eval_data": None if self.heldout is None else self.heldout.fingerprint,
            "--reward": self.judges.described,
            "--rejection.pool_from": None if before is None else best_responses.hash_of(before),
        }
        self._writer: tuple[str, Writer] | None = None

    def _load(self, source: str, encoder: ConversationEncoder, architectures: Sequence[LlamaConfig]) -> PromptDataset:
        """The different prompts of a file that leave room for an answer."""
        config, say = self.config, self.training.say
        read = partial(
            load_prompts,
            encoder=encoder,
            config=config.data,
            longest=2**31 - 1,
            vocab_size=architectures[0].vocab_size,
            on_bad_rows=config.on_bad_rows,
            tagged=config.safety_reward is not None,
        )
        data = read_alike(source, read)
        firsts = {key_of(prompt.plain): i for i, prompt in reversed(list(enumerate(data.prompts)))}
        different = sorted(firsts.values())
        if len(different) < len(data):
            say(f"{source}: {len(data) - len(different)} prompts occur a second time; each counts once")
        room = min(config.longest_prompt, *(a.max_position - config.sample.max_new_tokens for a in architectures))
        kept = [i for i in different if data.ids.lengths[i] <= room]
        if not kept:
            raise InputError(
                f"{source}: no prompt has at most {room} tokens, which is what --data.max_length, the model's context"
                f" and --sample.max_new_tokens {config.sample.max_new_tokens} leave; raise or lower them"
            )
        if len(kept) < len(different):
            say(
                f"{source}: left out {len(different) - len(kept)} of {len(different)} prompts: more than {room} tokens,"
                " which leaves no room for a response"
            )
        data = data.taken(kept)
        say(data.summary())
        return data

    # ---------------------------------------------------------------- stages

    def folder(self, iteration: int) -> Path:
        """Where the files of an iteration lie; 0 is what comes before the first."""
        return self.out / f"iteration-{iteration}"

    def stages(self) -> list[Stage]:
        """All of them, in order."""
        config, stages = self.config, list[Stage]()
        if self._before:
            source = str(config.rejection.pool_from)
            stages.append(Stage("the earlier pool", (source,), self.folder(0) / "pool.jsonl", self._judge_earlier))
        model, last = config.trained, config.rejection.iterations
        for t in range(last + 1):
            folder, after = self.folder(t), self.folder(t + 1)
            answers, samples, learnt = folder / "heldout.jsonl", after / "samples.jsonl", after / "sft.jsonl"
            if self.heldout is not None:
                work = partial(self._answer_heldout, model, t)
                stages.append(Stage(f"held-out prompts after iteration {t}", (model,), answers, work))
            if t < last:
                writes = config.model if config.rejection.student is not None else model
                work = partial(self._sample, writes, t + 1)
                stages.append(Stage(f"samples of iteration {t + 1}", (writes,), samples, work))
            if self.heldout is not None:
                scores, work = folder / "heldout_scores.jsonl", partial(self._judge_heldout, t)
                stages.append(Stage(f"their rewards after iteration {t}", (answers,), scores, work))
            if t < last:
                pool = (folder / "pool.jsonl",) if t or self._before else ()
                work = partial(self._choose, t + 1)
                stages.append(Stage(f"the best of iteration {t + 1}", (samples, *pool), learnt, work))
                work = partial(self._fine_tune, model, t + 1)
                stages.append(Stage(f"fine-tuning {t + 1}", (model, learnt), after / "sft", work))
                model = str(after / "sft")
        return stages

    def _open(self, model: str) -> Writer:
        """The model that writes; the one before makes room for it."""
        if self._writer is None or self._writer[0] != model:
            self._writer = None
            config, train, data = self.config, self.config.train, self.config.data
            kept = train.settled.frozen_dtype
            writer = open_writer(  # with its own tokenizer: a student's may differ from the teacher's
                open_checkpoint(model),
                config.sample,
                mesh=self.training.mesh,
                batch_size=config.sample_batch_size,
                template=data.template,
                date=data.date,
                raw=data.template == RAW,
                dtype=kept if kind_of(kept) is None else train.dtype,  # it writes: whole
                compute_dtype=train.dtype,
                attention=train.attention,
            )
            self._writer = model, writer
        return self._writer[1]

    def _judge_earlier(self) -> Figures:
        source = str(self.config.rejection.pool_from)
        rows = write_once(
            self.folder(0) / "pool.jsonl",
            lambda: {"reward": self.judges.identities()},
            lambda file: file.append(best_responses.judged(self._before, self.judges, source, self.data.prompts)),
        )
        self.judges.close()
        return {"prompts": len(rows), "mean reward": float(np.mean([row["score"] for row in rows]))}

    def _answer_heldout(self, model: str, iteration: int) -> Figures:
        """The held-out prompts, with the same random numbers after each iteration."""
        assert self.heldout is not None
        chosen, path = self.config.rejection, self.folder(iteration) / "heldout.jsonl"
        told = {"label": f"held out, after iteration {iteration}", "samples": chosen.settled.eval_samples}
        heat, seed = (chosen.evaluated_at,), self._seed(_HELDOUT, 0)
        rows = write_responses(self._open(model), path, self.heldout, temperatures=heat, seed=seed, **told)
        return {"responses": len(rows)}

    def _judge_heldout(self, iteration: int) -> Figures:
        """Their scores; with them the figures of the iteration are complete."""
        assert self.heldout is not None
        self._writer = None  # the judge needs the room
        folder = self.folder(iteration)
        samples = read_lines(folder / "heldout.jsonl")
        label = "scores of held-out responses"
        scores = write_scores(folder / "heldout_scores.jsonl", self.heldout, samples, self.judges, label=label)
        self.judges.close()
        start = read_lines(self.folder(0) / "heldout_scores.jsonl")
        found = rejection_report.heldout(samples, scores, start, self.tokens, seed=self.config.train.seed)
        self._tell(iteration, found)
        return {name: found[f"eval_rewards/{name}"] for name in ("mean", "low", "high")}

    def _tell(self, iteration: int, figures: Row) -> None:
        """Add figures to the row of an iteration in metrics.jsonl."""
        rows = {row["step"]: row for row in self.rows()}
        rows[iteration] = {"step": iteration, **rows.get(iteration, {}), **figures}
        if self.training.main:
            write_lines(self.out / "metrics.jsonl", [rows[step] for step in sorted(rows)])

    def rows(self) -> list[Row]:
        """Of metrics.jsonl, so far."""
        return read_metrics(self.out / "metrics.jsonl")

    def _sample(self, model: str, iteration: int) -> Figures:
        """K responses to every prompt at each temperature."""
        chosen, path = self.config.rejection, self.folder(iteration) / "samples.jsonl"
        told = {"label": f"samples of iteration {iteration}", "samples": chosen.samples}
        heat, seed = chosen.temperatures, self._seed(_SAMPLES, iteration)
        rows = write_responses(self._open(model), path, self.data, temperatures=heat, seed=seed, **told)
        return {"responses": len(rows)}

    def _choose(self, iteration: int) -> Figures:
        """Judge the samples; write the pool, what is learnt of it, and the curves."""
        self._writer = None  # the judge and the optimizer need the room
        config, folder, before = self.config, self.folder(iteration), self.folder(iteration - 1) / "pool.jsonl"
        samples, label = read_lines(folder / "samples.jsonl"), f"scores of iteration {iteration}"
        scores = write_scores(folder / "scores.jsonl", self.data, samples, self.judges, label=label)
        self.judges.close()
        number = self._first + iteration - 1  # an earlier pool has counted already
        found, told = best_responses.bests(self.data, samples, scores, iteration=number, reward=config.told_reward)
        for line in told:
            self.training.say(f"iteration {iteration}: {line}")
        earlier = read_lines(before) if config.rejection.pool == "all" and before.exists() else []
        pool = best_responses.merged(earlier, found)
        learnt = best_responses.learnt(pool, config.rejection)
        figures = rejection_report.sampled(samples, scores, pool, learnt, self.tokens, iteration=number)
        self._tell(iteration, figures)
        if self.training.main:
            curves = rejection_report.curves(scores)
            write_json(folder / "curves.json", curves, indent=1)
            write_lines(folder / "pool.jsonl", pool)
            write_lines(folder / "sft.jsonl", learnt)
        rewards = {f"reward {name}": figures[f"rewards/{name}"] for name in ("mean", "best", "learnt")}
        return {**rewards, "in the pool": len(pool), "learnt": len(learnt)}

    def _fine_tune(self, model: str, iteration: int) -> Figures:
        """`dpo-jax sft` on what is learnt."""
        config, folder = self.config, self.folder(iteration)
        date = config.data.date if writes_date(load_tokenizer(config.trained), config.data.template) else None
        # Our own rows: one whose text happens to spell a control token is left out, not refused.
        sft.train(sft_inside(config, folder, model=model, data={"date": date}, on_bad_rows="skip"))
        return last_figures(folder / "sft", {"loss": "loss"})

    def report(self) -> str:
        """The last model, the pool, the report; returns the outcome in a sentence or two."""
        config, iterations, rows = self.config, range(1, self.config.rejection.iterations + 1), self.rows()
        told = rejection_report.verdict(rows, 0 if self.heldout is None else len(self.heldout))
        if not self.training.main:
            return told
        summary = f"{config.model}, {config.rejection.samples} samples a prompt at each temperature, judged by"
        summary += f" {config.told_reward} on {config.data.files}. {told}"
        last = self.folder(iterations[-1])
        trained = read_metrics(last / "sft" / "metrics.jsonl")
        for name in ("adapter", "model"):
            if (last / "sft" / name).is_dir():
                with new_folder(self.out / name) as folder:
                    for file in (last / "sft" / name).iterdir():
                        shutil.copy2(file, folder / file.name)
                    write_beside(folder, self.training.card(trained, adapter=name == "adapter"))
        pool = read_lines(last / "pool.jsonl")
        write_lines(self.out / "pool.jsonl", pool)
        found = [json.loads((self.folder(t) / "curves.json").read_text()) for t in iterations]
        ends = [] if self.heldout is None else [0, iterations[-1]]
        texts = [read_lines(self.folder(t) / "heldout.jsonl") for t in ends]
        rejection_report.write(self.out, summary, rows, found, pool, texts, as_json(config))
        return told

    def _seed(self, use: int, iteration: int) -> int:
        return int(np.random.SeedSequence([self.config.train.seed, use, iteration]).generate_state(1)[0])


# ---------------------------------------------------------------- checks


def _language_model(source: str, architecture: LlamaConfig) -> LlamaConfig:
    if architecture.num_labels:
        raise InputError(f"{source}: is a reward model; a language model writes the responses")
    return architecture


def _read_student(config: RejectionRun, training: Training[RejectionRun]) -> LlamaConfig:
    """The student's architecture, checked as `Training.read_model_shape` checks that of `--model`."""
    trained = open_checkpoint(config.trained)
    architecture = _language_model(config.trained, trained.architecture)
    kept = config.train.settled.frozen_dtype if config.lora.rank else "float32"
    shardings(Llama(architecture, lora=config.lora), training.mesh, kept)
    check_vocabulary(trained.tokenizer(), architecture)
    return architecture


def _check_apart(heldout: PromptDataset, source: str, prompts: Sequence[Any], numbers: Sequence[int]) -> None:
    """Refuse held-out prompts that are trained on: `prompts`, those of the rows `numbers` of `source`."""
    rows = {key_of(prompt): number for prompt, number in zip(prompts, numbers, strict=True)}
    both = [
        (rows[key], int(n))
        for prompt, n in zip(heldout.prompts, heldout.row_numbers, strict=True)
        if (key := key_of(prompt.plain)) in rows
    ]
    if both:
        raise InputError(
            f"{heldout.source}: {len(both)} of its prompts stand in {source} too (first: row {both[0][1]}, and"
            f" there row {both[0][0]}); hold out other prompts"
        )
