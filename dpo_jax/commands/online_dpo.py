"""`dpo-jax dpo --online`: from a model, prompts and a judge to an aligned model, in the order in which it happens."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from dpo_jax.align import dpo, ppo
from dpo_jax.config import BETAS, OnlineDPORun
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.files.log import read_metrics
from dpo_jax.files.sample_log import SampleLog
from dpo_jax.judge.rewards.scores import Judges
from dpo_jax.mesh import batch_parts
from dpo_jax.report.datasets import prompts_section
from dpo_jax.report.samples import progress, samples_section
from dpo_jax.train.answered import Policy, reference_of
from dpo_jax.train.fixed_prompts import FixedPrompts
from dpo_jax.train.flops import ModelFlops, online_dpo_flops
from dpo_jax.train.heldout_prompts import HeldOutPrompts
from dpo_jax.train.online_pairs import OnlinePairs, jit_measure
from dpo_jax.train.prompt_data import loader_of, read_prompts
from dpo_jax.train.session import Training
from dpo_jax.weights.integrity.fingerprint import fingerprint
from dpo_jax.weights.tokenizer import text_ids


def train(config: OnlineDPORun) -> Path:
    """Run online DPO; return the run folder. Resumed and refused as every training (`train/session.py`)."""
    training = Training.begin(config, "dpo --online")
    if training is None:
        return Path(config.out)
    mesh = training.mesh
    config.check_sizes(batch_parts(mesh))

    # -------------------------------------------------------------- the model's shape, the prompts, the judge
    architecture, tokenizer = training.read_model_shape()
    config = training.config
    encoder = ConversationEncoder.of(tokenizer, config.data)
    data, heldout = read_prompts(training, architecture, encoder)
    samples = FixedPrompts.of(config, tokenizer, architecture, heldout, data)
    together = math.gcd(config.rollout_batch_size or config.responses, training.eval_batch_size)
    # Of two judges the combination is compared as it is: a standardised one would rank the same.
    judges = Judges(config, mesh=mesh, batch_size=together, whiten=True)
    judges.try_out(data, heldout)
    reward = " with ".join(judges.identities())

    # -------------------------------------------------------------- options that follow from the data
    loader = loader_of(config, data, rows=config.responses, group=config.online.samples)
    planned = loader(**training.length)
    step_config = training.resolve(planned.total_steps).step_config()
    if config.dpo.beta is None and config.dpo.loss in BETAS:
        β, source = BETAS[config.dpo.loss]
        training.say(f"--dpo.beta {β:g}, since none is given: {config.dpo.loss}'s own ({source})")

    # -------------------------------------------------------------- weights: policy and reference
    model, variables = training.load_model()
    # Fresh adapters follow from the seed; those of an adapter folder are part of the model.
    starting = {"params": variables["params"]} if config.lora.rank else variables
    identity = {"the starting model": fingerprint(starting), "the prompts": data.fingerprint, "the reward": reward}
    reference = reference_of(training, model, variables, data)
    flops = ModelFlops.of(architecture, model.lora if "adapters" in variables else None)
    training.say(flops.describe())
    state = dpo.init_state(model, variables, dataclasses.replace(step_config, reference="cached"))
    del variables, starting
    again = ppo.policy_of(state.variables) if config.online.opponent == "mixture" else ()  # two copies are laid out
    held = (state, reference, judges.weights(), again)
    how: dict[str, Any] = {"rows": config.responses, "vocabulary": text_ids(tokenizer, architecture), "held": held}
    policy = Policy.of(config, state, model, tokenizer, encoder, mesh, **how)

    # -------------------------------------------------------------- training
    prompts = loader(steps=planned.total_steps, epochs=None)
    log = SampleLog(training.out / "samples.jsonl", writes=training.main)
    options: dict[str, Any] = {"reference": reference, "config": config.online, "step": step_config}
    pairs = OnlinePairs(policy, data, prompts, judges.as_they_are, log, **options)
    evaluate = None
    if heldout is not None:
        measure = jit_measure(model, mesh, temperature=config.sample.temperature, vocabulary=policy.vocabulary)
        how = {"reference": reference, "measure": measure, "width": prompts.width}
        evaluate = HeldOutPrompts(policy, heldout, judges, training.out, **how)
    final = training.fit(
        state,
        dpo.jit_train_step(step_config, mesh),
        pairs,
        identity=identity,
        evaluate=evaluate,
        evaluate_first=True,
        flops_of=online_dpo_flops(flops, config.online.samples),
        sample=None if samples is None else samples.answered_by(model, mesh, training.out, like=policy.sample),
        prepare=pairs.prepare,
    )

    # -------------------------------------------------------------- the aligned model, and the report
    told = progress(read_metrics(training.out / "metrics.jsonl"))
    training.say(told)
    return training.finish(
        model,
        ppo.policy_of(final.variables),
        tokenizer,
        title="Online DPO run",
        summary=f"{config.model}, aligned with what {config.told_reward} prefers of its responses to"
        f" {config.data.files} in {training.told_steps} ({config.dpo.loss}). {told}",
        sections=[samples_section(training.out / "samples.jsonl"), prompts_section(data)] if training.main else [],
        terminators=encoder.terminators,
    )
