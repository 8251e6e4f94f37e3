"""A 7B reward model of Llama 2 on 16 chips of TPU v5e (4 x 4): numbers (2023) of `llama2_rm_helpful.py`.

    dpo-jax reward configs/rm_llama2_7b_v5e16.py --model CHAT_MODEL --data PAIRS.jsonl --out runs/rm

What it needs there: `dpo-jax plan` with this file, --topology v5e:4x4 --model_shape llama2_7b.
"""

from dpo_jax.config import derive

config = derive(
    "llama2_rm_helpful",
    {"data.max_prompt_length": 2048, "train.accumulate": 32, "train.remat": "full", "mesh.fsdp": 16},
)
