"""`dpo-jax sft`: from a model and dialogues, or plain text, to a better model, in the order in which it happens."""

from pathlib import Path

from dpo_jax.align import sft
from dpo_jax.config import SFTRun
from dpo_jax.errors import InputError
from dpo_jax.files.log import Row, read_metrics
from dpo_jax.train.fixed_prompts import FixedPrompts
from dpo_jax.train.flops import ModelFlops, sft_flops
from dpo_jax.train.heldout import of_language_model
from dpo_jax.train.session import Training
from dpo_jax.train.sft_data import load_both
from dpo_jax.weights.integrity.fingerprint import fingerprint


def train(config: SFTRun) -> Path:
    """Run SFT; return the run folder. Resumed and refused as every training (`train/session.py`)."""
    training = begin(config)
    if training is None:
        return Path(config.out)
    mesh = training.mesh

    # -------------------------------------------------------------- the model's shape, and the data
    architecture, tokenizer = training.read_model_shape()
    config = training.config
    data, heldout = load_both(config, tokenizer, architecture)
    training.told(data, heldout)
    samples = FixedPrompts.of(config, tokenizer, architecture, None if heldout is None else heldout.first, data.first)
    windows = None if heldout is None else heldout.eval_batches(training.eval_batch_size, mesh)

    # -------------------------------------------------------------- options that follow from the data
    planned = data.loader(**training.length, mesh=mesh)
    resolved = training.resolve(planned.total_steps)
    step_config = resolved.step_config(packed=data.packed)

    # -------------------------------------------------------------- weights, training
    model, variables = training.load_model()
    # Fresh adapters follow from the seed; those of an adapter folder are part of the model.
    starting = {"params": variables["params"]} if config.lora.rank else variables
    identity = {"the starting model": fingerprint(starting), "the data": data.fingerprint}
    negatives = config.sft.drawn
    flops = ModelFlops.of(architecture, model.lora, outputs=None if negatives is None else negatives + 1)
    training.say(flops.describe())
    state = sft.init_state(model, variables, step_config)
    del variables, starting
    final = training.fit(
        state,
        sft.jit_train_step(step_config, mesh),
        data.loader(**training.length, mesh=mesh),
        identity=identity,
        evaluate=None if windows is None else of_language_model(windows, config=step_config, mesh=mesh),
        evaluate_first=True,
        flops_of=sft_flops(flops),
        sample=None if samples is None else samples.answered_by(model, mesh, training.out),
    )

    # -------------------------------------------------------------- the model, and the report
    done = "trained on the text of" if config.data.kind == "text" else "fine-tuned on"
    summary = f"{config.model}, {done} {config.data.files} in {training.told_steps}."
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
            *data.sections("Data", steps=planned.total_steps),
            *([] if heldout is None else heldout.sections("Evaluation data")),
        ],
        terminators=data.terminators,
    )


def begin(config: SFTRun) -> Training[SFTRun] | None:
    """Check the options and open the run folder, without writing; None where its run has finished."""
    if config.train.frozen_dtype is not None and not config.lora.rank:
        raise InputError("--train.frozen_dtype has no effect: nothing is frozen without --lora.rank")
    return Training.begin(config, "sft")


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
