"""Every family against `transformers`, on random small models with every flag set (tests/support/families.py).

Rows of `LENGTH` tokens cross every window and every original length of a RoPE; rows of 10 stay within the latter.
"""

import dataclasses
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CASES, LENGTH, TINY
from safetensors.numpy import load_file, save_file

import dpo_jax
from dpo_jax.config import LoraConfig, SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.model import attention, groups
from dpo_jax.model.architecture import from_hf, to_hf
from dpo_jax.model.cache import init_cache
from dpo_jax.model.llama import Llama
from dpo_jax.plan.shapes import parameters
from dpo_jax.sample import decode
from dpo_jax.types import PreferenceBatch
from dpo_jax.weights.huggingface import layout

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


# Through caches and shared prompts go windows, caps and RoPE; these two have them all, and the rest takes long.
_DEFAULT = ("gemma3", "smollm3")
long = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in _DEFAULT else pytest.mark.slow) for name in CASES], indirect=True
)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[str, Any, Path, Any, Any]:
    """Name, the model of `transformers`, its folder, and ours."""
    folder = tmp_path_factory.mktemp("family") / "published"
    reference = families.random_model(request.param, folder)
    model, variables = dpo_jax.load_pretrained(folder)
    return request.param, reference, folder, model, variables


def tokens(length: int, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(3, TINY["vocab_size"], (rows, length)).astype(np.int32)


def test_log_probabilities_equal(case) -> None:
    """1e-4 a token in float32; and a window, an original length or a position that is forgotten would show."""
    name, reference, _, model, variables = case
    scaling = model.config.rope_scaling
    shorter = (10,) if scaling is not None and scaling.follows_length else ()  # elsewhere the past alone decides
    for length in (*shorter, LENGTH):
        assert families.largest_error(reference, model, variables, tokens(length)) < 1e-4, (name, length)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_gradients_equal(case) -> None:
    """Of the mean log-probability of a row, over all weights, relative to the largest of each tensor."""
    name, reference, _, model, variables = case
    assert families.gradient_error(reference, model, variables, tokens(LENGTH)) < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_near_as_in_transformers(case: str, tmp_path: Path) -> None:
    """Mean error of log-probabilities against float32, over random models; of one model it may be a tenth larger."""
    ratios = [ours / theirs for ours, theirs in families.bfloat16_errors(case, tmp_path)]
    assert statistics.median(ratios) <= 1
    assert max(ratios) < 1.1


@long
def test_the_cache_equals_the_full_forward(case) -> None:
    """A prompt of 6 tokens, then one at a time, past every window; within the original length of a RoPE."""
    _, _, _, model, variables = case
    scaling = model.config.rope_scaling
    length = scaling.original_max_position if scaling is not None and scaling.follows_length else LENGTH
    row = jnp.asarray(tokens(length))
    whole = jax.jit(model.apply)(variables, row)

    @jax.jit
    def step(cache: Any, one: jax.Array, at: jax.Array) -> Any:
        return model.apply(variables, one, at, cache=cache)

    hidden, cache = step(init_cache(model.config, 1, LENGTH, jnp.float32), row[:, :6], jnp.arange(6)[None])
    found = [hidden]
    for i in range(6, length):
        hidden, cache = step(cache, row[:, i : i + 1], jnp.full((1, 1), i))
        found.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, atol=2e-4)


@long
def test_a_shared_prompt_equals_separate_rows(case) -> None:
    """Prompts of unequal lengths: windows go by positions, not by places in the row."""
    _, _, _, model, variables = case
    rng = np.random.default_rng(1)
    batch = PreferenceBatch(
        prompts=rng.integers(3, 64, (2, 8)).astype(np.int32),
        prompt_lengths=np.array([8, 3], np.int32),
        responses=rng.integers(3, 64, (2, 2, 7)).astype(np.int32),
        response_lengths=np.array([[7, 2], [5, 7]], np.int32),
        weights=np.ones(2, np.float32),
        rows=np.arange(2, dtype=np.int32),
    )
    batch = jax.tree.map(jnp.asarray, batch)
    logps = jax.jit(partial(groups.response_logps, model.apply), static_argnames="layout")
    separate = logps(variables, batch, layout="separate")
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.follows_length:
        assert 8 + 7 <= scaling.original_max_position < 8 + 2 * 7  # of a sequence, and of the row of both
        wide = jnp.pad(batch.prompts, ((0, 0), (0, scaling.original_max_position - 8)))
        with pytest.raises(InputError, match=r"set --train.layout separate"):
            logps(variables, dataclasses.replace(batch, prompts=wide), layout="shared")
    shared = logps(variables, batch, layout="shared")
    np.testing.assert_allclose(shared, separate, atol=1e-4)


def test_the_round_trip_is_exact(case, tmp_path: Path) -> None:
    """Written again: the same tensors, bit for bit, under the same names; a config.json that says the same."""
    name, reference, folder, model, variables = case
    dpo_jax.save_pretrained(tmp_path / "again", model, variables, None)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype, key
        assert value.tobytes() == after[key].tobytes(), key
    assert from_hf(to_hf(model.config)) == model.config
    again = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    assert again.architectures == reference.config.architectures
    assert _numbers(again) == _numbers(reference.config), name
    assert parameters(model.config) == sum(x.numel() for x in dict(reference.named_parameters()).values())


def _numbers(config: Any) -> dict[str, Any]:
    """What a configuration of `transformers` says of the model, its RoPE's fields beside the others."""
    free = {"transformers_version", "initializer_range", "use_cache", "_name_or_path", "max_window_layers"}
    free |= {"partial_rotary_factor"}  # beside the RoPE's fields too, for older readers
    flat = {key: value for key, value in config.to_dict().items() if key not in free}
    rope = flat.pop("rope_parameters")
    kinds = rope.items() if "full_attention" in rope else [("", rope)]
    filled = {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
        "type",
    }  # written out, where they were the usual ones
    flat |= {f"{kind}.{key}": value for kind, part in kinds for key, value in part.items() if key not in filled}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in flat.items()}


def test_adapters_on_every_kind_of_layer(case) -> None:
    """LoRA finds its targets."""
    _, _, _, model, _ = case
    lora = LoraConfig(rank=2)
    found = {key.split(".")[-3] for slot in layout.adapter_slots(Llama(model.config, lora=lora)) for key in slot.keys}
    assert found == set(lora.targets)


@pytest.mark.parametrize("case", ["phi3"], indirect=True)
def test_adapters_of_fused_matrices(case, tmp_path: Path) -> None:
    """Out to PEFT and back, to the bit; merged; and one that PEFT made, with one A for q, k and v, in."""
    peft = pytest.importorskip("peft")
    _, reference, folder, _, _ = case
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    row, lora = tokens(LENGTH, rows=2), LoraConfig(rank=2, alpha=3.0)
    with pytest.raises(InputError, match=r"names all of them or none, not q_proj v_proj alone"):
        dpo_jax.load_pretrained(folder, lora=LoraConfig(rank=2, targets=("q_proj", "v_proj")))
    model, variables = dpo_jax.load_pretrained(folder, lora=lora)
    key = jax.random.key(1)
    variables["adapters"] = jax.tree.map(lambda x: 0.3 * jax.random.normal(key, x.shape), variables["adapters"])
    assert families.largest_error(reference, model, variables, row) > 0.1
    dpo_jax.save_pretrained(tmp_path / "adapter", model, variables, None, source=folder, merge=False)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert families.largest_error(theirs, model, variables, row) < 1e-4
    again, loaded = dpo_jax.load_pretrained(tmp_path / "adapter")
    assert again.lora == lora
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    dpo_jax.save_pretrained(tmp_path / "merged", model, variables, None, source=folder)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert families.largest_error(merged.eval(), model, variables, row) < 1e-4

    raw = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(raw.read_text())
    raw.write_text(json.dumps(written | {"alpha_pattern": {}}))
    with pytest.raises(InputError, match=r"rank_pattern = .* is not supported"):
        dpo_jax.load_pretrained(tmp_path / "adapter")
    raw.write_text(json.dumps(written))
    dense = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    mixed = next(name for name in dense if "qkv_proj.lora_B" in name)
    dense[mixed] = dense[mixed] + 1
    save_file(dense, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="mixes its parts' ranks"):
        dpo_jax.load_pretrained(tmp_path / "adapter")

    options = {"r": 3, "lora_alpha": 5, "target_modules": ["qkv_proj", "down_proj"], "init_lora_weights": False}
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    theirs = peft.get_peft_model(plain, peft.LoraConfig(**options)).eval()
    theirs.save_pretrained(tmp_path / "shared")
    raw = tmp_path / "shared" / "adapter_config.json"
    raw.write_text(json.dumps(json.loads(raw.read_text()) | {"base_model_name_or_path": str(folder)}))
    model, variables = dpo_jax.load_pretrained(tmp_path / "shared")
    assert model.lora == LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "k_proj", "v_proj", "down_proj"))
    assert families.largest_error(theirs, model, variables, row) < 1e-4


SMALL = {**TINY, "attn_implementation": None}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported; supported are llama, mistral, qwen2"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "unknown key attn_logit_softcapping = 50.0"),
        ({"model_type": "qwen2", "hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "is not a list of 2 texts"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 1]}, "is not a list of 2 numbers 0 and 1"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling = 0 is not a number above 0"),
        ({"model_type": "olmo2", "clip_qkv": 8.0}, "unknown key clip_qkv = 8.0"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.4}, "rotates 3 channels of a head"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "RoPE's short_factor has 1 numbers for 4 pairs",
        ),
        ({"model_type": "qwen3", "rope_scaling": {"rope_type": "axial"}}, "RoPE scaling 'axial' is not supported"),
    ],
)
def test_what_no_field_expresses_is_one_clear_line(raw, message: str) -> None:
    with pytest.raises(InputError) as caught:
        from_hf({**SMALL, **raw})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


OLDER = {
    "gemma3_text": {"sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 7},
    "gemma": {"hidden_act": "gelu", "head_dim": 8},
    "phi3": {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
             "original_max_position_embeddings": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "smollm3": {"no_rope_layer_interval": 2, "rope_theta": 2e6, "use_sliding_window": False},
    "qwen2": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "olmo2": {"rope_theta": 5e5, "rope_scaling": None},
}  # fmt: skip


@pytest.mark.parametrize("model_type", OLDER)
def test_config_json_as_older_versions_wrote_it(model_type: str) -> None:
    """It is read as transformers' own class reads it today."""
    raw = {**SMALL, "num_hidden_layers": 4, "model_type": model_type, **OLDER[model_type]}
    del raw["attn_implementation"]
    today = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw))).to_dict()
    assert from_hf(raw) == from_hf({k: v for k, v in today.items() if not k.startswith("output_")})


def test_kernels_that_cannot_cap_are_refused() -> None:
    options = {"prefix": False, "packed": False, "cached": False, "dtype": jnp.bfloat16, "head_dim": 64, "length": 9}
    with pytest.raises(InputError, match="does not cap scores"):
        attention.choose_kernel("cudnn", "gpu", **options, cap=50.0)
    assert attention.choose_kernel("auto", "gpu", **options, cap=50.0) == "xla"
    assert attention.choose_kernel("auto", "tpu", **options, cap=50.0) == "splash"


def test_generation_stops_where_longrope_changes() -> None:
    longrope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    raw = {**SMALL, "model_type": "phi3", "rope_scaling": longrope, "original_max_position_embeddings": 16}
    with pytest.raises(InputError, match=r"of 16 tokens; lower max_new_tokens to at most 6"):
        decode.count_slots(Llama(from_hf(raw)), 10, SampleConfig(max_new_tokens=8))
