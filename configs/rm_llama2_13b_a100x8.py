"""A 13B reward model of Llama 2 on a node of 8 A100 of 80 GB: numbers (2023) of `llama2_rm_helpful.py`.

    dpo-jax reward configs/rm_llama2_13b_a100x8.py --model CHAT_MODEL --data PAIRS.jsonl --out runs/rm

What it needs there: `dpo-jax plan` with this file, --topology a100:8 --model_shape llama2_13b.
"""

from dpo_jax.config import derive

config = derive("rm_llama2_7b_v5e16", {"train.accumulate": 64, "mesh.fsdp": 8})
