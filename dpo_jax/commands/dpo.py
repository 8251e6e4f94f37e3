"""`dpo-jax dpo`: from a model and a preference file to an aligned model, in the order in which it happens."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.align import dpo
from dpo_jax.config import BETAS, DPORun
from dpo_jax.data.sets.comparison_sets import join, split_by_prompt
from dpo_jax.data.sets.dataset import PreferenceDataset, load_preferences, with_mismatched_responses, with_score_gaps
from dpo_jax.data.sets.loader import eval_batches
from dpo_jax.errors import InputError
from dpo_jax.judge.policy_logps import policy_logps
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.model.quantised import kind_of
from dpo_jax.report.datasets import data_section
from dpo_jax.train.fixed_prompts import FixedPrompts
from dpo_jax.train.flops import ModelFlops, dpo_flops
from dpo_jax.train.heldout import of_rows, policy_figures
from dpo_jax.train.kept_reference import ROWS, kept_reference
from dpo_jax.train.row_data import read_both
from dpo_jax.train.session import Training
from dpo_jax.weights.integrity.fingerprint import fingerprint
from dpo_jax.weights.opened import StoredModel, open_checkpoint
from dpo_jax.weights.pretrained import load_pretrained


def train(config: DPORun) -> Path:
    """Run DPO; return the run folder. Resumed and refused as every training (`train/session.py`)."""
    _check_options(config)
    training = Training.begin(config, "dpo")
    if training is None:
        return Path(config.out)
    mesh = training.mesh

    # -------------------------------------------------------------- the model's shape, and the data
    architecture, tokenizer = training.read_model_shape()
    config = training.config
    vocabulary, other = architecture.vocab_size, None
    if config.reference is not None:
        other = open_checkpoint(config.reference, merged=config.dpo.reference == "live")
        vocabulary = min(vocabulary, other.architecture.vocab_size)
    data, heldout = load_data(config, tokenizer, vocabulary)
    samples = FixedPrompts.of(config, tokenizer, architecture, heldout, data)
    planned = training.preferences(data, heldout, architecture)
    step_config = training.config.step_config()
    objective = step_config.objective

    if config.dpo.beta is None and config.dpo.loss in BETAS:
        β, source = BETAS[config.dpo.loss]
        training.say(f"--dpo.beta {β:g}, since none is given: {config.dpo.loss}'s own ({source})")

    # -------------------------------------------------------------- weights and the reference policy
    model, variables = training.load_model()
    starting = {"params": variables["params"]}  # fresh adapters add nothing to it, those of an adapter folder do
    if "adapters" in variables and not config.lora.rank:
        starting = dict(variables)
        if config.dpo.reference == "live":
            raise InputError(
                f"--model {config.model}: with an adapter folder a live reference would lack the adapters; use"
                " --dpo.reference cached, or merge them with dpo-jax convert first"
            )
    identity = {"the starting model": fingerprint(starting), "the data": data.fingerprint}
    evaluation = {} if heldout is None else training.evaluation(heldout, objective.layout)
    reference = None
    if not objective.reference_free:
        judge, judge_variables = model, starting
        if other is not None:
            judge, judge_variables = _load_reference(config, other, architecture, mesh)
        if objective.reference == "cached":
            # In the batches of the first epoch: their shapes are compiled anyway, and a short run needs no other rows.
            label = "reference log-probabilities"
            told: dict[str, Any] = {"mesh": mesh, "objective": objective, "batches": planned.every_row()}
            data = data.with_reference(policy_logps(data, judge, judge_variables, label=label, **told))
            if heldout is not None:
                told["batches"] = eval_batches(heldout, **evaluation)
                told["objective"] = objective._replace(accumulate=1)
                label += " of the evaluation data"
                heldout = heldout.with_reference(policy_logps(heldout, judge, judge_variables, label=label, **told))
        elif config.reference is not None or ("adapters" not in variables and not objective.moving):
            train = dataclasses.replace(config.train, frozen_dtype="float32") if objective.moving else config.train
            k = data.responses_per_prompt
            texts = [np.concatenate([data.prompts[i], data.responses[i * k]]) for i in range(min(len(data), ROWS))]
            reference, error = kept_reference(judge, judge_variables["params"], train, texts, mesh)
            if error is not None:
                training.say(error)
        del judge, judge_variables

    # -------------------------------------------------------------- training
    flops = ModelFlops.of(architecture, model.lora if "adapters" in variables else None)
    training.say(flops.describe())
    state = dpo.init_state(model, variables, step_config, reference=reference)
    del variables, starting, reference
    evaluate = None
    if heldout is not None:
        evaluate = of_rows(dpo.jit_eval_step(step_config, mesh), policy_figures, heldout, mesh=mesh, **evaluation)
    final = training.fit(
        state,
        dpo.jit_train_step(step_config, mesh),
        training.preference_loader(data),
        identity=identity,
        evaluate=evaluate,
        flops_of=dpo_flops(flops, objective),
        sample=None if samples is None else samples.answered_by(model, mesh, training.out),
    )

    # -------------------------------------------------------------- the aligned model, and the report
    return training.finish(
        model,
        final.variables,
        tokenizer,
        title="DPO run",
        summary=f"{config.model}, aligned with {config.data.files} in {training.told_steps} ({config.dpo.loss}).",
        sections=[
            data_section("Data", data, planned.told()),
            *([] if heldout is None else [data_section("Evaluation data", heldout)]),
        ],
        terminators=data.terminators,
    )


def _check_options(config: DPORun) -> None:
    """Refuse options that would have no effect, or that contradict each other across sections."""
    objective = config.dpo.objective
    if objective.moving and config.reference is not None and config.lora.rank:
        raise InputError(
            "--dpo.reference_sync_steps with --lora.rank: the reference is --model with adapters of its own, which move"
            " towards the policy's; leave out --reference"
        )
    if config.reference is not None and objective.reference_free:
        raise InputError(f"--reference has no effect: --dpo.loss {config.dpo.loss} has no reference policy")
    if objective.reference == "live" and objective.reference_free:
        raise InputError(f"--dpo.reference has no effect: --dpo.loss {config.dpo.loss} has no reference policy")
    if config.train.frozen_dtype is not None and not config.lora.rank and (objective.moving or not objective.live):
        raise InputError(
            "--train.frozen_dtype has no effect: nothing is frozen without --lora.rank or a live reference that"
            " stays as it is"
        )


# ---------------------------------------------------------------- loading


def load_data(
    config: DPORun, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> tuple[PreferenceDataset, PreferenceDataset | None]:
    """What to train on, and what is held out."""
    objective = config.dpo.objective

    def read(source: str) -> PreferenceDataset:
        data = load_preferences(
            source,
            tokenizer,
            config.data,
            on_bad_rows=config.on_bad_rows,
            vocab_size=vocabulary,
            with_format_masks=objective.mask_format_tokens,
            needs_pairs=not objective.unpaired,
            ties=config.dpo.ties,
        )
        return with_score_gaps(data) if "odpo" in objective.losses else data

    data, heldout = read_both(config, read, join, split_by_prompt)
    if objective.loss == "kto":  # after rows were held out: a response to another prompt is one of the same side
        with_others = partial(with_mismatched_responses, max_length=config.data.max_length)
        data, heldout = with_others(data), None if heldout is None else with_others(heldout)
    return data, heldout


def _load_reference(
    config: DPORun, place: StoredModel, policy: LlamaConfig, mesh: Mesh
) -> tuple[Llama, dict[str, Any]]:
    """The model of `--reference`, laid out on the mesh; a live one must be of the policy's architecture.

    One that will be kept quantised in the steps is read whole, so that its error can be told: nothing but the policy's
    weights is there yet.
    """
    kept = config.train.settled.frozen_dtype
    if config.dpo.reference == "live" and kind_of(kept) is not None:
        kept = config.train.dtype
    model, variables = load_pretrained(
        place,
        mesh=mesh,
        dtype=kept,
        compute_dtype=jnp.dtype(config.train.dtype),
        remat="none",
        attention=config.train.attention,
    )
    if config.dpo.reference == "live" and ("adapters" in variables or model.config != policy):
        raise InputError(
            f"--reference {config.reference}: a live reference must have the architecture of --model, and no adapters"
            " of its own; use --dpo.reference cached"
        )
    return model, variables
