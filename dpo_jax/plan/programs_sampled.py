"""The compiled programs of the commands that learn from what is sampled: `ppo`, `grpo`, `dpo --online`, `distill`.

All of a run stays on the devices while each of them works: policy, value model, optimizer, the frozen reference and
the reward models. A program's own arguments are a part of that; `held` is all of it. Reward models are taken to have
the policy's shape. The sampler is planned without the second log-probability of each token, at temperature 1, that
online DPO has it write down.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax.align import distill, dpo, ppo
from dpo_jax.config import (
    NO_LORA,
    TENSOR,
    DistillRun,
    JudgedRun,
    OnlineDPORun,
    PPOConfig,
    PPORun,
    SampledRun,
    is_url,
)
from dpo_jax.errors import InputError
from dpo_jax.judge.asked.judge_reward import PREFIX, read_judge
from dpo_jax.mesh import batch_parts, device_bytes
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.plan import programs
from dpo_jax.plan.programs import Lengths, Program
from dpo_jax.sample import engine, layout as layouts
from dpo_jax.sample.program import is_narrow, prepared_shapes
from dpo_jax.train.flops import ModelFlops, Work, distill_flops, preference_work
from dpo_jax.train.online_pairs import jit_sums
from dpo_jax.train.rollout_packing import GroupPacking, RolloutPacking
from dpo_jax.train.rollouts import jit_measure
from dpo_jax.types import Rollout

_FUNCTIONS = ("regex", "language", "exact", "numeric", "math", "json", "format", "ramp", "repetition", "run")


def reward_models(run: JudgedRun) -> int:
    """How many judges of a run are models on the devices."""
    judges = [judge for judge in (*run.rewards, run.safety_reward) if judge is not None]
    return sum(_is_model(judge) for judge in judges)


def _is_model(judge: str) -> bool:
    if judge.startswith(PREFIX):
        return read_judge(judge).model is not None
    plain = judge in ("vader", "length", "json") or judge.partition(":")[0] in _FUNCTIONS
    return not (plain or is_url(judge) or ".py:" in judge)


def _held(run: JudgedRun, shape: LlamaConfig, mesh: Mesh, state: Any) -> tuple[dict[str, Any], float]:
    """The reference where it is a copy of its own, and the bytes of a device that it, `state` and the judges take."""
    frozen = programs.frozen_copy(run, shape, mesh)
    reference = {} if run.lora.rank else {"params": frozen["params"]}
    judge = {key: leaf for key, leaf in frozen["params"].items() if key != "lm_head"}
    return reference, device_bytes((state, reference)) + reward_models(run) * device_bytes(judge)


def build_ppo(
    run: PPORun, shape: LlamaConfig, mesh: Mesh, lengths: Lengths, name: str, memory: float | None = None
) -> Program:
    """The program `name` of a run on devices of `memory` bytes; None: on those that are here."""
    config = run.step_config()
    run.check_sizes(batch_parts(mesh))
    model = programs.make_model(run, shape)
    variables = programs.trained(run, model, mesh)
    state = ppo.init_state(model, variables, config)
    reference, held = _held(run, shape, mesh, state)
    piece = run.rollout_batch_size or run.train.batch_size
    flops = ModelFlops.of(shape, run.lora)
    plays, packing = run.environment is not None, RolloutPacking(config, mesh, piece)
    if name == "train step":
        rollout = _rollout(run.train.batch_size, lengths, config, measured=True, plays=plays)
        rollout = packing.with_updates(rollout, 0)
        step, arguments, count = ppo.jit_train_step(config, mesh), (state, rollout), _update(run, flops)
        pieces = config.minibatches * config.accumulate * batch_parts(mesh)
    elif name == "measure":
        _, (rollout,) = packing.pieces(_rollout(piece, lengths, config, measured=False, plays=plays))
        step, arguments, count = jit_measure(model, config, mesh), (state, reference, rollout), _measure(run, flops)
        pieces = batch_parts(mesh)
    elif name == "generate":
        # Of full episodes, the last turns in each call.
        lengths, group, turns = sampler_calls(run, lengths)
        often = run.train.batch_size // piece * turns
        how: dict[str, Any] = {"prompts": piece // group, "samples": group, "repeats": often}
        return sampler(run, model, state, mesh, lengths, flops, held=held, memory=memory, **how)
    else:
        raise InputError(f"ppo has no program {name}")
    work = preference_work(rollout.groups(config.group), 0, config.group)
    k = ppo.sharing(config, rollout.responses.shape[0], pieces)
    needed, computed = count(work, preference_work(rollout.groups(k), 0, k))
    repeats = run.train.batch_size // piece if name == "measure" else 1
    return Program.of(step, mesh, arguments, needed, computed, work.tokens, held=held, repeats=repeats)


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
    reference, held = _held(run, shape, mesh, state)
    piece, flops = run.rollout_batch_size or run.responses, ModelFlops.of(shape, run.lora)
    packing = GroupPacking(config.layout, mesh)
    if name == "train step":
        sums: dict[str, Any] = {"reference_logps": np.zeros((rows, 2), np.float32)}
        if run.online.exploration is not None:
            sums["logp_weights"] = np.zeros((rows, 2), np.float32)
        batch = programs.full_pairs(rows, 2, lengths, sampled=True, **sums)
        pair = preference_work(batch, 0, 2)
        needed = flops.training(pair)
        computed = needed + programs.again(flops, run.train.remat, pair) + programs.laid_apart(run, flops, batch)
        step = dpo.jit_train_step(config, mesh)
        batch = packing.whole(batch, config.accumulate)
        return Program.of(step, mesh, (state, batch), needed, computed, pair.tokens, held=held)
    if name == "measure":
        groups = programs.full_pairs(piece // k, k, lengths, sampled=True)
        work = preference_work(groups, 0, k)
        needed = flops.forward(work, adapted=False) + (flops.forward(work) if is_narrow(run.sample) else 0.0)
        step, repeats = jit_sums(model, config, mesh, narrow=is_narrow(run.sample)), run.responses // piece
        arguments = (state, reference, packing.pieces(groups, piece // k)[1][0])
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
    judge = Llama(teacher, dtype=kept, remat="none", attention=run.train.attention, lora=NO_LORA)
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


def sampler(
    run: SampledRun,
    model: Llama,
    state: Any,
    mesh: Mesh,
    lengths: Lengths,
    flops: ModelFlops,
    *,
    prompts: int,
    samples: int,
    repeats: int,
    held: float,
    memory: float | None,
) -> Program:
    """What samples `samples` responses to each of so many prompts at a time, `repeats` times in an iteration.

    The copy of the weights that it reads is there already (`sample/layout.py`); making it, once a rollout, is not
    counted.
    """
    policy = ppo.policy_of(state.variables)
    sample = layouts.resolved(run.sample, model, policy, mesh, held=held, limit=memory)
    sample = dataclasses.replace(sample, max_new_tokens=lengths.response)
    weights = prepared_shapes(model, policy, sample, mesh)
    held += device_bytes(weights.own) + (device_bytes(weights.prompt) if weights.layout == TENSOR else 0.0)
    work = preference_work(programs.full_pairs(prompts, samples, lengths, sampled=True), 0, samples)
    how: dict[str, Any] = {"config": sample, "samples": samples, "mesh": mesh}

    def lower() -> Any:
        return engine.lower(model, weights, rows=prompts, prompt=lengths.prompt, **how)

    needed = flops.forward(work)
    return Program(lower, needed, needed, work.tokens, held, trips=lengths.response - 1, repeats=repeats)


def sampler_calls(run: PPORun, lengths: Lengths) -> tuple[Lengths, int, int]:
    """What a call of the sampler is given and writes; responses to each of its prompts; calls for each rollout."""
    if run.environment is None:
        return lengths, run.ppo.group, 1
    new = min(run.sample.max_new_tokens, lengths.response)
    return Lengths(lengths.prompt + lengths.response - new, new), 1, run.settled.environment_turns


def _update(run: PPORun, flops: ModelFlops) -> Callable[[Work, Work], tuple[float, float]]:
    """As `flops.ppo_flops` counts the updates: the policy, and a separate value model's trunk.

    (work, the same as it is laid out) -> FLOPs that are needed, and those that are computed.
    """
    separate = run.ppo.critic == "separate"

    def passes(work: Work) -> float:
        trunk = dataclasses.replace(work, predicted=0.0)
        return run.ppo.passes * (flops.training(work) + (flops.training(trunk) if separate else 0.0))

    def count(work: Work, laid: Work) -> tuple[float, float]:
        twice = programs.again(flops, run.train.remat, laid) * (2 if separate else 1)
        return passes(work), passes(laid) + run.ppo.passes * twice

    return count


def _measure(run: PPORun, flops: ModelFlops) -> Callable[[Work, Work], tuple[float, float]]:
    """The reference, and what else is measured before the first update: the policy, and the values. As `_update`."""

    def forward(work: Work) -> float:
        trunk = dataclasses.replace(work, predicted=0.0)
        policy = flops.forward(work) if run.ppo.stores_old_logps else 0.0
        # A head on the policy's own trunk reads what the policy has computed.
        own = run.ppo.critic is not None and (run.ppo.critic == "separate" or not policy)
        values = flops.forward(trunk) if own else 0.0
        return flops.forward(work, adapted=False) + policy + values

    return lambda work, laid: (forward(work), forward(laid))


def _rollout(rows: int, lengths: Lengths, config: PPOConfig, *, measured: bool, plays: bool = False) -> Rollout:
    """Full responses to full prompts; `measured`: with what is stored before the first update; `plays`: episodes."""
    p, r = programs.round_up(lengths.prompt, programs.PROMPTS), lengths.response
    of_tokens, of_rows = np.zeros((rows, r), np.float32), np.zeros(rows, np.float32)
    arrays: dict[str, Any] = {
        "prompts": np.zeros((rows, p), np.int32),
        "prompt_lengths": np.full(rows, lengths.prompt, np.int32),
        "responses": np.zeros((rows, r), np.int32),
        "response_lengths": np.full(rows, r, np.int32),
        "ended": np.ones(rows, bool),
        "sampler_logps": of_tokens,
        "reference_logps": of_tokens,
        "values": of_tokens if measured and config.critic is not None else None,
        "scores": of_rows,
        "kl_coefficient": of_rows,
        "weights": np.ones(rows, np.float32),
        "rows": np.arange(rows, dtype=np.int32),
        "old_logps": of_tokens if measured and config.stores_old_logps else None,
        "own": np.ones((rows, r), bool) if plays else None,
        "step_scores": of_tokens if plays else None,
        "greedy_scores": of_rows if config.estimator == "greedy" else None,
    }
    return Rollout(**arrays)
