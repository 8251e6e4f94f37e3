"""`dpo-jax sft`: from a model and dialogues to a model that answers, in the order in which it happens."""

import dataclasses
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.align import sft
from dpo_jax.config import SFTConfig, SFTLossConfig, SFTRun
from dpo_jax.data.sequences import SequenceDataset, load_dialogues
from dpo_jax.data.token_loader import TokenLoader, eval_windows
from dpo_jax.errors import InputError
from dpo_jax.run import report
from dpo_jax.run.flops import ModelFlops, sft_flops
from dpo_jax.run.heldout_tokens import evaluator
from dpo_jax.run.log import Row, read_metrics
from dpo_jax.run.training import Training, check_context
from dpo_jax.weights.fingerprint import fingerprint


def train(config: SFTRun) -> Path:
    """Run SFT; return the run folder. An unfinished run in `config.out` is resumed exactly, a finished one left alone.

    Raises `InputError` for bad input; everything that can be checked before the weights are read is checked before.
    """
    if config.train.frozen_dtype is not None and not config.lora.rank:
        raise InputError("--train.frozen_dtype has no effect: nothing is frozen without --lora.rank")
    training = Training.begin(config, "sft")
    if training is None:
        return Path(config.out)
    mesh = training.mesh

    # -------------------------------------------------------------- the model's shape, and the data
    architecture, tokenizer = training.read_model_shape()
    data = _load_data(config, config.source, tokenizer, architecture.vocab_size)
    heldout = None
    if config.eval_source is not None:
        heldout = _load_data(config, config.eval_source, tokenizer, architecture.vocab_size)
    for dataset in (data, heldout):
        if dataset is not None:
            check_context(dataset.source, dataset.row_numbers, dataset.lengths, architecture)
            training.say(dataset.summary())

    # -------------------------------------------------------------- options that follow from the data
    planned = _loader(config, data, **training.length)
    resolved = training.resolve(planned.total_steps)
    step_config = SFTConfig(
        **{f.name: getattr(config.sft, f.name) for f in dataclasses.fields(SFTLossConfig)},
        optimizer=resolved.optimizer,
        accumulate=config.train.accumulate,
        packed=config.data.packing,
        seed=config.train.seed,
    )

    # -------------------------------------------------------------- weights, training
    model, variables = training.load_model()
    # Fresh adapters follow from the seed; those of an adapter folder are part of the model.
    starting = {"params": variables["params"]} if config.lora.rank else variables
    identity = {"the starting model": fingerprint(starting), "the data": data.fingerprint}
    evaluate = None
    if heldout is not None:
        windows = eval_windows(
            heldout, batch_size=training.eval_batch_size, window=_window(config), buckets=config.data.buckets
        )
        evaluate = evaluator([batch for _, batch in windows], config=step_config, mesh=mesh)
    state = sft.init_state(model, variables, step_config)
    del variables, starting
    final = training.fit(
        state,
        sft.jit_train_step(step_config, mesh),
        _loader(config, data, steps=planned.total_steps, epochs=None),
        identity=identity,
        evaluate=evaluate,
        evaluate_first=True,
        flops_of=sft_flops(ModelFlops.of(architecture, config.lora)) if config.sft.loss == "exact" else None,
    )
    if final is None:
        return training.out

    # -------------------------------------------------------------- the model, and the report
    summary = f"{config.model}, fine-tuned on {config.source} in {planned.total_steps} steps."
    progress = heldout_progress(read_metrics(training.out / "metrics.jsonl"))
    if progress:
        training.say(progress)
    return training.finish(
        model,
        final.variables,
        tokenizer,
        title="SFT run",
        summary=f"{summary} {progress}".rstrip(),
        sections=[
            data_section(title, d) for title, d in (("Data", data), ("Evaluation data", heldout)) if d is not None
        ],
    )


# ---------------------------------------------------------------- loading


def _load_data(config: SFTRun, source: str, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> SequenceDataset:
    return load_dialogues(
        source,
        tokenizer,
        config.data,
        train_on=config.data.train_on,
        vocab_size=vocabulary,
        on_bad_rows=config.on_bad_rows,
    )


def _window(config: SFTRun) -> int | None:
    """Tokens of a packed window; None where each dialogue has a window of its own."""
    return config.data.max_length if config.data.packing else None


def _loader(config: SFTRun, data: SequenceDataset, *, steps: int | None, epochs: float | None) -> TokenLoader:
    return TokenLoader(
        data,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        window=_window(config),
        shuffle=config.data.shuffle,
        buckets=config.data.buckets,
        steps=steps,
        epochs=epochs,
        workers=config.data.workers,
    )


# ---------------------------------------------------------------- report


def heldout_progress(rows: list[Row]) -> str:
    """Held-out loss and perplexity before and after, in one sentence; nothing where there was no evaluation."""
    evaluated = [row for row in rows if "eval_loss" in row]
    if not evaluated:
        return ""
    first, last = evaluated[0], evaluated[-1]
    return (
        f"Held-out loss {first['eval_loss']:.4f} before and {last['eval_loss']:.4f} after, perplexity"
        f" {first['eval_perplexity']:.2f} and {last['eval_perplexity']:.2f}."
    )


def data_section(title: str, data: SequenceDataset) -> report.Section:
    """What was read, what was left out and why, how long the sequences are and how much of them the loss counts."""
    lengths: dict[str, np.ndarray] = {"dialogue": data.lengths, "in the loss": data.target_lengths}
    counts = [("rows read", data.rows_read), ("rows used", len(data)), ("rows cut at their end", data.cut)]
    counts += [(f"left out: {reason}", count) for reason, count in data.dropped.most_common()]
    counts += [("tokens", int(data.lengths.sum())), ("tokens in the loss", int(data.target_lengths.sum()))]
    return report.Section(
        title,
        note=data.source,
        plots=(report.lengths_plot("Lengths", lengths),),
        table=report.Table(("what", "count"), counts),
    )
