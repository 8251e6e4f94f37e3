"""`dpo-jax ppo`, `dpo-jax grpo`: from a model, prompts and a reward to a better model, in the order it happens in."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dpo_jax.align import ppo
from dpo_jax.config import GRPORun, PPOConfig, PPORun
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.errors import InputError
from dpo_jax.files.log import read_metrics
from dpo_jax.files.sample_log import SampleLog
from dpo_jax.judge.reward_model import check_score
from dpo_jax.judge.rewards.environment import Environment
from dpo_jax.judge.rewards.scores import Judges
from dpo_jax.mesh import batch_parts
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.report.datasets import prompts_section
from dpo_jax.report.samples import progress, samples_section
from dpo_jax.sample import is_narrow
from dpo_jax.train.answered import Policy, reference_of
from dpo_jax.train.episodes import EpisodeRollouts, HeldOutEpisodes
from dpo_jax.train.fixed_prompts import FixedPrompts
from dpo_jax.train.flops import ModelFlops, ppo_flops
from dpo_jax.train.heldout_prompts import HeldOutPrompts
from dpo_jax.train.playing import Bounds, Player, try_out
from dpo_jax.train.prompt_data import loader_of, read_prompts
from dpo_jax.train.rollouts import Rollouts, jit_measure
from dpo_jax.train.session import Training
from dpo_jax.weights.integrity.fingerprint import fingerprint
from dpo_jax.weights.opened import open_checkpoint
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import text_ids


def train(config: PPORun) -> Path:
    """Run PPO or a relative; return the run folder. Resumed and refused as every training (`train/session.py`)."""
    training = Training.begin(config, "grpo" if isinstance(config, GRPORun) else "ppo")
    if training is None:
        return Path(config.out)
    mesh = training.mesh
    config.check_sizes(batch_parts(mesh))

    # -------------------------------------------------------------- the model's shape, the prompts, the reward
    architecture, tokenizer = training.read_model_shape()
    config = training.config
    _check_value_model(config, architecture)
    encoder = ConversationEncoder.of(tokenizer, config.data)
    data, heldout = read_prompts(training, architecture, encoder)
    samples = FixedPrompts.of(config, tokenizer, architecture, heldout, data)
    judges, environment = None, None
    if config.environment is not None:
        environment = Environment(config.environment, config.reward_timeout)
        for prompts in filter(None, (data, heldout)):
            try_out(environment, encoder, config.longest_prompt, prompts)
        reward = environment.identity
    else:
        together = math.gcd(config.rollout_batch_size or config.train.batch_size, training.eval_batch_size)
        judges = Judges(config, mesh=mesh, batch_size=together, whiten=True, group=config.standardised_over)
        if judges.try_out(data, heldout) and not config.ppo.by_token:
            training.say(
                "--reward gives scores of steps, and whole responses learn from their sum; --ppo.returns to_go or"
                " --ppo.advantage gae see where they stand"
            )
        reward = " with ".join(judges.identities())

    # -------------------------------------------------------------- options that follow from the data
    loader = loader_of(config, data, rows=config.train.batch_size, group=config.ppo.group)
    planned = loader(**training.length)
    resolved = training.resolve(planned.total_steps)
    step_config = dataclasses.replace(resolved.step_config(), vocabulary=text_ids(tokenizer, architecture))

    # -------------------------------------------------------------- weights: policy, reference, value model
    model, variables = training.load_model()
    # Fresh adapters follow from the seed; those of an adapter folder are part of the model.
    starting = {"params": variables["params"]} if config.lora.rank else ppo.policy_of(variables)
    identity = {"the starting model": fingerprint(starting), "the prompts": data.fingerprint, "the reward": reward}
    reference = reference_of(training, model, variables, data)
    value = None
    if config.value_model is not None:
        # Beneath adapters it shares the policy's weights; without, it is a model of its own.
        start = open_checkpoint(config.value_model, merged="adapters" not in variables)
        _, value = load_pretrained(start, mesh=mesh, dtype=jnp.float32)
        identity["the value model"] = fingerprint(value)
    flops = ModelFlops.of(architecture, model.lora if "adapters" in variables else None)
    training.say(flops.describe())
    if config.ppo.group > 1:
        training.say(_told_sharing(step_config, config.train.batch_size, batch_parts(mesh)))
    state = ppo.init_state(model, ppo.policy_of(variables), step_config, value=value)
    del variables, starting, value
    held = (state, reference, [] if judges is None else judges.weights())
    how: dict[str, Any] = {"rows": config.train.batch_size, "vocabulary": step_config.vocabulary, "held": held}
    policy = Policy.of(config, state, model, tokenizer, encoder, mesh, **how)
    training.say(f"sampling: weights {policy.sample.layout} (--sample.layout)")

    # -------------------------------------------------------------- training
    prompts = loader(steps=planned.total_steps, epochs=None)
    log = SampleLog(training.out / "samples.jsonl", writes=training.main)
    each = config.settled.eval_samples
    learning: dict[str, Any] = {"reference": reference, "config": step_config}
    measured = jit_measure(model, step_config, mesh, group=each, stores=is_narrow(policy.sample))
    held_out: dict[str, Any] = {
        "samples": each,
        "passes": config.eval_pass,
        "reference": reference,
        "measure": measured,
    }
    evaluate = None
    if judges is not None:
        rollouts = Rollouts(policy, data, prompts, judges, log, **learning)
        if heldout is not None:
            evaluate = HeldOutPrompts(policy, heldout, judges, training.out, width=prompts.width, **held_out)
    else:
        assert environment is not None, "one of the two rewards"
        bounds = Bounds(
            turns=config.settled.environment_turns,
            tokens=config.response_room,
            prompt=config.longest_prompt,
            on_error=config.settled.environment_errors,
        )
        player = Player(policy, environment, encoder, bounds)
        rollouts = EpisodeRollouts(policy, data, prompts, log, player=player, **learning)
        if heldout is not None:
            shares = step_config.layout != "separate"
            evaluate = HeldOutEpisodes(policy, heldout, training.out, player=player, shares=shares, **held_out)
    final = training.fit(
        state,
        ppo.jit_train_step(step_config, mesh),
        rollouts,
        identity=identity,
        evaluate=evaluate,
        evaluate_first=True,
        flops_of=ppo_flops(flops, step_config),
        sample=None if samples is None else samples.answered_by(model, mesh, training.out, like=policy.sample),
        prepare=rollouts.prepare,
    )

    # -------------------------------------------------------------- the model, and the report
    told = progress(read_metrics(training.out / "metrics.jsonl"))
    training.say(told)
    return training.finish(
        model,
        ppo.policy_of(final.variables),
        tokenizer,
        title=f"{config.ppo.algorithm().upper()} run",
        summary=f"{config.model}, rewarded by {config.told_reward} on {config.data.files} in"
        f" {training.told_steps} ({config.ppo.algorithm()}). {told}",
        sections=[samples_section(training.out / "samples.jsonl"), prompts_section(data)] if training.main else [],
        terminators=encoder.terminators,
    )


def _told_sharing(config: PPOConfig, rows: int, devices: int) -> str:
    """For the log: for how many of its responses the updates compute a prompt once."""
    pieces = config.minibatches * config.accumulate * devices
    k = ppo.sharing(config, rows, pieces)
    some = f"{k} of its {config.group} responses" if k > 1 else f"each of its {config.group} responses"
    told = f"updates: a prompt is computed once for {some}"
    if k == config.group or config.layout == "separate":
        return told
    return (
        f"{told}, because {rows // config.group} prompts do not divide over {pieces} parts (--ppo.minibatches x"
        " --train.accumulate x devices that split the batch)"
    )


# ---------------------------------------------------------------- checks


def _check_value_model(config: PPORun, architecture: LlamaConfig) -> None:
    """Refuse a value model that is no reward model of the policy's shape: it runs in the policy's place."""
    if config.value_model is None:
        return
    other = open_checkpoint(config.value_model).architecture
    check_score(config.value_model, other)
    free = ("vocab_size", "max_position", "tie_embeddings", "eos_token_ids", "bos_token_id", "pad_token_id")
    same = {name: getattr(architecture, name) for name in (*free, "further_stop_ids", "num_labels", "model_type")}
    if dataclasses.replace(other, **same) != architecture or other.vocab_size < architecture.vocab_size:
        raise InputError(f"--value_model {config.value_model}: has another architecture than --model {config.model}")
