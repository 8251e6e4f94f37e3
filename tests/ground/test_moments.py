"""Optimizers whose moments are smaller than float32: against their libraries, layer by layer, and over devices."""

from functools import cache

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
from dpo_jax.moments import blocks

SMALL = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=16
)
LEAN = [
    {"mu_dtype": "bfloat16"},
    {"name": "adafactor"},
    {"name": "adafactor", "parameter_scale": True},
    {"name": "adamw_8bit"},
]


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
    init = jax.jit(rule.init)

    @jax.jit
    def update(own, state, g):
        changes, state = rule.update(g, state, own)
        return optax.apply_updates(own, changes), state

    def run(part):
        own = jax.tree.map(lambda x: np.asarray(x)[part], weights)
        state = init(own)
        for g in gradients:
            own, state = update(own, state, jax.tree.map(lambda x: np.asarray(x)[part], g))
        return own["params"]["layers"]

    for layer in range(4):
        alone = run(layer)
        for name in stack:
            np.testing.assert_allclose(ours[name][layer], alone[name], rtol=2e-5, atol=1e-6)
    assert not np.allclose(run(slice(None))["kernel"], ours["kernel"], rtol=0.01)


def test_what_has_no_effect_is_refused():
    for options, line in [
        ({"name": "adafactor", "b2": 0.9}, r"--optimizer\.b2 has no effect with --optimizer\.name adafactor"),
        ({"name": "adafactor", "mu_dtype": "bfloat16"}, r"--optimizer\.mu_dtype has no effect with"),
        ({"name": "adafactor", "eps": 1e-6}, r"--optimizer\.eps has no effect with .* which has --optimizer\.eps1"),
        ({"name": "adafactor", "eps2": 1e-2}, r"--optimizer\.eps2 has no effect without --optimizer\.parameter_scale"),
        ({"exponent": 0.8}, r"--optimizer\.exponent has no effect with --optimizer\.name adamw"),
        ({"name": "rmsprop", "mu_dtype": "bfloat16"}, r"--optimizer\.mu_dtype has no effect with"),
        ({"name": "adamw_8bit", "mu_dtype": "bfloat16"}, r"--optimizer\.mu_dtype has no effect with"),
        ({"name": "adamw_8bit", "decay": 0.9}, r"--optimizer\.decay has no effect with --optimizer\.name adamw_8bit"),
        ({"name": "adafactor", "exponent": 0.0}, r"--optimizer\.exponent 0\.0 must be positive"),
    ]:
        with pytest.raises(InputError, match=line):
            OptimizerConfig(**options)


# ---------------------------------------------------------------- 8-bit moments


def table(*, signed: bool) -> np.ndarray:
    """The 256 values as the paper builds them: decades, their bins' middles, 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *-middles] if signed else [*middles]
    return np.sort(values)


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.abs(np.asarray(x, np.float64)[..., None] - values).argmin(-1)


def in_tiles(x: np.ndarray, a: int = 16, b: int = 16) -> np.ndarray:
    """[n, m] -> [n/a, m/b, a b]."""
    n, m = x.shape
    return x.reshape(n // a, a, m // b, b).swapaxes(1, 2).reshape(n // a, m // b, a * b)


def spread(tiles: np.ndarray) -> np.ndarray:
    """[n/16, m/16] -> [n, m]."""
    return np.repeat(np.repeat(tiles, 16, 0), 16, 1)


encoded = jax.jit(blocks.encoded, static_argnames="signed")
decoded = jax.jit(blocks.decoded, static_argnames="signed")


def read_back(x: np.ndarray, *, signed: bool) -> np.ndarray:
    return np.asarray(decoded(encoded(jnp.asarray(x, jnp.float32), signed=signed), signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_bytes_stand_for_what_the_paper_says(signed):
    values = table(signed=signed)
    assert len(values) == 256
    every = blocks.Blocks(jnp.arange(256, dtype=jnp.uint8)[None], jnp.ones((1, 1)))
    np.testing.assert_allclose(decoded(every, signed=signed)[0], values, rtol=3e-7, atol=0)
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-1, 1, 2048), 10 ** rng.uniform(-8, 0, 1792) * rng.choice([-1, 1], 1792), values])
    x = (x if signed else np.abs(x)).astype(np.float32).reshape(16, 256)
    x[0, ::16] = 1.0  # each tile's largest
    got, wanted = np.asarray(encoded(jnp.asarray(x), signed=signed).codes), nearest(x, values)
    assert np.all(np.abs(values[got] - x) <= np.abs(values[wanted] - x) + 1e-6 * np.abs(x))
    assert np.mean(got != wanted) < 1e-3  # half way between two


def test_a_block_is_a_tile_of_256_where_it_can_be():
    for shape, tile in [
        ((4096, 11008), (16, 16)),
        ((4096, 8), (32, 8)),
        ((8, 4096), (8, 32)),
        ((4096, 1), (256, 1)),
        ((4096, 32001), (256, 1)),
        ((36, 4096), (4, 64)),
        ((5, 7), None),
    ]:
        assert blocks.tile_of(*shape) == tile
    x = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    scales = np.abs(in_tiles(x)).max(-1)
    np.testing.assert_array_equal(encoded(jnp.asarray(x), signed=True).scales, scales)
    assert np.all(np.abs(read_back(x, signed=True) - x) <= spread(scales) * 0.0071)  # half a bin of the widest decade
    assert not np.any(read_back(np.zeros((16, 16)), signed=True))


def test_dynamic_codes_err_less_than_linear_ones():
    """Of Adam's update m / sqrt(v), from moments whose sizes differ within a block as gradients' do (log-normal)."""
    rng = np.random.default_rng(0)
    size = np.exp(0.7 * rng.standard_normal((256, 256)))
    m, v = size * rng.standard_normal((256, 256)), size**2
    wanted = m / np.sqrt(v)

    def linear(x, levels):
        step = spread(np.abs(in_tiles(x)).max(-1)) / levels
        return np.round(x / step) * step

    def error(m_read, v_read):
        return np.abs(m_read / np.sqrt(np.maximum(v_read, v.min())) - wanted).mean() / np.abs(wanted).mean()

    dynamic, plain = error(read_back(m, signed=True), read_back(v, signed=False)), error(linear(m, 127), linear(v, 255))
    assert 3 * dynamic < plain


@pytest.mark.parametrize("stack", [(), (3,)])
def test_adamw_8bit_is_the_papers(stack):
    """Ten steps of a reference in numpy, a table and its nearest value, tile by tile; AdamW's are not far."""
    b1, b2, eps, rate, wd = 0.9, 0.95, 1e-8, 0.01, 0.1
    start = np.random.default_rng(5).standard_normal((*stack, 64, 96)).astype(np.float32)
    weights = {"params": {"kernel": jnp.asarray(start)}}
    gradients = noise(weights, 10)
    options = {"learning_rate": rate, "weight_decay": wd, "b2": b2, "clip_norm": None}
    ours = np.asarray(stepped(fresh(weights, name="adamw_8bit", **options), gradients).trainable["params"]["kernel"])
    plain = np.asarray(stepped(fresh(weights, **options), gradients).trainable["params"]["kernel"])

    def kept(x, values):
        largest = spread(np.abs(in_tiles(x)).max(-1))
        return values[nearest(x / largest, values)] * largest

    def reference(w, layer):
        m, v = np.zeros_like(w), np.zeros_like(w)
        for t, gradient in enumerate(gradients, 1):
            g = np.asarray(gradient["params"]["kernel"], np.float64).reshape(-1, 64, 96)[layer]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            w = w - rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + wd * w)
            m, v = kept(m, table(signed=True)), kept(v, table(signed=False))
        return w

    layers = start.reshape(-1, 64, 96).astype(np.float64)
    wanted = np.stack([reference(w, layer) for layer, w in enumerate(layers)]).reshape(start.shape)
    moved = np.linalg.norm(wanted - start)
    assert np.linalg.norm(ours - wanted) < 1e-3 * moved
    assert np.linalg.norm(ours - plain) < 0.1 * moved


def test_which_moments_are_8_bit():
    state = fresh(placed(0, 1), name="adamw_8bit")
    mu = optax.tree.get(state.opt_state, "mu")["params"]
    assert isinstance(mu["layers"]["mlp"]["up_proj"]["kernel"], blocks.Blocks)
    assert isinstance(mu["lm_head"]["kernel"], blocks.Blocks)
    for x in (mu["embed_tokens"]["embedding"], mu["norm"]["scale"], mu["layers"]["input_layernorm"]["scale"]):
        assert x.dtype == jnp.float32


def test_8_bit_moments_are_updated_a_layer_at_a_time():
    """Of a stack of 16 layers: in place, and beside them float32 moments of one layer of one matrix, not of all."""
    weights = {"params": {"layers": {name: {"kernel": jnp.ones((16, 128, 128))} for name in "ab"}}}
    state = fresh(weights, name="adamw_8bit", clip_norm=None)
    step = jax.jit(lambda state, g, keep: state.apply_gradients(g, finite=keep), donate_argnums=0)
    memory = step.lower(state, weights, jnp.asarray(True)).compile().memory_analysis()
    count = 2 * 16 * 128 * 128
    assert memory.alias_size_in_bytes >= 6 * count
    assert memory.temp_size_in_bytes <= 3 * 4 * count / 32


# ---------------------------------------------------------------- over devices


@cache
def placed(lora: int, devices: int):
    """Variables on one device, or on eight."""
    mesh = make_mesh(fsdp=1, devices=jax.devices()[:1]) if devices == 1 else make_mesh(fsdp=4, tensor=2)
    return model_variables.init_variables(llama.Llama(SMALL, lora=LoraConfig(rank=lora)), jax.random.key(0), mesh=mesh)


@cache
def noise_of(lora: int, devices: int):
    name = "adapters" if lora else "params"
    weights = {name: placed(lora, devices)[name]}
    like = jax.tree.map(lambda x: x.sharding, weights)
    return [jax.device_put(g, like) for g in noise(weights, 4)]


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("options", LEAN, ids=str)
def test_devices_change_an_update_by_rounding_only(options, lora):
    """Four updates on one device and on eight end nearer to each other than 1e-5 of their length; where a moment is
    rounded to less than float32, some of its numbers fall on the other side: 1e-3."""
    ends, starts = [], []
    for devices in (1, 8):
        state = fresh(placed(lora, devices), learning_rate=0.01, **options)
        starts.append(jax.device_get(state.trainable))
        ends.append(stepped(state, noise_of(lora, devices)))
    bound = 1e-5 if options.get("name") == "adafactor" else 1e-3
    for a, b, start in zip(*(jax.tree.leaves(x) for x in (*(e.trainable for e in ends), starts[0])), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= bound * np.linalg.norm(np.asarray(a) - start)


@pytest.mark.parametrize(
    ("options", "share"),
    [({}, 8), ({"mu_dtype": "bfloat16"}, 6), ({"name": "adafactor"}, 0.106), ({"name": "adamw_8bit"}, 2.587)],
    ids=str,
)
def test_bytes_of_moments(options, share):
    """Bytes a weight on one device; on 8 (fsdp 4, tensor 2) each holds next to an eighth of them. Of Adafactor's rows,
    which lie along one axis of the mesh, and columns, along the other, it holds a quarter or a half."""
    held = []
    for devices in (1, 8):
        state = fresh(placed(0, devices), **options)
        held.append(device_bytes(state.opt_state))
    weights = sum(x.size for x in jax.tree.leaves(state.trainable))
    assert 0.98 * share <= held[0] / weights <= share * 1.01
    assert held[1] <= 1.1 * held[0] / (2 if options.get("name") == "adafactor" else 8)
