"""`dpo-jax reward`: from a model and comparisons to a reward model, in the order in which it happens."""

from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo_jax.align import reward
from dpo_jax.config import RewardRun
from dpo_jax.data.rows.comparisons import SAFETY
from dpo_jax.data.sets.comparison_sets import join, load_comparisons, mix, split_by_prompt
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.errors import InputError
from dpo_jax.files.log import Row, read_metrics
from dpo_jax.model.families import check_scores
from dpo_jax.report import html
from dpo_jax.report.datasets import data_section
from dpo_jax.train.flops import ModelFlops, reward_flops
from dpo_jax.train.heldout import of_rows, reward_figures
from dpo_jax.train.row_data import read_alike, read_both
from dpo_jax.train.session import Training
from dpo_jax.weights.huggingface.heads import as_reward_model, padded_apart
from dpo_jax.weights.integrity.fingerprint import fingerprint


def train(config: RewardRun) -> Path:
    """Train a reward model; return the run folder. Resumed and refused as every training (`train/session.py`)."""
    if config.train.frozen_dtype is not None and not config.lora.rank:
        raise InputError("--train.frozen_dtype has no effect: nothing is frozen without --lora.rank")
    training = Training.begin(config, "reward")
    if training is None:
        return Path(config.out)
    mesh = training.mesh

    # -------------------------------------------------------------- the model's shape, and the data
    architecture, tokenizer = training.read_model_shape()
    check_scores(architecture.model_type, config.model)
    config = training.config
    padded_apart(architecture, training.exported(tokenizer))  # what cannot be exported is refused now
    data, heldout = load_data(config, tokenizer, architecture.vocab_size)
    planned = training.preferences(data, heldout, architecture)
    step_config = training.config.step_config()

    # -------------------------------------------------------------- weights, training
    model, variables = as_reward_model(*training.load_model())
    # Fresh adapters follow from the seed; those of an adapter folder, and heads, are part of the model.
    starting = {name: tree for name, tree in variables.items() if name != "adapters" or not config.lora.rank}
    identity = {"the starting model": fingerprint(starting), "the data": data.fingerprint}
    state = reward.init_state(model, variables, step_config)
    del variables, starting
    evaluate = None
    if heldout is not None:
        figures = partial(reward_figures, dataset=heldout, config=step_config)
        batched = training.evaluation(heldout, step_config.layout)
        evaluate = of_rows(reward.jit_eval_step(step_config, mesh), figures, heldout, mesh=mesh, **batched)
    final = training.fit(
        state,
        reward.jit_train_step(step_config, mesh),
        training.preference_loader(data),
        identity=identity,
        evaluate=evaluate,
        flops_of=reward_flops(ModelFlops.of(model.config, config.lora, outputs=1)),
    )

    # -------------------------------------------------------------- the reward model, and the report
    rows = read_metrics(training.out / "metrics.jsonl")
    return training.finish(
        model,
        final.variables,
        tokenizer,
        title="Reward model",
        summary=f"{config.model}, trained on {data.source} in {training.told_steps}"
        f" (margin {config.reward.margin}). {_progress(rows)}".rstrip(),
        sections=[
            data_section("Data", data, planned.told()),
            *([] if heldout is None else [data_section("Evaluation data", heldout)]),
            *_groups(rows),
        ],
        classes=step_config.heads,
    )


def load_data(
    config: RewardRun, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> tuple[PreferenceDataset, PreferenceDataset | None]:
    """What to train on, and what is held out: of each source the same share of prompts, before they are mixed."""

    def load(source: str) -> PreferenceDataset:
        return load_comparisons(
            source, tokenizer, config.data, config.reward, vocab_size=vocabulary, on_bad_rows=config.on_bad_rows
        )

    data, heldout = read_both(config, load, join, split_by_prompt)
    if config.reward.exclude_unsafe_chosen and SAFETY not in data.extras:
        raise InputError(
            f"--reward.exclude_unsafe_chosen has no effect: no row of {data.source} says in its column 'labels' which"
            ' response is safe, as in {"safety": ["safe", "unsafe"]}'
        )
    if config.mix_data is None:
        return data, heldout
    if data.mixture is not None:
        raise InputError(f"--mix_data beside several files in --data {config.data.files}: give it a weight among them")
    seed, share = config.train.seed, config.settled.mix
    second = read_alike(config.mix_data, load)
    if config.holdout is not None and heldout is not None:
        second, held = split_by_prompt(second, config.holdout, seed)
        heldout = join(heldout, held)
    return mix(data, second, share, seed), heldout


# ---------------------------------------------------------------- report


def _progress(rows: list[Row]) -> str:
    """Held-out accuracy at the end, in one sentence; nothing where there was no evaluation."""
    evaluated = [row for row in rows if "eval_accuracy" in row]
    return f"Held-out accuracy {evaluated[-1]['eval_accuracy']:.3f}." if evaluated else ""


def _groups(rows: list[Row]) -> list[html.Section]:
    """The last held-out accuracies by rating, agreement, source and difference in length."""
    prefix = "eval_accuracy/"
    last = next((row for row in reversed(rows) if any(name.startswith(prefix) for name in row)), None)
    if last is None:
        return []
    cells = [
        (*name.removeprefix(prefix).split("/", 1), f"{value:.3f}")
        for name, value in last.items()
        if name.startswith(prefix)
    ]
    return [html.Section("Held-out accuracy by group", table=html.Table(("column", "value", "accuracy"), cells))]
