"""What every training command does around its algorithm: join processes, claim the run folder, resume, fit, export.

A run that is unfinished in `--out` is resumed exactly, a finished one left alone. Everything that can be checked before
the weights are read is checked before, and raises `InputError`. A command asks for these in the order of a run:

    training = Training.begin(config, "dpo")       # None: this run is finished already
    architecture, tokenizer = training.read_model_shape()
    ...                                            # data, loaders
    resolved = training.resolve(loader.total_steps)
    ...                                            # weights, state
    state = training.fit(state, step, loader, ...) # raises Stopped at a signal, all saved
    training.finish(model, state.variables, tokenizer, title=..., summary=..., sections=...)

(One file, though long: it is the order of a run, and each part rests on what those before it left.)
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import ClassHead, DPORun, Layout, LoraConfig, TrainingRun
from dpo_jax.data.sets.dataset import PreferenceDataset, check_lengths
from dpo_jax.data.sets.loader import PreferenceLoader
from dpo_jax.data.tokens.templates import with_template
from dpo_jax.errors import InputError, Stopped
from dpo_jax.files.day import with_day
from dpo_jax.files.folder import RunFolder, as_json, flatten
from dpo_jax.files.log import MetricLog, Row, read_metrics, say, show_log
from dpo_jax.mesh import batch_parts, copies, make_mesh, own_rows
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.heads import SCORE
from dpo_jax.model.llama import Llama
from dpo_jax.model.quantised import kind_in
from dpo_jax.model.variables import shardings
from dpo_jax.processes import distributed, notice
from dpo_jax.report import html
from dpo_jax.report.samples import fixed_section, training_samples
from dpo_jax.state import TrainState, learning_rate_schedule
from dpo_jax.train import publish
from dpo_jax.train.accounting import Electricity, Meter, cost_lines, cost_section, describe_peak, peak_flops
from dpo_jax.train.loop import Loader, Plan, fit
from dpo_jax.train.row_data import packing_of, preference_loader, summaries
from dpo_jax.train.stopping import best_state
from dpo_jax.weights.integrity import base
from dpo_jax.weights.opened import StoredModel, open_checkpoint
from dpo_jax.weights.orbax.checkpoint import Checkpoints
from dpo_jax.weights.orbax.local import LocalCheckpoints, restore_newest
from dpo_jax.weights.pretrained import load_pretrained, save_pretrained
from dpo_jax.weights.tokenizer import check_vocabulary

Config = TypeVar("Config", bound=TrainingRun)


@dataclass
class Training(Generic[Config]):
    """One training command at work.

    Attributes:
      config: the options; after `resolve` with everything filled in that follows from the data.
      mesh: the devices.
      folder: the run folder.
      main: whether this process writes the files and talks.
      electricity: what the estimate of its energy assumes.
      told_steps: after `fit`, in how many steps the exported weights were trained, in words.
      best: after `fit`, the step of the exported weights, if not the last.
      identity: after `fit`, the fingerprints of what the run was made from.
    """

    config: Config
    mesh: Mesh
    folder: RunFolder
    main: bool
    electricity: Electricity
    told_steps: str = ""
    best: int | None = None
    identity: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def begin(cls, config: Config, command: str) -> "Training[Config] | None":
        """Join the other processes, arrange the devices, open the run folder. None where its run has finished.

        Nothing is written yet. Raises `InputError` for options that do not fit the devices or the folder.
        """
        _check_options(config)
        publish.check(config.log.wandb, config.push_to_hub)
        notice.listen()
        options = as_json(config)
        distributed.initialize(config.distributed, flatten(options))
        show_log()
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.context)
        if (narrow := config.train.crossing_dtype) is not None and copies(mesh) == 1:
            raise InputError(f"--train.crossing_dtype {narrow} has no effect with one copy of the model: --mesh.data 1")
        check_batch(config.train.batch_size, config.train.accumulate, mesh)
        electricity = Electricity.of(list(mesh.devices.flat), config.energy)
        main = distributed.is_main()
        folder = RunFolder(Path(config.out), command, options, writes=main)
        training = cls(config, mesh, folder, main, electricity)
        if training.folder.open() == "finished":
            out = training.out
            training.say(f"{out}: this run is finished (model in {out / 'model'}); to train again choose another --out")
            training.publish()
            return None
        return training

    @property
    def out(self) -> Path:
        """The run folder's path."""
        return self.folder.path

    @property
    def options(self) -> dict[str, Any]:
        """All options, with what was filled in, as JSON has them."""
        return as_json(self.config)

    @cached_property
    def start(self) -> StoredModel:
        """The model that is trained: `--model`, or the merged weights of a run with LoRA."""
        return open_checkpoint(self.config.model, merged=True)

    @property
    def devices(self) -> list[Any]:
        """All devices of the mesh, of every process."""
        return list(self.mesh.devices.flat)

    def say(self, text: str, event: Literal["note", "warning"] = "note") -> None:
        """One line to the person who waits, from the main process only. A warning is said with --quiet, too."""
        if self.main:
            say(text, event)

    # ---------------------------------------------------------------- before the weights

    def read_model_shape(self) -> tuple[LlamaConfig, PreTrainedTokenizerBase]:
        """Architecture and tokenizer of `--model`, checked against each other and the mesh, before its weights.

        From here on `config` has the day that the chat template writes.
        """
        architecture = self.start.architecture
        lora, frozen = self.config.lora, self.config.train.settled.frozen_dtype
        shardings(Llama(architecture, lora=lora), self.mesh, frozen if lora.rank else jnp.float32)
        tokenizer = self.start.tokenizer()
        check_vocabulary(tokenizer, architecture)
        self.config = with_day(self.config, self.folder, tokenizer)
        return architecture, tokenizer

    @property
    def length(self) -> dict[str, Any]:
        """The length as loaders take it: steps or epochs, one epoch where neither is given; once resolved, steps."""
        steps, epochs = self.config.train.steps, self.config.train.epochs
        return {"steps": steps, "epochs": 1.0 if steps is None and epochs is None else epochs}

    def told(self, data: Any, heldout: Any) -> None:
        """Say what was read."""
        if self.main:  # whoever says nothing need not look at the rows for it
            for line in summaries(data, heldout):
                self.say(line)

    def preferences(
        self, data: PreferenceDataset, heldout: PreferenceDataset | None, architecture: LlamaConfig
    ) -> PreferenceLoader:
        """Check and tell what was read, and resolve the run's length by it; the batches of the whole run.

        Raises `InputError` for a row that is longer than the model's context.
        """
        for dataset in (data, heldout):
            if dataset is not None:
                check_lengths(dataset, architecture, self.config.data.max_length)
        self.told(data, heldout)
        rows, batch = len(data), self.config.train.batch_size
        if rows < batch:
            told = f"each step takes {batch} rows (--train.batch_size), and there are {rows}"
            self.say(f"warning: {told}: some count several times in each", "warning")
        loader = self.preference_loader(data)
        self.resolve(loader.total_steps)
        return loader

    def preference_loader(self, data: PreferenceDataset) -> PreferenceLoader:
        """The batches of the whole run on preference groups."""
        return preference_loader(self.config, self.mesh, data, **self.length)

    def evaluation(self, heldout: PreferenceDataset, layout: Layout) -> dict[str, Any]:
        """How the rows that are held out are batched: `batch_size`, `buckets`, `packing`, `own` of `eval_batches`."""
        how, rows = {"accumulate": 1, "pairs": isinstance(self.config, DPORun)}, self.eval_batch_size
        packing = packing_of(layout, self.mesh, heldout.responses_per_prompt, **how)
        own = own_rows(self.mesh, rows)
        return {"batch_size": rows, "buckets": self.config.data.buckets, "packing": packing, "own": own}

    def resolve(self, total: int) -> Config:
        """Fill in what follows from the run's `total` steps, and claim the run folder. The input has been checked."""
        length = {"train": {"steps": total, "epochs": None}}
        length["optimizer"] = {"total_steps": self.config.optimizer.total_steps or total}
        self.config = self.config.filled(**length)
        learning_rate_schedule(self.config.optimizer)  # refuses a warm-up longer than the run
        # The name of the model as given means another one from another folder.
        self.folder.claim(self.options | {"model": self.start.lasting.model})
        return self.config

    # ---------------------------------------------------------------- weights and steps

    def load_model(self, lora: LoraConfig | None = None) -> tuple[Llama, dict[str, Any]]:
        """The model to train, laid out on the mesh: trained weights in float32, frozen ones as the options say.

        Adapters of a folder that learnt on quantised weights go on on these.
        """
        config = self.config
        lora = config.lora if lora is None else lora
        frozen = config.train.settled.frozen_dtype
        if lora.rank and self.start.name != config.model and config.train.frozen_dtype is None and frozen != "float32":
            self.say(
                f"{self.start.name}: kept in float32, since {frozen} would round away most of what that run's adapters"
                " learnt (--train.frozen_dtype decides)"
            )
            frozen = "float32"
        return load_pretrained(
            self.start,
            mesh=self.mesh,
            dtype=frozen if lora.rank else self.start.quantised or "float32",
            lora=lora,
            compute_dtype=jnp.dtype(config.train.dtype),
            remat=config.train.remat,
            attention=config.train.attention,
            seed=config.train.seed,
        )

    @property
    def eval_batch_size(self) -> int:
        """Rows of a batch without gradients: as many as in a training micro-batch, at least one a device."""
        parts = batch_parts(self.mesh)
        return math.ceil(self.config.train.batch_size // self.config.train.accumulate / parts) * parts

    def fit(
        self,
        state: TrainState,
        step: Callable[..., tuple[TrainState, Mapping[str, jax.Array]]],
        loader: Loader,
        *,
        identity: Mapping[str, str],
        evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
        evaluate_first: bool = False,
        flops_of: Callable[[Any], float] | None = None,
        prepare: Callable[[TrainState, Any], tuple[Any, Row]] | None = None,
        sample: Callable[[TrainState], None] | None = None,
    ) -> TrainState:
        """Go on from the newest checkpoint, or begin, and train to the end.

        Args:
          state, loader: of the whole run, at its beginning; the state is donated.
          step, evaluate, prepare, sample: see `loop.fit`.
          identity: what a checkpoint must have been made from for it to be gone on with: name -> fingerprint.
          evaluate_first: also before the first step.
          flops_of: model FLOPs of the step on a batch (`train/flops.py`).

        Returns the last state. Raises `Stopped` where a signal asked to stop; all is saved, and said.
        """
        config, self.identity, total = self.config, dict(identity), self.config.train.steps
        assert total is not None, "resolve() comes first"
        distributed.check_alike(self.identity)
        checkpoints = Checkpoints(
            self.out / "checkpoints",
            keep=config.checkpoint.keep,
            best=config.checkpoint.best,
            identity=dict(identity),
            say=self.say,
        )
        local = self._local_checkpoints(state)
        restored = checkpoints.restore(state) if local is None else restore_newest(state, checkpoints, local)
        start = 0
        if restored is not None:
            state, start = restored.state, restored.step
            loader.set_state(restored.data)
            self.say(f"{self.out}: going on after step {start} of {total}")
        else:
            self.say(loader.summary())
        del restored
        if "adapters" in state.trainable:
            params = state.frozen["params"]
            known = {"fingerprint": base.weights_hash(params), "quantised": kind_in(params)}
            if self.main:
                base.write(self.out, dataclasses.replace(self.start.lasting, **known))
        plan = Plan(
            steps=total,
            steps_per_epoch=loader.steps_per_epoch,
            checkpoint_every=config.checkpoint.every,
            local_every=config.checkpoint.settled.local_every,
            eval_every=config.train.eval_every,
            eval_first=evaluate_first,
            best=config.checkpoint.best,
            stop_after=config.train.stop_after,
            sample_every=config.train.sample_every,
        )
        meter = None
        if flops_of is not None:
            given = config.train.peak_flops
            meter = Meter(flops_of, len(self.devices), peak_flops(self.devices, given))
            self.say(describe_peak(self.devices, given))
        also = publish.wandb_log(config.log.wandb, self.options, self.out) if self.main else None
        with (
            MetricLog(self.out, total=total, start=start, writes=self.main, also=also) as log,
            distributed.expecting_signs(),
        ):
            outcome = fit(
                state,
                step,
                loader,
                plan=plan,
                mesh=self.mesh,
                log=log,
                checkpoints=checkpoints,
                local=local,
                evaluate=evaluate,
                meter=meter,
                prepare=prepare,
                sample=sample,
            )
            log.stopped = outcome.stopped_by is not None
        final, self.told_steps = outcome.state, f"{total} step{'s' * (total != 1)}"
        patience, metric = config.train.stop_after, config.checkpoint.best
        if outcome.stopped_by is None and patience is not None and metric is not None:
            if outcome.ended_early:
                many = f"{patience} evaluation{'s' * (patience != 1)} without gain in {metric}"
                self.say(f"{self.out}: ended after step {outcome.step} of {total}: {many}")
            final, best = best_state(final, outcome.step, checkpoints, log.rows, metric, self.say)
            self.best = best
            self.told_steps = self.told_steps if best == total else f"{best} of {total} steps"
        checkpoints.close()
        if local is not None:
            local.remove()  # all of it is in `checkpoints` now
        loader.close()
        if outcome.stopped_by is None:
            return final
        told = f"stopped after step {outcome.step} of {total}, all saved; the same command goes on from there"
        self.say(f"{self.out}: {told}", "warning")
        raise Stopped(outcome.stopped_by)

    def _local_checkpoints(self, state: TrainState) -> LocalCheckpoints | None:
        place = self.config.checkpoint.local
        if place is None:
            return None
        name = distributed.json_from_main(self.folder.run_name)
        return LocalCheckpoints(Path(place) / name, state, identity=dict(self.identity), say=self.say)

    # ---------------------------------------------------------------- results

    def exported(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """A copy with the template of the run: whoever loads the model is to speak to it as it was spoken to here."""
        data = self.config.data
        return with_template(tokenizer, data.template, empty_system=data.empty_system)

    def finish(
        self,
        model: Llama,
        variables: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        title: str,
        summary: str,
        sections: Sequence[html.Section],
        classes: Sequence[ClassHead] = (),
        terminators: Sequence[int] = (),
    ) -> Path:
        """Write `model/` (and `adapter/`) and the report, and mark the run as finished. `classes`: of a reward model.

        Under LoRA `model/` holds the merged weights, for everyone, and `adapter/` the adapters alone. `sections` of the
        report come after its curves. `terminators`: what ended the answers that it learnt from.
        """
        config = self.config
        tokenizer = self.exported(tokenizer)
        rows = read_metrics(self.out / "metrics.jsonl") if self.main else []
        exports: dict[str, dict[str, Any]] = {"model": {"dtype": jnp.dtype(config.train.settled.export_dtype)}}
        if "adapters" in variables:
            exports["adapter"] = {"merge": False}
        reward = SCORE in variables.get("heads", {})
        notes = []
        for name, how in exports.items():
            told = {"source": self.start, "classes": classes, "terminators": terminators}
            told["beside"] = self.card(rows, reward=reward, adapter=name == "adapter")
            lost = save_pretrained(self.out / name, model, variables, tokenizer, **how, **told)
            if lost is not None:
                notes.append(f"model/ in {how['dtype']}: rounding lost {lost:.0%} of what was learnt")
        if self.main:
            cost = cost_lines(rows, len(self.devices), self.electricity)
            for line in ("; ".join(cost), *notes):
                self.say(line)
            section = cost_section(self.devices, *cost)
            sections = [*sections, *(html.Section("Rounding", note) for note in notes)]
            parts = [html.final_section(rows), html.training_section(rows)]
            if wrote := training_samples(self.out):
                parts.append(fixed_section(wrote))
            parts += [*sections, section]
            parts.append(html.options_section(self.options))
            html.write_report(self.out / "report.html", title, summary, parts)
        distributed.barrier("run finished")
        self.folder.finish()
        self.say(
            f"{self.out}: finished; the model is in {self.out / 'model'}, the report in {self.out / 'report.html'}"
        )
        self.publish()
        return self.out

    def card(self, rows: Sequence[Row], *, reward: bool = False, adapter: bool = False) -> dict[str, bytes]:
        """The files that tell of an exported model, by name; none in a process that writes nothing."""
        if not self.main:
            return {}
        rows = [row for row in rows if row["step"] <= (self.best or row["step"])]
        told = {"fingerprints": self.identity, "rows": rows, "reward": reward, "steps": self.told_steps}
        return publish.card_of(self.options, self.folder, self.start, adapter=adapter, **told)

    def publish(self) -> None:
        """Send the finished model where `--push_to_hub` says, from process 0. Raises `InputError` where that fails."""
        if self.main and self.config.push_to_hub is not None:
            publish.push(self.config.push_to_hub, self.out / "model")


def _check_options(config: TrainingRun) -> None:
    """Refuse options that contradict each other across sections."""
    best = config.checkpoint.best
    if config.train.eval_every is not None and not config.evaluates:
        raise InputError("--train.eval_every has no effect without --eval_data")
    if best is not None and (not config.evaluates or not best.startswith("eval_")):
        raise InputError(f"--checkpoint.best {best}: give --eval_data and a metric of it, such as eval_loss")
    if config.train.stop_after is not None and best is None:
        raise InputError(
            "--train.stop_after needs --checkpoint.best, the metric whose gain counts, such as eval_loss or eval_reward"
        )


def check_batch(rows: int, accumulate: int, mesh: Mesh) -> None:
    """Raise `InputError` where a batch of so many rows does not divide over micro-batches and devices."""
    parts = batch_parts(mesh) * accumulate
    if rows % parts:
        raise InputError(
            f"--train.batch_size {rows} does not divide by {parts} (devices that split the batch x"
            f" --train.accumulate); choose a multiple of {parts}"
        )
