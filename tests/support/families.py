"""Random small models of `transformers`, one a case, with every flag of their family set; norms and biases random too.

For tests/weights/test_families.py and for the table of docs/models.md (benchmarks/models.py).
"""

from functools import partial
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough that a wrong weight shows in the log-probabilities
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LENGTH = 24
"""Tokens of a test's rows: beyond every window and every original length below."""

SEEDS = 8
"""Random models of a case whose errors in bfloat16 are compared; those of one differ by a tenth and more."""

_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 3.0, 4.0],
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 0.75,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, dynamic NTK": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}, "max_position_embeddings": 16},
    ),
    "mistral, window": ("Mistral", {"sliding_window": 7, "head_dim": 16}),
    "qwen2, YaRN": ("Qwen2", {"rope_parameters": _YARN, "tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "attention_bias": True, "use_sliding_window": True, "sliding_window": 5,
                        "max_window_layers": 1}),
    "smollm3": (
        "SmolLM3",
        {"no_rope_layers": [1, 0], "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
         "use_sliding_window": True, "sliding_window": 6},
    ),
    "phi3": ("Phi3", {"sliding_window": 7}),
    "phi4-mini, longrope": (
        "Phi3",
        {"rope_parameters": _LONG, "original_max_position_embeddings": 16, "tie_word_embeddings": True},
    ),
    "gemma": ("Gemma", {"head_dim": 16, "attention_bias": True}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0, "attention_bias": True},
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7, "final_logit_softcapping": 3.0,
         "attention_bias": True, "layer_types": ["sliding_attention", "full_attention"],
         "rope_parameters": {"full_attention": {**_LINEAR, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "olmo3": (
        "Olmo3",
        {"attention_bias": True, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"],
         "rope_parameters": {"full_attention": _YARN,
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
    "granite": (
        "Granite",
        {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.3, "embedding_multiplier": 6.0,
         "residual_multiplier": 0.4, "logits_scaling": 3.0},
    ),
}  # fmt: skip


def configuration(case: str, options: dict[str, Any]) -> Any:
    """The small configuration of a case's family in `transformers`, with these options."""
    import transformers

    family = CASES[case][0]
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    return getattr(transformers, config_name)(**{**TINY, **options})


def random_model(case: str, path: Path, seed: int = 0) -> Any:
    """The random model of a case, float32, saved to the folder `path` too. Needs torch."""
    import torch
    import transformers

    family, options = CASES[case]
    config = configuration(case, options)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
            elif "norm" in name:
                weight.normal_(0 if "Gemma" in family else 1, 0.2)
    model.save_pretrained(path)
    return model


def largest_error(reference: Any, model: Any, variables: Any, tokens: Any) -> float:
    """Largest absolute difference of two models' log-probabilities, over all tokens of the vocabulary, on [B, T]."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    @jax.jit
    def logps(variables: Any, tokens: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(model.apply(variables, model.apply(variables, tokens), method="logits"), axis=-1)

    with torch.no_grad():
        theirs = torch.log_softmax(reference(torch.tensor(np.asarray(tokens, np.int64))).logits, -1).numpy()
    return float(np.abs(np.asarray(logps(variables, jnp.asarray(tokens, jnp.int32))) - theirs).max())


def bfloat16_errors(case: str, folder: Path, seeds: int = SEEDS) -> list[tuple[float, float]]:
    """Mean absolute error of log-probabilities in bfloat16 (weights too) against float32: ours, and `transformers`'.

    Over all tokens of the vocabulary, on 8 rows of `LENGTH` tokens; other weights (in `folder`) and rows each time.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    import dpo_jax

    @partial(jax.jit, static_argnums=0)
    def logps(model: Any, variables: Any, tokens: jax.Array) -> jax.Array:
        logits = model.apply(variables, model.apply(variables, tokens), method="logits")
        return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)

    found = []
    for seed in range(seeds):
        reference = random_model(case, folder, seed)
        tokens = np.random.default_rng(seed).integers(3, TINY["vocab_size"], (8, LENGTH))
        ids = torch.tensor(tokens)
        with torch.no_grad():
            exact = torch.log_softmax(reference(ids).logits, -1).numpy()
            theirs = torch.log_softmax(reference.to(torch.bfloat16)(ids).logits.float(), -1).numpy()
        model, variables = dpo_jax.load_pretrained(folder, dtype=jnp.bfloat16)
        ours = np.asarray(logps(model, variables, jnp.asarray(tokens, jnp.int32)))
        found.append((float(np.abs(ours - exact).mean()), float(np.abs(theirs - exact).mean())))
    return found


def gradient_error(reference: Any, model: Any, variables: Any, tokens: Any) -> float:
    """Largest difference of the gradients of the mean log-probability of tokens [B, T], over all weights.

    Relative to the largest gradient of the tensor, or of the embedding where that is larger.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from dpo_jax.model.logprobs import token_logps
    from dpo_jax.weights.huggingface import layout

    ids = torch.tensor(np.asarray(tokens, np.int64))
    reference.zero_grad()
    logps = torch.log_softmax(reference(ids).logits[:, :-1], -1)
    logps.gather(-1, ids[:, 1:, None]).mean().backward()
    theirs = {name: value.grad.numpy() for name, value in reference.named_parameters()}

    @jax.jit
    @jax.grad
    def ours(params: Any) -> jax.Array:
        own = {"params": params}
        hidden = model.apply(own, jnp.asarray(tokens, jnp.int32))[:, :-1]
        targets = jnp.asarray(tokens, jnp.int32)[:, 1:]
        return jnp.mean(token_logps(hidden, model.apply(own, method="unembedding"), targets))

    slots = layout.parameter_slots(model.config)
    floor = float(np.abs(theirs["model.embed_tokens.weight"]).max())
    values = layout.tensors(slots, ours(variables["params"]), np.float32)
    found = zip(layout.tensor_shapes(slots), values, strict=True)
    return max(float(np.abs(x - theirs[key]).max() / max(floor, np.abs(theirs[key]).max())) for key, x in found)
