"""Published models by their sizes, a family at least one, and the run that is planned for each.

For tests/plan/test_published_shapes.py and for the second table of docs/models.md (benchmarks/models.py).
"""

import json
from pathlib import Path
from typing import Any

from dpo_jax.config import DataConfig, DPORun, LoraConfig, MeshConfig, PlanRun, TrainConfig
from dpo_jax.model.families import FAMILIES

Sizes = tuple[int, int, int, int, int, int]

# vocabulary, width, MLP, layers, heads, key/value heads; what else config.json says; parameters
PUBLISHED: dict[str, tuple[str, Sizes, dict[str, Any], int]] = {
    "Llama-3.1-8B": ("llama", (128_256, 4096, 14_336, 32, 32, 8), {}, 8_030_261_248),
    "SmolLM2-135M": ("llama", (49_152, 576, 1536, 30, 9, 3), {"tie_word_embeddings": True}, 134_515_008),
    "Yi-6B": ("llama", (64_000, 4096, 11_008, 32, 32, 4), {}, 6_061_035_520),
    "zephyr-7b-beta": ("mistral", (32_000, 4096, 14_336, 32, 32, 8), {"sliding_window": 4096}, 7_241_732_096),
    "Qwen2.5-7B": ("qwen2", (152_064, 3584, 18_944, 28, 28, 4), {}, 7_615_616_512),
    "Qwen2.5-0.5B": ("qwen2", (151_936, 896, 4864, 24, 14, 2), {"tie_word_embeddings": True}, 494_032_768),
    "Qwen3-8B": ("qwen3", (151_936, 4096, 12_288, 36, 32, 8), {"head_dim": 128}, 8_190_735_360),
    "SmolLM3-3B": ("smollm3", (128_256, 2048, 11_008, 36, 16, 4), {"tie_word_embeddings": True}, 3_075_098_624),
    "Phi-3-mini-4k": ("phi3", (32_064, 3072, 8192, 32, 32, 32), {"sliding_window": 2047}, 3_821_079_552),
    "phi-4": ("phi3", (100_352, 5120, 17_920, 40, 40, 10), {}, 14_659_507_200),
    "Phi-4-mini": (
        "phi3",
        (200_064, 3072, 8192, 32, 24, 8),
        {"tie_word_embeddings": True, "partial_rotary_factor": 0.75},
        3_836_021_760,
    ),
    "gemma-7b": ("gemma", (256_000, 3072, 24_576, 28, 16, 16), {"head_dim": 256}, 8_537_680_896),
    "gemma-2-9b": ("gemma2", (256_000, 3584, 14_336, 42, 16, 8), {"head_dim": 256}, 9_241_705_984),
    "gemma-3-1b": ("gemma3_text", (262_144, 1152, 6912, 26, 4, 1), {"sliding_window": 512}, 999_885_952),
    "OLMo-2-1124-7B": ("olmo2", (100_352, 4096, 11_008, 32, 32, 32), {}, 7_298_617_344),
    "Olmo-3-1025-7B": ("olmo3", (100_278, 4096, 11_008, 32, 32, 32), {}, 7_298_011_136),
    "granite-3.1-8b": (
        "granite",
        (49_155, 4096, 12_800, 40, 32, 8),
        {"tie_word_embeddings": True, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
        8_170_848_256,
    ),
}


def planned(folder: Path, name: str) -> PlanRun:
    """DPO with LoRA on 8 devices, pairs of 4,096 tokens, for a folder with nothing but the published config.json in it.

    The row of a pair (7,168 tokens) is longer than every window.
    """
    family, (vocabulary, width, mlp, layers, heads, kv), more, _ = PUBLISHED[name]
    raw = {
        "model_type": family,
        "architectures": [FAMILIES[family].class_name(scores=False)],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": "gemma" in family,
        FAMILIES[family].activation: "gelu_pytorch_tanh" if "gemma" in family else "silu",
    }
    (folder / "config.json").write_text(json.dumps(raw | more))
    run = DPORun(
        model=str(folder),
        data=DataConfig("d", max_length=4096, max_prompt_length=1024),
        out="o",
        train=TrainConfig(batch_size=8, dtype="bfloat16", remat="full", layout="shared"),
        lora=LoraConfig(rank=8),
        mesh=MeshConfig(fsdp=8),
    )
    return PlanRun(topology="v5e:2x4", training=run)
