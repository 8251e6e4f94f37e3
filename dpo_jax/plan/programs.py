"""The compiled programs of a training command, made from shapes alone: nothing is read, nothing is allocated.

Batches are planned full: every prompt and response as long as they may be, every row real. Model FLOPs are counted as
`train/flops.py` counts them, and beside them what is computed: also what the backward pass makes again (logits; layers
with --train.remat full, with dots their attention), and prompts once for each response (--train.layout separate).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.align import dpo, reward, sft
from dpo_jax.config import (
    NO_LORA,
    DistillRun,
    DPORun,
    LoraConfig,
    OnlineDPORun,
    PPORun,
    RewardRun,
    SampledRun,
    SFTRun,
    TrainingRun,
)
from dpo_jax.data.sets.group_packing import Packing
from dpo_jax.data.sets.group_windows import plan_windows
from dpo_jax.data.sets.segment_views import SegmentViews
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.model.variables import abstract_variables, shardings
from dpo_jax.train.flops import ModelFlops, Work, dpo_flops, preference_work, reward_flops, sft_flops, token_work
from dpo_jax.train.row_data import packing_of, units_of
from dpo_jax.types import PreferenceBatch, TokenBatch
from dpo_jax.weights.huggingface.heads import as_reward_model

MULTIPLE = 16  # lengths of batches are rounded up to it, as `data/sets/batches.py` does
PROMPTS = 8  # prompts to sample responses to are padded to it, as `data/sets/prompts.py` does
SEQUENCES = 16  # in a packed window; how many changes nothing that counts
STEPS = 1000  # of a schedule whose run names no number: a constant in the program


@dataclass(frozen=True)
class Lengths:
    """Tokens of a planned row: a prompt and each of its responses; of a window of text, all in `response`."""

    prompt: int
    response: int


@dataclass(frozen=True)
class Program:
    """One program of a command.

    Attributes:
      lower: gives the `jax.stages.Lowered`.
      step: the jitted function itself; None for the sampler, which is called with prompts and a key.
      arguments: what it takes: trees of shapes with their places on the mesh, and last a batch of host arrays.
      flops: model FLOPs of one run, all devices together.
      computed: what is computed for them.
      tokens: real tokens of one run.
      held: bytes on each device while it runs, its own arguments among them; 0: those are all.
      trips: how often a loop runs whose length depends on data.
      repeats: how often it runs in one step of the command.
    """

    lower: Callable[[], Any]
    flops: float
    computed: float
    tokens: float
    held: float = 0.0
    trips: float = 1.0
    repeats: int = 1
    step: Any = None
    arguments: tuple[Any, ...] = ()

    @classmethod
    def of(
        cls,
        step: Any,
        mesh: Mesh,
        arguments: tuple[Any, ...],
        flops: float,
        computed: float,
        tokens: float,
        **more: Any,
    ) -> "Program":
        """The program of a jitted step."""
        *trees, batch = arguments

        def lower() -> Any:
            return step.lower(*trees, placed(mesh, batch))

        return cls(lower, flops, computed, tokens, step=step, arguments=arguments, **more)


def names(run: TrainingRun) -> tuple[str, ...]:
    """The programs that a command runs over and over, the training step first."""
    if isinstance(run, PPORun | OnlineDPORun):
        return "train step", "measure", "generate"
    samples = isinstance(run, DistillRun) and run.distill.on_policy > 0
    return ("train step", "generate") if samples else ("train step",)


def lengths_of(run: TrainingRun, prompt: int | None, response: int | None) -> Lengths:
    """What a full row of `run` is, unless the two say otherwise."""
    if isinstance(run, SFTRun):
        return Lengths(0, response or run.data.max_length)
    if isinstance(run, SampledRun):
        return Lengths(prompt or run.longest_prompt, response or run.response_room)
    longest = run.data.prompt_room(run.data.max_length) if prompt is None else prompt
    return Lengths(longest, run.data.max_length - longest if response is None else response)


def with_schedule(run: TrainingRun) -> TrainingRun:
    """The options with the length of the schedule filled in, as the data would."""
    total = run.optimizer.total_steps or run.train.steps or STEPS
    return dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, total_steps=total))


# ---------------------------------------------------------------- models


def make_model(run: TrainingRun, shape: LlamaConfig, lora: LoraConfig | None = None) -> Llama:
    """The model as `Training.load_model` makes it."""
    train = run.train
    return Llama(
        shape,
        dtype=jnp.dtype(train.dtype),
        remat=train.remat,
        attention=train.attention,
        lora=run.lora if lora is None else lora,
    )


def abstract(model: Llama, mesh: Mesh, dtype: Any) -> dict[str, Any]:
    """{"params": ...[, "adapters": ...]} as shapes with their places on `mesh`."""
    return jax.tree.map(
        lambda x, where: x.update(sharding=where), abstract_variables(model, dtype), shardings(model, mesh, dtype)
    )


def trained(run: TrainingRun, model: Llama, mesh: Mesh) -> dict[str, Any]:
    """What `Training.load_model` loads."""
    return abstract(model, mesh, run.train.settled.frozen_dtype if run.lora.rank else jnp.float32)


def frozen_copy(run: TrainingRun, shape: LlamaConfig, mesh: Mesh) -> dict[str, Any]:
    """A model that nothing trains."""
    return abstract(make_model(run, shape, NO_LORA), mesh, run.train.settled.frozen_dtype)


# ---------------------------------------------------------------- batches


def round_up(length: int, multiple: int = MULTIPLE) -> int:
    """`length` as a batch has it."""
    return -(-length // multiple) * multiple


def placed(mesh: Mesh, batch: Any) -> Any:
    """A batch of host arrays as shapes, their rows split over `mesh`."""

    def place(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.sharding(mesh, meshes.batch_axes(x.ndim)))

    return jax.tree.map(place, batch)


def full_pairs(
    rows: int,
    responses: int,
    lengths: Lengths,
    *,
    packing: Packing | None = None,
    sampled: bool = False,
    **more: Any,
) -> PreferenceBatch:
    """Groups of full prompts and responses; `more` arrays of a `PreferenceBatch`. `sampled`: as loaders of prompts and
    samplers lay them out, not those of pairs.
    """
    p = round_up(lengths.prompt, PROMPTS if sampled else MULTIPLE)
    r = lengths.response if sampled else round_up(lengths.response)
    arrays: dict[str, Any] = {
        "prompts": np.zeros((rows, p), np.int32),
        "prompt_lengths": np.full(rows, lengths.prompt, np.int32),
        "responses": np.zeros((rows, responses, r), np.int32),
        "response_lengths": np.full((rows, responses), lengths.response, np.int32),
        "weights": np.ones(rows, np.float32),
        "rows": np.arange(rows, dtype=np.int32),
    }
    if packing is not None:
        windows = plan_windows(
            arrays["prompt_lengths"], arrays["response_lengths"], batch_size=rows, packing=packing, buckets=1
        )
        more["windows"] = windows.pack(windows.arranged(np.arange(rows)))
    return PreferenceBatch(**arrays, **more)


def full_windows(rows: int, length: int, *, packed: bool) -> TokenBatch:
    """Windows of one sequence each, with room for the row numbers of several where they are packed."""
    t = round_up(length)
    arrays: dict[str, Any] = {
        "tokens": np.zeros((rows, t), np.int32),
        "segments": np.ones((rows, t), np.int32),
        "positions": np.tile(np.arange(t, dtype=np.int32), (rows, 1)),
        "targets": np.tile(np.arange(t) > 0, (rows, 1)),
        "rows": np.zeros((rows, SEQUENCES if packed else 1), np.int32),
    }
    return TokenBatch(**arrays)


# ---------------------------------------------------------------- what is computed


def again(model: ModelFlops, remat: str, work: Work) -> float:
    """FLOPs that the backward pass computes a second time: of the layers as `remat` says, of the logits always."""
    logits = 2.0 * model.head * work.predicted
    if remat in ("full", "offload"):
        return model.forward(dataclasses.replace(work, predicted=0.0)) + logits
    return logits + (model.attention * work.attended if remat == "dots" else 0.0)


def apart(batch: PreferenceBatch) -> Work:
    """The work of a batch whose prompts are computed once for each response."""
    parts = [preference_work(batch, k, k + 1) for k in range(batch.responses.shape[1])]
    return Work(*(sum(getattr(w, f.name) for w in parts) for f in dataclasses.fields(Work)))


def laid_apart(run: TrainingRun, flops: ModelFlops, batch: PreferenceBatch) -> float:
    """FLOPs that a step on pairs computes more where each response has its prompt to itself."""
    if run.train.layout != "separate":
        return 0.0
    pair, each = preference_work(batch, 0, 2), apart(batch)
    remat = run.train.remat
    return flops.training(each) - flops.training(pair) + again(flops, remat, each) - again(flops, remat, pair)


# ---------------------------------------------------------------- the commands


def build_dpo(run: DPORun, shape: LlamaConfig, mesh: Mesh, lengths: Lengths) -> Program:
    """The step of preference training."""
    config, rows = run.step_config(), run.train.batch_size
    objective = config.objective
    k = 4 if objective.loss == "kto" else 2  # of pairs, kto sees both mismatched
    more: Mapping[str, Any] = {}
    if objective.mask_format_tokens:
        more = {**more, "format_masks": np.zeros((rows, k, round_up(lengths.response)), bool)}
    if objective.reference == "cached" and not objective.reference_free:
        more = {**more, "reference_logps": np.zeros((rows, k), np.float32)}
    if "odpo" in objective.losses:
        more = {**more, "margins": np.ones(rows, np.float32)}
    packing = packing_of(objective.layout, mesh, k, accumulate=objective.accumulate, pairs=True)
    batch = full_pairs(rows, k, lengths, packing=packing, **more)
    model = make_model(run, shape)
    copied = objective.live and not run.lora.rank and not objective.moving
    reference = frozen_copy(run, shape, mesh) if copied else None
    state = dpo.init_state(model, trained(run, model, mesh), config, reference=reference)
    flops = ModelFlops.of(shape, run.lora)
    needed, pair = dpo_flops(flops, objective)(batch), preference_work(batch, 0, 2)
    plain = full_pairs(rows, 2, lengths)
    computed = needed + again(flops, run.train.remat, pair) + laid_apart(run, flops, plain)
    if run.train.layout == "separate":
        each = apart(plain)
        computed += (flops.forward(each, adapted=False) - flops.forward(pair, adapted=False)) if objective.live else 0.0
    return Program.of(dpo.jit_train_step(config, mesh), mesh, (state, batch), needed, computed, pair.tokens)


def build_reward(run: RewardRun, shape: LlamaConfig, mesh: Mesh, lengths: Lengths) -> Program:
    """The step of a reward model."""
    config, rows = run.step_config(), run.train.batch_size
    more: dict[str, Any] = {}
    if config.margin != "none":
        more["margins"] = np.zeros(rows, np.float32)
    if config.heads:
        more["labels"] = {
            head.name: np.zeros((rows, 2, len(head.classes)), np.int8)
            if head.overlapping
            else np.zeros((rows, 2), np.int32)
            for head in config.heads
        }
    packing = packing_of(config.layout, mesh, 2, accumulate=config.accumulate, pairs=False)
    batch = full_pairs(rows, 2, lengths, packing=packing, **more)
    language_model = make_model(run, shape)
    model, variables = as_reward_model(language_model, trained(run, language_model, mesh))
    state = reward.init_state(model, variables, config)
    flops = ModelFlops.of(model.config, run.lora, outputs=1)
    needed = reward_flops(flops)(batch)
    pair = dataclasses.replace(preference_work(batch, 0, 2), predicted=2.0 * rows)
    computed = needed + again(flops, run.train.remat, pair)
    if run.train.layout == "separate":
        each = dataclasses.replace(apart(batch), predicted=2.0 * rows)
        computed += flops.training(each) - flops.training(pair)
        computed += again(flops, run.train.remat, each) - again(flops, run.train.remat, pair)
    return Program.of(reward.jit_train_step(config, mesh), mesh, (state, batch), needed, computed, pair.tokens)


def build_sft(run: SFTRun, shape: LlamaConfig, mesh: Mesh, lengths: Lengths) -> Program:
    """The step of next-token training."""
    packed = run.data.documents != "joined" if run.data.kind == "text" else run.data.packing
    config = run.step_config(packed=packed)
    batch = full_windows(run.train.batch_size, lengths.response, packed=packed)
    units = units_of(mesh, run.train.accumulate, packed=packed)
    if units is not None:
        batch = SegmentViews.of_batches([batch], units).seen(batch)
    model = make_model(run, shape)
    state = sft.init_state(model, trained(run, model, mesh), config)
    negatives = config.drawn
    flops = ModelFlops.of(shape, run.lora, outputs=None if negatives is None else negatives + 1)
    needed, work = sft_flops(flops)(batch), token_work(batch)
    computed = needed + again(flops, run.train.remat, work)
    return Program.of(sft.jit_train_step(config, mesh), mesh, (state, batch), needed, computed, work.tokens)
