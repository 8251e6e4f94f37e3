"""Optimizers whose moments are smaller than float32: against their libraries, layer by layer, and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import state as states
from dpo_jax.config import LoraConfig, OptimizerConfig
from dpo_jax.errors import InputError
from dpo_jax.mesh import device_bytes, make_mesh
from dpo_jax.model import llama, variables as model_variables
from dpo_jax.model.architecture import LlamaConfig

SMALL = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=16
)
LEAN = [{"mu_dtype": "bfloat16"}, {"name": "adafactor"}, {"name": "adafactor", "parameter_scale": True}]


def fresh(variables, **options):
    return states.create(lambda: None, variables, states.make_optimizer(OptimizerConfig(**options)))


def stepped(state, gradients):
    """The trained weights after one update along each of `gradients`, trees like `state.trainable`."""
    update = jax.jit(lambda state, g: state.apply_gradients(g))
    for g in gradients:
        state = update(state, g)
    return state


def noise(tree, steps: int, *, skewed: bool = True):
    """Gradients of `steps` steps, whose rows and columns have scales of their own."""
    rng = np.random.default_rng(0)

    def one(x):
        g = rng.standard_normal(x.shape)
        for axis in range(x.ndim if skewed else 0):
            shape = [-1 if i == axis else 1 for i in range(x.ndim)]
            g = g * np.exp(rng.standard_normal(x.shape[axis])).reshape(shape)
        return jnp.asarray(g, jnp.float32)

    return [jax.tree.map(one, tree) for _ in range(steps)]


def test_a_bfloat16_first_moment():
    """It is kept in bfloat16, the second in float32, and ten steps end within 1 % of their length of AdamW's."""
    weights = {"params": {"kernel": jnp.zeros((64, 128)), "scale": jnp.ones(64)}}
    gradients = noise(weights, 10)
    plain, lean = (
        stepped(fresh(weights, learning_rate=0.01, mu_dtype=dtype), gradients) for dtype in ("float32", "bfloat16")
    )
    assert {x.dtype for x in jax.tree.leaves(optax.tree.get(lean.opt_state, "mu"))} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(optax.tree.get(lean.opt_state, "nu"))} == {jnp.dtype("float32")}
    a, b, start = (np.asarray(s["params"]["kernel"]) for s in (plain.trainable, lean.trainable, weights))
    assert 0 < np.linalg.norm(a - b) < 0.01 * np.linalg.norm(a - start)


# ---------------------------------------------------------------- Adafactor


@pytest.mark.parametrize("parameter_scale", [None, True])
def test_adafactor_is_that_of_transformers(parameter_scale):
    torch = pytest.importorskip("torch")
    adafactor = pytest.importorskip("transformers").optimization.Adafactor
    rng = np.random.default_rng(1)
    start = {"kernel": rng.standard_normal((24, 40)), "scale": rng.standard_normal(24)}
    weights = {"params": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)}
    gradients = noise(weights, 10)
    options = {"learning_rate": 0.05, "clip_norm": None, "schedule": "linear", "total_steps": 20}
    ours = stepped(fresh(weights, name="adafactor", parameter_scale=parameter_scale, **options), gradients).trainable

    theirs = {name: torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for name, x in start.items()}
    optimizer = adafactor(
        theirs.values(), lr=1.0, scale_parameter=bool(parameter_scale), relative_step=False, warmup_init=False
    )
    schedule = states.learning_rate_schedule(OptimizerConfig(**options))
    for step, g in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = float(schedule(step))
        for name, x in theirs.items():
            x.grad = torch.tensor(np.asarray(g["params"][name], np.float64))
        optimizer.step()
    for name, x in theirs.items():
        np.testing.assert_allclose(ours["params"][name], x.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_adafactors_decay_and_clip_are_pytorchs():
    """torch.optim.Adafactor has relative steps only; weight decay is the learning rate's share, on matrices."""
    torch = pytest.importorskip("torch")
    start = np.random.default_rng(2).standard_normal((16, 8))
    weights = {"params": {"kernel": jnp.asarray(start, jnp.float32)}}
    gradients = noise(weights, 10)
    options = {"exponent": 0.7, "update_clip": 1.2, "weight_decay": 0.1, "learning_rate": 1e-2, "clip_norm": None}
    ours = stepped(fresh(weights, name="adafactor", parameter_scale=True, **options), gradients).trainable
    theirs = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = torch.optim.Adafactor([theirs], lr=1e-2, beta2_decay=-0.7, d=1.2, weight_decay=0.1, eps=(1e-15, 1e-3))
    for g in gradients:
        theirs.grad = torch.tensor(np.asarray(g["params"]["kernel"], np.float64))
        optimizer.step()
    np.testing.assert_allclose(ours["params"]["kernel"], theirs.detach().numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("parameter_scale", [None, True])
def test_adafactor_takes_each_layer_for_itself(parameter_scale):
    """optax's, of every layer alone, gives what ours makes of the stack; of the stack it would mix the layers."""
    rng = np.random.default_rng(3)
    sizes = np.array([0.01, 1, 10, 100])
    stack = {"kernel": sizes[:, None, None] * rng.standard_normal((4, 3, 5)), "scale": rng.standard_normal((4, 3))}
    weights = {"params": {"layers": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), stack)}}
    gradients = noise(weights, 5)
    options = {"learning_rate": 0.1, "clip_norm": None, "parameter_scale": parameter_scale}
    ours = stepped(fresh(weights, name="adafactor", **options), gradients).trainable["params"]["layers"]

    rule = optax.adafactor(0.1, min_dim_size_to_factor=1, multiply_by_parameter_scale=bool(parameter_scale))
    state = fresh(weights)

    def run(layer):
        own = jax.tree.map(lambda x: x[layer], weights)
        state = rule.init(own)
        for g in gradients:
            changes, state = rule.update(jax.tree.map(lambda x: x[layer], g), state, own)
            own = optax.apply_updates(own, changes)
        return own["params"]["layers"]

    for layer in range(4):
        alone = run(layer)
        for name in stack:
            np.testing.assert_allclose(ours[name][layer], alone[name], rtol=2e-5, atol=1e-6)

    state, whole = rule.init(weights), weights
    for g in gradients:
        changes, state = rule.update(g, state, whole)
        whole = optax.apply_updates(whole, changes)
    assert not np.allclose(whole["params"]["layers"]["kernel"], ours["kernel"], rtol=0.01)


def test_what_has_no_effect_is_refused():
    for options, line in [
        ({"name": "adafactor", "b2": 0.9}, r"--optimizer\.b2 has no effect with --optimizer\.name adafactor"),
        ({"name": "adafactor", "mu_dtype": "bfloat16"}, r"--optimizer\.mu_dtype has no effect with"),
        ({"name": "adafactor", "eps": 1e-6}, r"--optimizer\.eps has no effect with .* which has --optimizer\.eps1"),
        ({"name": "adafactor", "eps2": 1e-2}, r"--optimizer\.eps2 has no effect without --optimizer\.parameter_scale"),
        ({"exponent": 0.8}, r"--optimizer\.exponent has no effect with --optimizer\.name adamw"),
        ({"name": "rmsprop", "mu_dtype": "bfloat16"}, r"--optimizer\.mu_dtype has no effect with"),
        ({"name": "adafactor", "exponent": 0.0}, r"--optimizer\.exponent 0\.0 must be positive"),
    ]:
        with pytest.raises(InputError, match=line):
            OptimizerConfig(**options)


# ---------------------------------------------------------------- over devices


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("options", LEAN, ids=str)
def test_devices_change_an_update_by_rounding_only(options, lora):
    """Four updates on one device and on eight end nearer to each other than 1e-5 of their length; where a moment is
    rounded to less than float32, some of its numbers fall on the other side: 1e-3."""
    model = llama.Llama(SMALL, lora=LoraConfig(rank=lora))
    ends, starts = [], []
    for mesh in (make_mesh(fsdp=1, devices=jax.devices()[:1]), make_mesh(fsdp=4, tensor=2)):
        state = fresh(
            model_variables.init_variables(model, jax.random.key(0), mesh=mesh), learning_rate=0.01, **options
        )
        like = jax.tree.map(lambda x: x.sharding, state.trainable)
        starts.append(jax.device_get(state.trainable))
        ends.append(stepped(state, [jax.device_put(g, like) for g in noise(state.trainable, 4)]))
    bound = 1e-5 if options.get("name") == "adafactor" else 1e-3
    for a, b, start in zip(*(jax.tree.leaves(x) for x in (*(e.trainable for e in ends), starts[0])), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= bound * np.linalg.norm(np.asarray(a) - start)


@pytest.mark.parametrize(
    ("options", "share"), [({}, 8), ({"mu_dtype": "bfloat16"}, 6), ({"name": "adafactor"}, 0.106)], ids=str
)
def test_bytes_of_moments(options, share):
    """Bytes a weight on one device; on 8 (fsdp 4, tensor 2) each holds next to an eighth of them. Of Adafactor's rows,
    which lie along one axis of the mesh, and columns, along the other, it holds a quarter or a half."""
    model = llama.Llama(SMALL)
    held = []
    for mesh in (make_mesh(fsdp=1, devices=jax.devices()[:1]), make_mesh(fsdp=4, tensor=2)):
        state = fresh(model_variables.init_variables(model, jax.random.key(0), mesh=mesh), **options)
        held.append(device_bytes(state.opt_state))
    weights = sum(x.size for x in jax.tree.leaves(state.trainable))
    assert 0.98 * share <= held[0] / weights <= share * 1.01
    assert held[1] <= 1.1 * held[0] / (2 if options.get("name") == "adafactor" else 8)
