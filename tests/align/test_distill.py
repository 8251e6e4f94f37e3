"""Distillation against PyTorch's computation as TRL's GKDTrainer has it, and what its compiled step holds."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import make_batch, model_and_variables, quick_jit
from test_dpo_devices import shapes_of

from dpo_jax.align import distill
from dpo_jax.config import DistillStepConfig, OptimizerConfig
from dpo_jax.mesh import make_mesh, put_batch
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.divergence import generalised_js
from dpo_jax.types import PreferenceBatch

torch = pytest.importorskip("torch")
PADDED = LlamaConfig(
    vocab_size=72, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8
)
WIDE = LlamaConfig(
    vocab_size=389, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, clip_norm=None)


def of_trl(student, teacher, mask, beta: float, temperature: float):
    """TRL 1.16, GKDTrainer.generalized_jsd_loss, summed, a token."""
    kl = torch.nn.functional.kl_div
    q, p = (torch.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
    if beta == 0:
        found = kl(q, p, reduction="none", log_target=True)
    elif beta == 1:
        found = kl(p, q, reduction="none", log_target=True)
    else:
        b = torch.tensor(beta, dtype=q.dtype)
        mixture = torch.logsumexp(torch.stack([q + torch.log1p(-b), p + torch.log(b)]), dim=0)
        found = b * kl(mixture, p, reduction="none", log_target=True)
        found = found + (1 - b) * kl(mixture, q, reduction="none", log_target=True)
    return found[mask].sum() / mask.sum()


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.1, 0.7), (0.5, 2.0), (1.0, 1.0)])
def test_loss_and_gradient_equal_pytorchs(beta: float, temperature: float) -> None:
    rng = np.random.default_rng(0)
    student, teacher = (3 * rng.standard_normal((3, 7, 50)).astype(np.float32) for _ in range(2))
    mask = np.arange(7) < np.asarray([7, 2, 4])[:, None]
    q = torch.tensor(student, requires_grad=True)
    loss = of_trl(q, torch.tensor(teacher), torch.tensor(mask), beta, temperature)
    loss.backward()

    def ours(student):
        logps = (jax.nn.log_softmax(x / temperature, axis=-1) for x in (student, jnp.asarray(teacher)))
        return jnp.sum(jnp.where(mask, generalised_js(*logps, beta), 0.0)) / mask.sum()

    found, gradient = jax.value_and_grad(ours)(jnp.asarray(student))
    assert float(found) == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, q.grad.numpy(), atol=1e-5)


def batch_of(rows: int = 4) -> PreferenceBatch:
    batch = make_batch(rows)
    return dataclasses.replace(
        batch,
        responses=batch.responses[:, :1],
        response_lengths=batch.response_lengths[:, :1],
        format_masks=None,
        reference_logps=None,
    )


def both(config: LlamaConfig, teacher: LlamaConfig = PADDED, mesh=None):
    model, variables = model_and_variables(config, mesh=mesh)
    other, theirs = model_and_variables(teacher, seed=1, mesh=mesh)
    return model, variables, other, theirs


SPLIT = DistillStepConfig(beta=0.3, temperature=0.8, vocabulary=60, optimizer=OPTIMIZER, head_budget_bytes=2**12)
STUDENT = dataclasses.replace(PADDED, hidden_size=32, num_heads=4, num_kv_heads=4, vocab_size=64)


def test_the_step_is_that_of_whole_logits() -> None:
    """A teacher of another width and a longer padding; positions in chunks."""
    batch = batch_of(8)
    model, variables, other, theirs = both(STUDENT)
    lengths, most = batch.prompt_lengths, batch.prompts.shape[1] + batch.responses.shape[2]
    ids = np.zeros((8, most), np.int32)
    for row, own in enumerate(ids):
        own[: lengths[row]] = batch.prompts[row, : lengths[row]]
        own[lengths[row] : lengths[row] + batch.responses.shape[2]] = batch.responses[row, 0]

    def logits(model, variables):
        run = quick_jit(lambda variables, ids: model.apply(variables, model.apply(variables, ids), method="logits"))
        return torch.tensor(np.asarray(run(variables, ids))[:, :-1, :60])

    at = np.arange(most - 1)
    mask = (at >= lengths[:, None] - 1) & (at < lengths[:, None] - 1 + batch.response_lengths)
    wanted = of_trl(logits(model, variables), logits(other, theirs), torch.tensor(mask), 0.3, 0.8)
    state = distill.init_state(model, variables, theirs, SPLIT)
    _, metrics = quick_jit(distill.train_step, config=SPLIT, teacher=other.apply)(state, batch)
    assert float(metrics["loss"]) == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.slow
def test_micro_batches_and_devices_change_nothing() -> None:
    batch, found = batch_of(8), []
    split = dataclasses.replace(SPLIT, accumulate=2)
    for where, config in ((make_mesh(data=2, fsdp=2, tensor=1, devices=jax.devices()[:4]), split), (None, SPLIT)):
        where = make_mesh(devices=jax.devices()[:1]) if where is None else where
        model, variables, other, theirs = both(STUDENT, mesh=where)
        state = distill.init_state(model, variables, theirs, config)
        _, metrics = distill.jit_train_step(config, where, other.apply)(state, put_batch(where, batch))
        found.append({name: float(value) for name, value in metrics.items() if value.ndim == 0})
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_reverse_divergence_to_a_teacher_vanishes() -> None:
    """From another start on fixed texts; it is never negative, and 0 where student and teacher are one."""
    batch = batch_of()
    config = DistillStepConfig(optimizer=OptimizerConfig(learning_rate=2e-2))
    model, variables, other, theirs = both(PADDED)
    state = distill.init_state(model, variables, theirs, config)

    def run(state):
        return jax.lax.scan(
            lambda s, _: distill.train_step(s, batch, config=config, teacher=other.apply), state, None, 200
        )

    _, metrics = quick_jit(run)(state)
    assert float(metrics["loss"][0]) > 0.1
    assert 0 <= float(metrics["loss"][-1]) < 0.01 * float(metrics["loss"][0])
    same = distill.init_state(other, jax.tree.map(jnp.copy, theirs), theirs, config)
    _, metrics = quick_jit(distill.train_step, config=config, teacher=other.apply)(same, batch)
    assert float(metrics["loss"]) == pytest.approx(0, abs=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(0, abs=1e-4)


def test_no_array_of_batch_time_vocabulary() -> None:
    """Of neither model: no array of the compiled step, forwards or backwards, has so many elements."""
    batch = batch_of(6)
    rows, length = batch.responses.shape[0], batch.responses.shape[2]
    model, variables, other, theirs = both(WIDE, WIDE)
    config = DistillStepConfig(beta=0.5)
    state = distill.init_state(model, variables, theirs, config)
    step = quick_jit(distill.train_step, config=config, teacher=other.apply)
    shapes = shapes_of(step.lower(state, batch).compile().as_text())
    assert (WIDE.hidden_size, 389) in shapes or (389, WIDE.hidden_size) in shapes
    assert max(math.prod(s) for s in shapes if 389 in s) < rows * length * 389
