"""The attention seam against a reference written in numpy, token by token, for every layout and kernel."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data.sets.group_packing import Packing, pack_batch
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh, platform
from dpo_jax.model import attention, attention_splash, attention_xla
from dpo_jax.model.attention import AttentionMask, attend, choose_kernel
from dpo_jax.model.products import SAVED
from dpo_jax.plan.hardware import Topology
from dpo_jax.plan.worker import assumed_cudnn
from dpo_jax.types import PreferenceBatch


def qkv(seed, B, T, S, H, G, C, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((B, T, H, C), (B, S, G, C), (B, S, G, C))
    return tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))


def reference(q, k, v, visible):
    """float64 attention; visible is bool [B, T, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, H, C = q.shape
    out = np.zeros(q.shape)
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[2])
            for t in range(T):
                seen = np.flatnonzero(visible[b, t])
                scores = k[b, seen, g] @ q[b, t, h] / np.sqrt(C)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights / weights.sum() @ v[b, seen, g]
    return out


def visible_tokens(segments, prefix=None):
    segments = np.asarray(segments)
    T = segments.shape[1]
    block = np.zeros(T, int)
    if prefix is not None:
        P, K, R = prefix
        block[P:] = 1 + np.arange(K * R) // R
    seen = np.tril(np.ones((T, T), bool)) & ((block == 0)[None, :] | (block[:, None] == block[None, :]))
    return seen & (segments[:, :, None] == segments[:, None, :])


def lengths_to_segments(lengths, T):
    return (np.arange(T) < np.asarray(lengths)[:, None]).astype(np.int32)


def prefix_segments(prompt_lengths, response_lengths, prefix):
    P, _, R = prefix
    parts = [lengths_to_segments(prompt_lengths, P)]
    parts += [lengths_to_segments(column, R) for column in np.asarray(response_lengths).T]
    return np.concatenate(parts, axis=1)


PREFIX = (7, 3, 5)
LAYOUTS = {
    "causal": (AttentionMask(), np.ones((2, 22), np.int32)),
    "padded": (None, lengths_to_segments([22, 9], 22)),
    "packed": (None, np.repeat([[1, 2, 3, 0], [5, 1, 1, 0]], [8, 9, 4, 1], axis=1).astype(np.int32)),
    "prefix": (AttentionMask(prefix=PREFIX), np.ones((2, 22), np.int32)),
    "prefix padded": (None, prefix_segments([7, 3], [[5, 1, 4], [2, 0, 5]], PREFIX)),
}


def layout(name):
    mask, segments = LAYOUTS[name]
    prefix = PREFIX if name.startswith("prefix") else None
    if mask is None:
        mask = AttentionMask(segments=jnp.asarray(segments), prefix=prefix)
    return mask, visible_tokens(segments, prefix), segments > 0


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_xla_equals_reference(name, groups):
    mask, visible, real = layout(name)
    q, k, v = qkv(0, 2, 22, 22, 4, groups, 8)
    out = jax.jit(lambda q, k, v: attend(q, k, v, mask=mask, kernel="xla"))(q, k, v)
    np.testing.assert_allclose(np.asarray(out)[real], reference(q, k, v, visible)[real], atol=2e-6)
    chex.assert_tree_all_finite(out)


BLOCKS = {
    "causal": AttentionMask(),
    "padded": AttentionMask(segments=jnp.asarray(lengths_to_segments([22, 9], 22))),
    "packed": AttentionMask(segments=jnp.asarray(LAYOUTS["packed"][1])),
    "window": AttentionMask(window=5, at=jnp.broadcast_to(jnp.arange(22), (2, 22))),
    "cached": AttentionMask(positions=jnp.arange(22)[None] + jnp.asarray([[0], [3]])),
    "cached window": AttentionMask(
        positions=jnp.arange(22)[None] + jnp.asarray([[0], [3]]),
        window=5,
        at=jnp.arange(22)[None] + jnp.asarray([[0], [3]]),
    ),
}


def slots_of(mask):
    return 25 if mask.positions is not None else 22


@functools.cache
def one_softmax(name, cap):
    """What the plain formula gives, and its gradients by autodiff."""
    mask = BLOCKS[name]
    slots = np.arange(slots_of(mask))
    t = np.arange(22)[None] if mask.positions is None else np.asarray(mask.positions)
    visible = slots <= t[..., None]
    if mask.segments is not None:
        segments = np.asarray(mask.segments)
        visible = visible & (segments[:, :, None] == segments[:, None])
    if mask.window is not None:
        visible = visible & (t[..., None] - slots < mask.window)

    def plain(q, k, v):
        scores = jnp.einsum("btgmc,bsgc->bgmts", q.reshape(2, 22, 2, 2, 8), k) / np.sqrt(8)
        scores = scores if cap is None else cap * jnp.tanh(scores / cap)
        weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf))
        return jnp.einsum("bgmts,bsgc->btgmc", weights, v).reshape(q.shape)

    return both(plain, slots_of(mask))


def both(f, slots):
    """f of some queries, keys and values, and the gradients of a sum over it: one program."""
    return jax.jit(lambda *x: (f(*x), jax.grad(_sine(f), (0, 1, 2))(*x)))(*qkv(0, 2, 22, slots, 4, 2, 8))


@pytest.mark.parametrize("scores", [2**29, 2**10], ids=["at once", "by queries"])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_xla_and_their_gradients_equal_one_softmax(name, cap, scores, monkeypatch):
    """Several blocks, several pieces of a block, and a gradient of its own, against autodiff of the plain formula."""
    monkeypatch.setattr(attention_xla, "QUERIES", 4)
    monkeypatch.setattr(attention_xla, "MOST_BLOCKS", 3)
    monkeypatch.setattr(attention_xla, "SCORES", scores)
    mask = BLOCKS[name]

    def ours(q, k, v):
        k, v = (x.swapaxes(1, 2) if mask.positions is not None else x for x in (k, v))
        return attend(q, k, v, mask=mask, kernel="xla", cap=cap)

    (out, gradients), (expected, theirs) = both(ours, slots_of(mask)), one_softmax(name, cap)
    chex.assert_trees_all_close(out, expected, atol=2e-6)
    chex.assert_trees_all_close(gradients, theirs, atol=5e-6)


def _sine(f):
    return lambda q, k, v: jnp.sum(jnp.sin(f(q, k, v)))


def test_bfloat16_gradients_of_xla_are_no_further_off_than_roundings(monkeypatch):
    """Each within 1 % of float32's: q, k, v, weights and slopes are rounded, sums are not."""
    monkeypatch.setattr(attention_xla, "QUERIES", 16)
    f = jax.jit(jax.grad(_sine(functools.partial(attend, mask=AttentionMask(), kernel="xla")), (0, 1, 2)))
    narrow = qkv(3, 2, 64, 64, 4, 2, 32, jnp.bfloat16)
    for found, exact in zip(f(*narrow), f(*(x.astype(jnp.float32) for x in narrow)), strict=True):
        assert found.dtype == jnp.bfloat16
        assert jnp.linalg.norm((found - exact).ravel()) < 0.01 * jnp.linalg.norm(exact.ravel())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_xla_attention_gives_is_kept_and_not_made_again(dtype):
    """Under the policy `dots` the backward pass has five products: scores once more, and four gradients."""
    policy = jax.checkpoint_policies.save_only_these_names(SAVED)
    f = jax.checkpoint(functools.partial(attend, mask=AttentionMask(), kernel="xla"), policy=policy)
    q, k, v = qkv(0, 1, 8, 8, 2, 1, 4, dtype)
    _, back = jax.vjp(f, q, k, v)
    assert str(jax.make_jaxpr(back)(q)).count("dot_general[") == 5


def test_cached_queries_see_the_slots_up_to_their_position():
    q, k, v = qkv(1, 3, 2, 10, 4, 2, 8)
    positions = jnp.array([[0, 1], [4, 5], [8, 9]])
    visible = np.arange(10) <= np.asarray(positions)[..., None]
    out = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask=AttentionMask(positions=positions), kernel="xla")
    np.testing.assert_allclose(out, reference(q, k, v, visible), atol=2e-6)


@pytest.mark.parametrize("name", ["padded", "packed", "prefix padded"])
def test_padding_has_no_effect_forwards_or_backwards(name):
    mask, _, real = layout(name)
    q, k, v = qkv(2, 2, 22, 22, 4, 2, 8)
    keep = jnp.asarray(real)[..., None, None]

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def f(q, k, v):
        return jnp.sum(jnp.where(keep, jnp.sin(attend(q, k, v, mask=mask, kernel="xla")), 0))

    value, gradients = f(*(jnp.where(keep, x, 1e4) for x in (q, k, v)))
    np.testing.assert_allclose(value, f(q, k, v)[0], rtol=1e-6)
    chex.assert_tree_all_finite(gradients)
    for gradient in gradients:
        assert not np.asarray(gradient)[~real].any()


def test_a_wrong_prefix_is_refused():
    q, k, v = qkv(0, 1, 12, 12, 2, 2, 4)
    with pytest.raises(ValueError, match="does not describe 12"):
        attend(q, k, v, mask=AttentionMask(prefix=(4, 2, 5)), kernel="xla")


@pytest.mark.parametrize("name", ["causal", "packed", "prefix", "prefix padded", "window"])
def test_splash_equals_xla(name):
    """In Pallas' interpreter: 22 tokens are padded to one block of 128."""
    mask, _, real = layout("packed" if name == "window" else name)
    if name == "window":  # positions begin anew with each segment, and a window of places means the same
        at = jnp.broadcast_to(jnp.arange(22), (2, 22))
        mask = dataclasses.replace(mask, window=4, at=at)
    q, k, v = qkv(3, 2, 22, 22, 4, 2, 8)
    keep = jnp.asarray(real)[..., None, None]

    @functools.partial(jax.jit, static_argnums=3)
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def f(q, k, v, kernel):
        return jnp.sum(jnp.where(keep, jnp.sin(attend(q, k, v, mask=mask, kernel=kernel, scale=0.3)), 0))

    chex.assert_trees_all_close(f(q, k, v, "splash"), f(q, k, v, "xla"), atol=1e-5, rtol=1e-5)


MASKS = {
    "causal": (attention_splash.Causal((768, 768)), lambda t, s: s <= t),
    "window": (attention_splash.Window(768, 200), lambda t, s: (s <= t) & (t - s < 200)),
    "window of one": (attention_splash.Window(768, 1), lambda t, s: s == t),
    **{
        f"shared {prefix}": (
            attention_splash.Shared(768, prefix),
            lambda t, s, p=prefix: (s <= t) & ((s < p[0]) | ((s - p[0]) // p[2] == (t - p[0]) // p[2])),
        )
        for prefix in ((128, 2, 256), (100, 3, 200), (16, 5, 150), (700, 1, 60))
    },
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_splash_block_by_block(name):
    """Blocks said to be empty or full are, and all others are as the definition has them."""
    mask, visible = MASKS[name]
    whole = np.broadcast_to(visible(np.arange(768)[:, None], np.arange(768)[None, :]), (768, 768))
    for block in (64, 96, 128, 256, 768):
        for t in range(0, 768, block):
            for s in range(0, 768, block):
                part = slice(t, t + block), slice(s, s + block)
                np.testing.assert_array_equal(mask[part], whole[part], err_msg=f"{name} {part}")


def test_a_mask_of_a_quarter_million_tokens_builds_few_blocks(monkeypatch):
    """What JAX does with a mask looks at each of its 230,400 blocks several times; all but the mixed ones are free."""
    mask, built = attention_splash.Shared(245_760, (16_384, 2, 114_688)), []
    monkeypatch.setattr(np, "arange", lambda *args, real=np.arange: built.append(args) or real(*args))
    row = [mask[slice(t, t + 512), slice(s, s + 512)] for t in (0, 131_072, 245_248) for s in range(0, 245_760, 512)]
    assert len({id(block) for block in row}) == 2 + 3  # all empty, all full, and one on the diagonal of each row
    assert len(built) == 2 * 3


def places(segments, prefix=None):
    """int32 [B, T]: where each token stands in its sequence; a response begins behind the prompt's real tokens."""
    at = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    if prefix is None:
        return at
    P, _, R = prefix
    return np.where(at < P, at, np.sum(segments[:, :P] != 0, axis=1)[:, None] + (at - P) % R)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("name", ["padded", "prefix padded"])
def test_cudnn_equals_xla(name, window, monkeypatch):
    """All of the cuDNN path but the kernel, in whose place XLA computes causal, right-padded rows with a window."""
    in_place = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, implementation, **options: in_place(*args, **options)
    )
    mask, _, real = layout(name)
    if window is not None:
        at = jnp.asarray(places(np.asarray(mask.segments), mask.prefix), jnp.int32)
        mask = dataclasses.replace(mask, window=window, at=at)
    q, k, v = qkv(5, 2, 22, 22, 4, 2, 8)
    keep = jnp.asarray(real)[..., None, None]

    @functools.partial(jax.jit, static_argnums=3)
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def f(q, k, v, kernel):
        return jnp.sum(jnp.where(keep, jnp.sin(attend(q, k, v, mask=mask, kernel=kernel, scale=0.3)), 0))

    chex.assert_trees_all_close(f(q, k, v, "cudnn"), f(q, k, v, "xla"), atol=1e-5, rtol=1e-5)


def packed_groups():
    """Windows of 40 places with two groups of prompts (5, 3) and responses (4, 2; 6, 0), and their segments-like truth.

    (mask, visible [2, 40, 40], real [2, 40]), the second window with the responses the other way round.
    """
    prompts, ids = np.array([5, 3, 5, 3], np.int32), np.zeros((4, 5), np.int32)
    lengths = np.array([[4, 2], [6, 0], [2, 4], [0, 6]], np.int32)
    batch = PreferenceBatch(ids, prompts, np.zeros((4, 2, 6), np.int32), lengths, np.ones(4, np.float32), ids[:, 0])
    (windows,) = pack_batch(batch, Packing(2, multiple=40)).windows
    visible = np.zeros((2, 40, 40), bool)
    for w in range(2):
        start = 0
        for p, row in zip(prompts[2 * w :], lengths[2 * w : 2 * w + 2], strict=False):
            prompt = np.arange(start, start + p)
            at = start + p
            for r in row:
                own = np.arange(at, at + r)
                for i, t in enumerate([*prompt, *own]):
                    visible[w, t, [*prompt, *own][: i + 1]] = True
                at += r
            start = at
    return AttentionMask(views=windows.views), visible, windows.real


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kernel", ["xla", "cudnn", "splash"])
def test_packed_groups_equal_the_reference_in_every_kernel(kernel, window, monkeypatch):
    """cuDNN's by XLA's causal, right-padded rows in its place; what is not a number at padding stays there."""
    in_place = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, implementation, **options: in_place(*args, **options)
    )
    mask, visible, real = packed_groups()
    if window is not None:
        mask = dataclasses.replace(mask, window=window)
        for w, t in np.argwhere(real):
            seen = np.flatnonzero(visible[w, t])
            visible[w, t, seen[:-window]] = False
    assert real.sum() == 2 * (5 + 4 + 2 + 3 + 6)
    q, k, v = (jnp.where(real[..., None, None], x, jnp.nan) for x in qkv(7, 2, 40, 40, 4, 2, 8))
    out, back = jax.jit(
        lambda q, k, v: (lambda f: (f(q, k, v), jax.vjp(f, q, k, v)[1](jnp.cos(jnp.ones(q.shape)))))(
            lambda q, k, v: attend(q, k, v, mask=mask, kernel=kernel)
        )
    )(q, k, v)
    clean = [np.where(real[..., None, None], x, 0) for x in (q, k, v)]
    np.testing.assert_allclose(
        np.asarray(out)[real], reference(*clean, visible | np.eye(40, dtype=bool))[real], atol=2e-6
    )
    assert not np.asarray(out)[~real].any()
    scale = 1 / np.sqrt(8)

    def plain(q, k, v):
        scores = scale * jnp.einsum("bthc,bshc->bhts", q, jnp.repeat(k, 2, axis=2))
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30), axis=-1)
        return jnp.where(real[..., None, None], jnp.einsum("bhts,bshc->bthc", weights, jnp.repeat(v, 2, axis=2)), 0)

    expected = jax.vjp(plain, *map(jnp.asarray, clean))[1](jnp.cos(jnp.ones(q.shape)))
    chex.assert_trees_all_close(back, expected, atol=1e-5)


def test_cudnn_is_told_the_window_and_the_lengths():
    """Lowered for a GPU that is not here, forwards and backwards: cuDNN counts a token itself, as `window` does."""
    segments = jnp.ones((2, 256), jnp.int32)
    at = jnp.broadcast_to(jnp.arange(256), (2, 256))
    mask = AttentionMask(segments=segments, packed=False, window=100, at=at)
    q, k, v = qkv(6, 2, 256, 256, 4, 2, 64, jnp.bfloat16)

    def f(q, k, v):
        return jnp.sum(attend(q, k, v, mask=mask, kernel="cudnn").astype(jnp.float32))

    with assumed_cudnn(Topology.parse("h100:1")), jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        text = jax.jit(jax.grad(f)).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"cudnn\$(\w+)", text) == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    assert re.findall(r"sliding_window_length\\22: (\d+)", text) == ["100", "100"]
    assert re.findall(r"mask_type\\22: \\22(\w+)", text) == ["PADDING_CAUSAL"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared", "window", "shared, window"])
def test_splash_equals_xla_over_several_blocks_and_devices(name):
    """700 tokens make 6 blocks of 128, on a mesh that splits rows and heads; a window of 150 reaches over two."""
    prefix = (300, 2, 200) if "shared" in name else None
    segments = (
        lengths_to_segments([700, 333], 700)
        if prefix is None
        else prefix_segments([300, 150], [[200, 10], [64, 199]], prefix)
    )
    mask = AttentionMask(segments=jnp.asarray(segments), prefix=prefix)
    if "window" in name:
        mask = dataclasses.replace(mask, window=150, at=jnp.asarray(places(segments, prefix), jnp.int32))
    q, k, v = qkv(4, 2, 700, 700, 4, 2, 16)
    keep = (mask.segments > 0)[..., None, None]

    def f(q, k, v, mask, kernel):
        return jnp.sum(jnp.where(keep, jnp.sin(attend(q, k, v, mask=mask, kernel=kernel)), 0))

    step = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)), static_argnums=4)
    expected = step(q, k, v, mask, "xla")
    with jax.set_mesh(make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])):
        chex.assert_trees_all_close(step(q, k, v, mask, "splash"), expected, atol=2e-5, rtol=1e-5)


def choose(requested, platform, **changes):
    settings = {
        "prefix": False,
        "packed": False,
        "cached": False,
        "dtype": jnp.bfloat16,
        "head_dim": 128,
        "length": 256,
    }
    return choose_kernel(requested, platform, **(settings | changes))


@pytest.mark.parametrize(
    ("platform", "changes", "kernel"),
    [
        ("cpu", {}, "xla"),
        ("tpu", {}, "splash"),
        ("tpu", {"prefix": True, "packed": True}, "splash"),
        ("tpu", {"cached": True}, "xla"),
        ("tpu", {"dtype": jnp.float32}, "xla"),
        ("gpu", {}, "cudnn"),
        ("gpu", {"prefix": True}, "cudnn"),
        ("gpu", {"prefix": True, "packed": True}, "xla"),
        ("gpu", {"packed": True}, "xla"),
        ("gpu", {"cached": True}, "xla"),
        ("gpu", {"dtype": jnp.float32}, "xla"),
        ("gpu", {"head_dim": 256}, "xla"),
        ("gpu", {"head_dim": 256, "device": "NVIDIA A100-SXM4-80GB"}, "xla"),
        ("gpu", {"head_dim": 256, "device": "NVIDIA B200"}, "xla"),
        ("gpu", {"head_dim": 256, "device": "NVIDIA H100 80GB HBM3"}, "cudnn"),
        ("gpu", {"head_dim": 256, "device": "NVIDIA GH200 480GB"}, "cudnn"),
        ("gpu", {"head_dim": 264, "device": "NVIDIA H200"}, "xla"),
    ],
)
def test_auto_takes_the_best_that_can_run(platform, changes, kernel):
    assert choose("auto", platform, **changes) == kernel


@pytest.mark.parametrize(
    ("kernel", "platform", "changes", "reason"),
    [
        ("splash", "cpu", {}, "TPU"),
        ("splash", "gpu", {}, "TPU"),
        ("splash", "tpu", {"dtype": jnp.float32}, "float32"),
        ("splash", "tpu", {"cached": True}, "cache"),
        ("cudnn", "cpu", {}, "NVIDIA"),
        ("cudnn", "gpu", {"packed": True}, "several segments"),
        ("cudnn", "gpu", {"head_dim": 100}, "multiples of 8"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_with_the_reason(kernel, platform, changes, reason):
    with pytest.raises(InputError, match=reason):
        choose(kernel, platform, **changes)


def test_the_choice_is_logged_once(monkeypatch):
    said = []
    monkeypatch.setattr(attention.logger, "info", said.append)
    attention._log_once.cache_clear()
    for _ in range(2):
        choose("auto", "tpu", prefix=True)
    assert len(said) == 1
    assert "splash" in said[0]
    assert "shared-prefix" in said[0]


def test_the_platform_is_that_of_the_mesh():
    assert platform() == "cpu"
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        assert platform() == "cpu"
