"""DPO of a 7B Llama 2 with LoRA on one A100 of 80 GB: Tulu 2's numbers (2023), rank 64.

    dpo-jax dpo configs/dpo_llama2_7b_lora_a100x1.py --model SFT_MODEL --data PAIRS.jsonl --out runs/aligned

What it needs there: `dpo-jax plan` with this file, --topology a100:1 --model_shape llama2_7b.
"""

from dpo_jax.config import derive

config = derive("dpo_llama2_7b_lora_v5e8", {"train.accumulate": 32, "mesh.fsdp": 1})
