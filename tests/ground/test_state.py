"""The optimizer against PyTorch's, the schedules, and the layout of a fresh state."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import state as states
from dpo_jax.config import LoraConfig, OptimizerConfig
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh
from dpo_jax.model import llama, variables as model_variables
from dpo_jax.model.architecture import LlamaConfig

TINY = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)

# A kernel, which is decayed, and a norm scale, which is not.
START = {"layers": {"kernel": np.linspace(-1, 1, 12).reshape(3, 4), "scale": np.linspace(0.5, 1.5, 4)}}


def gradients(step: int) -> dict:
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape) * 10.0 ** (step % 3 - 1), START)


def ours(config: OptimizerConfig, steps: int) -> list[np.ndarray]:
    variables = {"params": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)}
    state = states.create(lambda: None, variables, states.make_optimizer(config))
    update = jax.jit(lambda state, grads: state.apply_gradients({"params": grads}))
    for step in range(steps):
        state = update(state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradients(step)))
    assert int(state.step) == steps
    return jax.tree.leaves(state.trainable)


def pytorchs(config: OptimizerConfig, steps: int) -> list[np.ndarray]:
    torch = pytest.importorskip("torch")
    kernel, scale = (torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in jax.tree.leaves(START))
    if config.name == "adamw":
        groups = [
            {"params": [kernel], "weight_decay": config.weight_decay or 0.0},
            {"params": [scale], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(config.b1 or 0.9, config.b2 or 0.999), eps=config.eps)
    else:
        optimizer = torch.optim.RMSprop([kernel, scale], alpha=config.decay or 0.99, eps=config.eps)
    schedule = states.learning_rate_schedule(config)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        for parameter, gradient in zip((kernel, scale), jax.tree.leaves(gradients(step)), strict=True):
            parameter.grad = torch.tensor(gradient)
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([kernel, scale], config.clip_norm)
        optimizer.step()
    return [kernel.detach().numpy(), scale.detach().numpy()]


@pytest.mark.parametrize(
    "options",
    [
        {"name": "adamw"},
        {"name": "adamw", "weight_decay": 0.1, "b1": 0.8, "b2": 0.95, "eps": 1e-3},
        {"name": "adamw", "weight_decay": 0.1, "clip_norm": None, "schedule": "cosine", "total_steps": 8, "floor": 0.1},
        {"name": "rmsprop"},
        {"name": "rmsprop", "decay": 0.9, "eps": 1e-3, "clip_norm": 10.0, "warmup_steps": 4},
    ],
    ids=str,
)
def test_optimizers_are_pytorchs(options):
    config = OptimizerConfig(learning_rate=0.05, **options)
    for a, b in zip(ours(config, 8), pytorchs(config, 8), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def updated(options: OptimizerConfig, updates: int):
    """A state, and the compiled function of so many updates of it, as PPO's step makes them."""
    kernels = {str(i): jax.random.normal(jax.random.key(i), (128, 128)) for i in range(8)}
    state = states.create(lambda: None, {"params": kernels}, states.make_optimizer(options))
    x = jax.random.normal(jax.random.key(9), (8, 128))

    def step(state, keep):
        def update(carry, x):
            gradients = jax.grad(lambda w: sum(jnp.sum(jnp.sin(x @ k)) for k in w["params"].values()))(carry[0])
            norm = optax.tree.norm(gradients)
            finite = keep & jnp.isfinite(norm)
            return states.apply_update(state.tx, gradients, *carry, keep=finite, rate=0.5), norm

        (trainable, opt_state), _ = jax.lax.scan(
            update, (state.trainable, state.opt_state), jnp.tile(x, (updates, 1, 1))
        )
        return dataclasses.replace(state, trainable=trainable, opt_state=opt_state)

    return state, jax.jit(step, donate_argnums=0).lower(state, jnp.asarray(True)).compile()


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize(
    ("options", "held", "gradients"),
    [
        ({"name": "adamw", "clip_norm": None}, 3, 1),
        ({"name": "adamw"}, 3, 2),
        ({"name": "adamw", "clip_norm": None, "mu_dtype": "bfloat16"}, 2.5, 1),
        ({"name": "rmsprop"}, 2, 1),
        ({"name": "adamw_8bit", "clip_norm": None}, 1.5, 3),
        ({"name": "adafactor", "clip_norm": None}, 1, 2),
        ({"name": "adafactor", "parameter_scale": True}, 1, 3),
    ],
    ids=str,
)
def test_an_update_is_made_in_place(options, held, gradients, updates):
    """Beside weights and moments there is the gradient, once more clipped for some, and Adafactor's update, whose size
    is looked at before it is made: no second copy of the others."""
    _, compiled = updated(OptimizerConfig(**options), updates)
    weights = 8 * 4 * 128 * 128
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= held * weights
    assert gradients * weights <= memory.temp_size_in_bytes < (gradients + 0.5) * weights


def test_an_update_that_is_not_kept_leaves_no_trace():
    state, compiled = updated(OptimizerConfig(learning_rate=0.1), 2)
    before = jax.device_get((state.trainable, state.opt_state))
    after = compiled(state, jnp.asarray(False))
    chex.assert_trees_all_equal(jax.device_get((after.trainable, after.opt_state)), before)
    after = compiled(after, jnp.asarray(True))
    counts = optax.tree_utils.tree_get_all_with_path(after.opt_state, "count")
    assert [int(count) for _, count in counts] == [2, 2]


def rates(steps: int, **options) -> np.ndarray:
    schedule = states.learning_rate_schedule(OptimizerConfig(learning_rate=2.0, **options))
    return np.asarray([schedule(i) for i in range(steps)])


def test_constant():
    np.testing.assert_allclose(rates(3), 2.0)


def test_warmup_is_the_dpo_authors():
    """(step + 1) / (warm-up + 1), then constant."""
    np.testing.assert_allclose(rates(6, warmup_steps=3), [0.5, 1.0, 1.5, 2.0, 2.0, 2.0], rtol=1e-6)


def test_a_least_warmup_beside_a_share():
    """Llama 2's reward models: 3 % of 100 steps are 3, and at least 5 are taken; of 400 they are 12."""
    ratio = {"warmup_ratio": 0.03, "warmup_min": 5}
    np.testing.assert_allclose(rates(7, total_steps=100, **ratio), np.minimum(np.arange(1, 8) / 6, 1) * 2, rtol=1e-6)
    np.testing.assert_allclose(rates(2, total_steps=400, **ratio), [2 / 13, 4 / 13], rtol=1e-6)
    with pytest.raises(InputError, match=r"lower --optimizer\.warmup_min"):
        rates(1, total_steps=5, **ratio)
    with pytest.raises(InputError, match=r"--optimizer\.warmup_min has no effect without --optimizer\.warmup_ratio"):
        OptimizerConfig(warmup_min=5)


def test_linear_with_warmup_and_floor():
    got = rates(9, schedule="linear", warmup_ratio=0.25, total_steps=8, floor=0.5)
    fall = 2 * (1 - 0.5 * np.arange(7) / 6)
    np.testing.assert_allclose(got, [2 / 3, 4 / 3, *fall], rtol=1e-6)
    np.testing.assert_allclose(rates(20, schedule="linear", total_steps=8)[8:], 0.0)


def test_cosine_with_floor():
    got = rates(11, schedule="cosine", total_steps=10, floor=0.1)
    np.testing.assert_allclose(got, 0.2 + 1.8 * 0.5 * (1 + np.cos(np.pi * np.arange(11) / 10)), rtol=1e-5)


def test_a_schedule_without_an_end_is_refused():
    with pytest.raises(InputError, match="total_steps"):
        states.learning_rate_schedule(OptimizerConfig(schedule="linear"))
    with pytest.raises(InputError, match="does not fit"):
        states.learning_rate_schedule(OptimizerConfig(warmup_steps=10, total_steps=10))


def _create(variables, **options):
    return states.create(lambda: None, variables, states.make_optimizer(OptimizerConfig(**options)))


def test_all_parameters_are_trained_in_float32():
    variables = model_variables.init_variables(llama.Llama(TINY), jax.random.key(0), dtype=jnp.bfloat16)
    state = _create(variables)
    assert set(state.trainable) == {"params"}
    assert state.frozen == {}
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    assert set(state.variables) == {"params"}


def test_only_adapters_are_trained_where_there_are_some():
    model = llama.Llama(TINY, lora=LoraConfig(rank=2))
    variables = model_variables.init_variables(model, jax.random.key(0), dtype=jnp.bfloat16)
    state = _create(variables)
    assert set(state.trainable) == {"adapters"}
    assert {x.dtype for x in jax.tree.leaves(state.frozen["params"])} == {jnp.dtype("bfloat16")}
    assert jax.tree.structure(state.variables) == jax.tree.structure(dict(variables))
    moments = optax.tree_utils.tree_get(state.opt_state, "mu")
    assert jax.tree.structure(moments) == jax.tree.structure(state.trainable)


@pytest.mark.parametrize(("name", "moments"), [("adamw", ["mu", "nu"]), ("rmsprop", ["nu"])])
@pytest.mark.parametrize("lora", [0, 4])
def test_moments_are_laid_out_like_their_parameters(name, moments, lora):
    mesh = make_mesh(fsdp=4, tensor=2)
    model = llama.Llama(TINY, lora=LoraConfig(rank=lora))
    state = _create(model_variables.init_variables(model, jax.random.key(0), mesh=mesh), name=name)
    shardings = jax.tree.map(lambda x: x.sharding, state.trainable)
    assert any(not s.is_fully_replicated for s in jax.tree.leaves(shardings))
    for moment in moments:
        tree = optax.tree_utils.tree_get(state.opt_state, moment)
        assert jax.tree.map(lambda x: x.sharding, tree) == shardings
        assert all(not np.any(x) for x in jax.tree.leaves(tree))
    assert state.step.sharding.is_fully_replicated
    assert len(state.step.sharding.device_set) == 8


@pytest.mark.parametrize(
    "options",
    [{}, {"mu_dtype": "bfloat16"}, {"name": "rmsprop"}, {"name": "adafactor"}, {"name": "adamw_8bit"}],
    ids=str,
)
def test_an_abstract_state_is_the_real_ones_outline(options):
    mesh = make_mesh(fsdp=8)
    model = llama.Llama(TINY)
    real = _create(model_variables.init_variables(model, jax.random.key(0), mesh=mesh), **options)
    abstract = _create(
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s),
            model_variables.abstract_variables(model),
            model_variables.shardings(model, mesh),
        ),
        **options,
    )

    def outline(tree):
        return [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(tree)]

    assert outline(abstract) == outline(real)
