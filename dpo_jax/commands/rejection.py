"""`dpo-jax rejection`: from a model, prompts and a reward to a better model, by the best of K of its own responses.

The stages of a run, each a file or folder. A stage whose file is there is not done again; sampling and judging go on in
the middle of a file, fine-tuning from its newest checkpoint.

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

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.commands import sft
from dpo_jax.commands.config_keys import with_config_keys
from dpo_jax.complete.k_responses import Sampler, key_of, select, write_once
from dpo_jax.config import RejectionRun, SFTRun
from dpo_jax.data.sets.prompts import PromptDataset, load_prompts
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.templates import writes_date
from dpo_jax.errors import InputError
from dpo_jax.files.folder import as_json, write_atomically
from dpo_jax.files.jsonl import Row, read_lines, write_lines
from dpo_jax.judge import pool as best_responses
from dpo_jax.judge.scores import Judges, write_scores
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.model.variables import shardings
from dpo_jax.processes import distributed
from dpo_jax.report import rejection as rejection_report
from dpo_jax.train.session import Training
from dpo_jax.weights.folder import new_folder
from dpo_jax.weights.pretrained import has_adapters, read_architecture
from dpo_jax.weights.source import resolve, to_train
from dpo_jax.weights.tokenizer import check_vocabulary, load_tokenizer

_SAMPLES, _HELDOUT = 1, 2
"""They set the draws of the iterations and of the held-out prompts apart, which one seed decides."""


@with_config_keys
def train(config: RejectionRun) -> Path:
    """Run rejection sampling; return the run folder. An unfinished run in `config.out` is gone on with.

    Raises `InputError` for bad input; everything that can be checked before the weights are read is checked before.
    """
    training = Training.begin(config, "rejection")
    if training is None:
        return Path(config.out)
    run = _Run(config, training)
    pool = run.earlier_pool()
    model, iterations = config.trained, config.rejection.iterations
    for t in range(1, iterations + 1):
        writer = run.sampler(model)
        run.answer_heldout(writer, t - 1)
        if config.rejection.student is not None:
            writer.close()
            writer = run.sampler(config.model)
        samples = run.sample(writer, t)
        writer.close()  # the judge and the optimizer need the room
        run.judge_heldout(t - 1)
        pool = run.choose(samples, pool, t)
        run.fine_tune(model, t)
        model = str(run.folder(t) / "sft")
    writer = run.sampler(model)
    run.answer_heldout(writer, iterations)
    writer.close()
    run.judge_heldout(iterations)
    return run.finish(pool)


class _Run:
    """One run at work: its checked inputs, and its stages.

    Attributes:
      config, training: the options, and what is around them.
      out: the run folder.
      data, heldout: the prompts, and the held-out ones (None: there are none).
      judges: the reward.
      rows: of metrics.jsonl so far.
    """

    def __init__(self, config: RejectionRun, training: Training[RejectionRun]):
        """Check all input, and claim the folder. Raises `InputError`."""
        architecture, tokenizer = training.read_model_shape()
        self.config, self.training, self.out = (config := training.config), training, training.out
        architectures = [_language_model(config.model, architecture)]
        if config.rejection.student is not None:
            architectures.append(_read_student(config, training))
        if config.lora.rank and has_adapters(resolve(to_train(config.trained))):
            raise InputError(
                f"{config.trained}: has adapters already; leave --lora.rank out, or merge them with dpo-jax convert"
            )
        encoder = ConversationEncoder(tokenizer, config.data.template, config.data.date)
        self.tokens = encoder.text_ids
        self.data = self._load(config.data.files, encoder, architectures)
        self.heldout = None
        if config.eval_data is not None:
            self.heldout = self._load(config.eval_data, encoder, architectures)
            own = [prompt.plain for prompt in self.data.prompts]
            _check_apart(self.heldout, config.data.files, own, self.data.row_numbers.tolist())
        self.judges = Judges(config, mesh=training.mesh, batch_size=training.eval_batch_size)
        for prompts in (self.data, self.heldout):
            if prompts is not None:
                self.judges.try_out(prompts)
        before = config.rejection.pool_from
        self._before = [] if before is None else best_responses.read_pool(before)
        if self.heldout is not None:
            earlier = [row["prompt"] for row in self._before]
            _check_apart(self.heldout, str(before), earlier, range(1, len(earlier) + 1))
        self._first = 1 + max((row["iteration"] for row in self._before), default=0)
        self._check_inputs(None if before is None else best_responses.hash_of(before))
        training.folder.claim(as_json(config))
        if training.main:
            write_atomically(self.out / "inputs.json", json.dumps(self._inputs, indent=2) + "\n")
        self.rows: list[Row] = []

    def _load(self, source: str, encoder: ConversationEncoder, architectures: Sequence[LlamaConfig]) -> PromptDataset:
        """The different prompts of a file that leave room for an answer."""
        config, say = self.config, self.training.say
        data = load_prompts(
            source,
            encoder,
            config.data,
            longest=2**31 - 1,
            vocab_size=architectures[0].vocab_size,
            on_bad_rows=config.on_bad_rows,
            tagged=config.safety_reward is not None,
        )
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
        data = select(data, kept)
        say(data.summary())
        return data

    def _check_inputs(self, pool: str | None) -> None:
        """Refuse to go on with files that have changed since."""
        self._inputs = {
            "--data": self.data.fingerprint,
            "--eval_data": None if self.heldout is None else self.heldout.fingerprint,
            "--reward": self.judges.described,
            "--rejection.pool_from": pool,
        }
        path = self.out / "inputs.json"
        if not path.exists():
            return
        try:
            before = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: not readable; choose another --out") from error
        for name, value in self._inputs.items():
            if before.get(name) != value:
                raise InputError(
                    f"{self.out}: what {name} names has changed since this run began; restore it, or choose another"
                    " --out"
                )

    # ---------------------------------------------------------------- stages

    def folder(self, iteration: int) -> Path:
        """Where the files of an iteration lie; 0 is what comes before the first."""
        return self.out / f"iteration-{iteration}"

    def sampler(self, model: str) -> Sampler:
        """A model that writes."""
        return Sampler(model, self.config, self.training.mesh)

    def earlier_pool(self) -> list[Row]:
        """The pool to begin with; empty where there is none."""
        if not self._before:
            return []
        source = str(self.config.rejection.pool_from)

        def settings() -> dict[str, Any]:
            return {"reward": self.judges.identities()}

        path = self.folder(0) / "pool.jsonl"
        rows = write_once(
            path,
            settings,
            lambda file: file.append(best_responses.judged(self._before, self.judges, source, self.data.prompts)),
        )
        self.judges.close()
        self.training.say(f"{source}: the best responses to {len(rows)} prompts, judged by {self.config.reward}")
        return rows

    def answer_heldout(self, sampler: Sampler, iteration: int) -> None:
        """The held-out prompts, with the same random numbers after each iteration."""
        if self.heldout is None:
            return
        chosen = self.config.rejection
        temperature = chosen.evaluated_at
        sampler.write(
            self.folder(iteration) / "heldout.jsonl",
            self.heldout,
            label=f"held out, after iteration {iteration}",
            temperatures=(temperature,),
            samples=chosen.resolved("eval_samples"),
            seed=self._seed(_HELDOUT, 0),
        )

    def judge_heldout(self, iteration: int) -> None:
        """Their scores; with them the figures of the iteration are complete."""
        row = self.rows.pop() if iteration else {"step": 0}
        if self.heldout is not None:
            folder = self.folder(iteration)
            samples = read_lines(folder / "heldout.jsonl")
            label = "scores of held-out responses"
            scores = write_scores(folder / "heldout_scores.jsonl", self.heldout, samples, self.judges, label=label)
            self.judges.close()
            start = read_lines(self.folder(0) / "heldout_scores.jsonl")
            row |= rejection_report.heldout(samples, scores, start, self.tokens, seed=self.config.train.seed)
            low, high = row["eval_rewards/low"], row["eval_rewards/high"]
            self.training.say(
                f"after iteration {iteration}: mean reward {row['eval_rewards/mean']:.4g} on {len(self.heldout)}"
                f" held-out prompts (95 % interval {low:.4g} to {high:.4g})"
            )
        if len(row) > 1:
            self.rows.append(row)
        if self.training.main:
            write_lines(self.out / "metrics.jsonl", self.rows)

    def sample(self, sampler: Sampler, iteration: int) -> list[Row]:
        """K responses to every prompt at each temperature."""
        chosen = self.config.rejection
        return sampler.write(
            self.folder(iteration) / "samples.jsonl",
            self.data,
            label=f"samples of iteration {iteration}",
            temperatures=chosen.temperatures,
            samples=chosen.samples,
            seed=self._seed(_SAMPLES, iteration),
        )

    def choose(self, samples: Sequence[Row], earlier: Sequence[Row], iteration: int) -> list[Row]:
        """Judge the samples; returns the pool, and writes it, what is learnt of it, and the curves."""
        config, folder, say = self.config, self.folder(iteration), self.training.say
        label = f"scores of iteration {iteration}"
        scores = write_scores(folder / "scores.jsonl", self.data, samples, self.judges, label=label)
        self.judges.close()
        number = self._first + iteration - 1  # an earlier pool has counted already
        found, told = best_responses.bests(self.data, samples, scores, iteration=number, reward=config.reward)
        for line in told:
            say(f"iteration {iteration}: {line}")
        pool = best_responses.merged(earlier if config.rejection.pool == "all" else [], found)
        learnt = best_responses.learnt(pool, config.rejection)
        figures = rejection_report.sampled(samples, scores, pool, learnt, self.tokens, iteration=number)
        self.rows.append({"step": iteration, **figures})
        say(
            f"iteration {iteration}: mean reward {figures['rewards/mean']:.4g} of {len(samples)} samples,"
            f" {figures['rewards/best']:.4g} of the best ones; {len(learnt)} of {len(pool)} in the pool are learnt,"
            f" of mean reward {figures['rewards/learnt']:.4g}"
        )
        if self.training.main:
            curves = rejection_report.curves(scores)
            write_atomically(folder / "curves.json", json.dumps(curves, indent=1) + "\n")
            write_lines(folder / "pool.jsonl", pool)
            write_lines(folder / "sft.jsonl", learnt)
        distributed.barrier(f"chosen {iteration}")
        return pool

    def fine_tune(self, model: str, iteration: int) -> None:
        """`dpo-jax sft` on what is learnt."""
        config, out = self.config, self.folder(iteration) / "sft"
        if not _finished(out):
            own = {f.name for f in dataclasses.fields(config)}
            shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(SFTRun) if f.name in own}
            # Our own rows: one whose text happens to spell a control token is left out, not refused.
            shared |= {"eval_data": None, "on_bad_rows": "skip"}
            date = config.data.date if writes_date(load_tokenizer(config.trained), config.data.template) else None
            files = str(self.folder(iteration) / "sft.jsonl")
            data = dataclasses.replace(config.data, files=files, limit=None, columns=None, date=date)
            sft.train(SFTRun(**(shared | {"model": model, "out": str(out), "data": data})))

    def finish(self, pool: Sequence[Row]) -> Path:
        """The last model, the pool, the report; and the run is finished."""
        config, iterations = self.config, range(1, self.config.rejection.iterations + 1)
        summary = f"{config.model}, {config.rejection.samples} samples a prompt at each temperature, judged by"
        summary += f" {config.reward} on {config.data.files}."
        told = rejection_report.verdict(self.rows, 0 if self.heldout is None else len(self.heldout))
        if self.training.main:
            last = self.folder(iterations[-1]) / "sft"
            for name in ("adapter", "model"):
                if (last / name).is_dir():
                    with new_folder(self.out / name) as folder:
                        for file in (last / name).iterdir():
                            shutil.copy2(file, folder / file.name)
            write_lines(self.out / "pool.jsonl", pool)
            found = [json.loads((self.folder(t) / "curves.json").read_text()) for t in iterations]
            ends = [] if self.heldout is None else [0, iterations[-1]]
            texts = [read_lines(self.folder(t) / "heldout.jsonl") for t in ends]
            rejection_report.write(self.out, f"{summary} {told}", self.rows, found, pool, texts, as_json(config))
        distributed.barrier("run finished")
        self.training.folder.finish()
        self.training.say(told)
        self.training.say(
            f"{self.out}: finished; the model is in {self.out / 'model'}, the report in {self.out / 'report.html'}"
        )
        return self.out

    def _seed(self, use: int, iteration: int) -> int:
        return int(np.random.SeedSequence([self.config.train.seed, use, iteration]).generate_state(1)[0])


# ---------------------------------------------------------------- checks


def _language_model(source: str, architecture: LlamaConfig) -> LlamaConfig:
    if architecture.num_labels:
        raise InputError(f"{source}: is a reward model; a language model writes the responses")
    return architecture


def _read_student(config: RejectionRun, training: Training[RejectionRun]) -> LlamaConfig:
    """The student's architecture, checked as `Training.read_model_shape` checks that of `--model`."""
    architecture = _language_model(config.trained, read_architecture(config.trained))
    shardings(Llama(architecture, lora=config.lora), training.mesh)
    check_vocabulary(load_tokenizer(config.trained), architecture)
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


def _finished(folder: Path) -> bool:
    """Whether the fine-tuning in `folder` has come to its end, in every process."""
    marker = folder / "run.json"
    return distributed.flag_from_main(marker.exists() and bool(json.loads(marker.read_text())["finished"]))
