"""The compiled programs of `dpo-jax dpo --online` and `dpo-jax distill`, which learn from what is sampled.

As with PPO (`programs_ppo.py`) all of a run stays on the devices while each program works, and reward models are taken
to have the policy's shape. The sampler is planned without the second log-probability of each token, at temperature 1,
that online DPO has it write down.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax.align import distill, dpo
from dpo_jax.config import DistillRun, LoraConfig, OnlineDPORun
from dpo_jax.errors import InputError
from dpo_jax.mesh import batch_parts, device_bytes
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.plan import programs
from dpo_jax.plan.programs import Lengths, Program
from dpo_jax.plan.programs_ppo import reward_models, sampler
from dpo_jax.train.flops import ModelFlops, distill_flops, preference_work
from dpo_jax.train.online_pairs import jit_sums


def build_online(
    run: OnlineDPORun, shape: LlamaConfig, mesh: Mesh, lengths: Lengths, name: str, memory: float | None
) -> Program:
    """The program `name` of online DPO: the update on pairs, the reference's log-probabilities, the sampler."""
    run.check_sizes(batch_parts(mesh))
    if run.online.opponent == "mixture":
        raise InputError(
            "--online.opponent mixture cannot be planned: its sampler runs two models; plan with reference"
        )
    config, k, rows = run.step_config(), run.online.samples, run.train.batch_size
    model = programs.make_model(run, shape)
    state = dpo.init_state(model, programs.trained(run, model, mesh), dataclasses.replace(config, reference="cached"))
    frozen = programs.frozen_copy(run, shape, mesh)
    reference = {} if run.lora.rank else {"params": frozen["params"]}
    judge = {key: leaf for key, leaf in frozen["params"].items() if key != "lm_head"}
    held = sum(map(device_bytes, (state, reference))) + reward_models(run) * device_bytes(judge)
    piece, flops = run.rollout_batch_size or run.responses, ModelFlops.of(shape, run.lora)
    if name == "train step":
        sums: dict[str, Any] = {"reference_logps": np.zeros((rows, 2), np.float32)}
        if run.online.exploration is not None:
            sums["logp_weights"] = np.zeros((rows, 2), np.float32)
        batch = programs.full_pairs(rows, 2, lengths, sampled=True, **sums)
        pair = preference_work(batch, 0, 2)
        needed = flops.training(pair)
        computed = needed + programs.again(flops, run.train.remat, pair) + programs.laid_apart(run, flops, batch)
        step = dpo.jit_train_step(config, mesh)
        return Program.of(step, mesh, (state, batch), needed, computed, pair.tokens, held=held)
    if name == "measure":
        narrow = run.sample.weights is not None or run.sample.cache is not None
        groups = programs.full_pairs(piece // k, k, lengths, sampled=True)
        work = preference_work(groups, 0, k)
        needed = flops.forward(work, adapted=False) + (flops.forward(work) if narrow else 0.0)
        step, repeats = jit_sums(model, config, mesh, narrow=narrow), run.responses // piece
        arguments = (state, reference, groups)
        return Program.of(step, mesh, arguments, needed, needed, work.tokens, held=held, repeats=repeats)
    apart = run.online.opponent != "policy"  # each writes one of the two
    pieces = run.responses // piece * (2 if apart else 1)
    how: dict[str, Any] = {"prompts": piece // k, "samples": 1 if apart else k, "repeats": pieces}
    return sampler(run, model, state, mesh, lengths, flops, held=held, memory=memory, **how)


def build_distill(
    run: DistillRun,
    shape: LlamaConfig,
    teacher: LlamaConfig,
    mesh: Mesh,
    lengths: Lengths,
    name: str,
    memory: float | None,
) -> Program:
    """The program `name` of distillation: the update, in which the teacher judges each token, or the sampler."""
    run.check_sizes(batch_parts(mesh))
    config, rows = run.step_config(min(shape.vocab_size, teacher.vocab_size)), run.train.batch_size
    model = programs.make_model(run, shape)
    kept = jnp.dtype(run.teacher_dtype)
    judge = Llama(teacher, dtype=kept, remat="none", attention=run.train.attention, lora=LoraConfig())
    judged_by = programs.abstract(judge, mesh, kept)
    state = distill.init_state(model, programs.trained(run, model, mesh), judged_by, config)
    held, flops = device_bytes(state), ModelFlops.of(shape, run.lora)
    if name == "generate":
        piece = run.rollout_batch_size or rows
        how: dict[str, Any] = {"prompts": piece, "samples": 1, "repeats": rows // piece}
        return sampler(run, model, state, mesh, lengths, flops, held=held, memory=memory, **how)
    batch = programs.full_pairs(rows, 1, lengths, sampled=True)
    work, others = preference_work(batch, 0, 1), ModelFlops.of(teacher, None)
    needed = distill_flops(flops, others)(batch)
    # The teacher's logits are made again beside the student's, chunk by chunk.
    computed = needed + programs.again(flops, run.train.remat, work) + 2.0 * others.head * work.predicted
    step = distill.jit_train_step(config, mesh, judge.apply)
    return Program.of(step, mesh, (state, batch), needed, computed, work.tokens, held=held)
