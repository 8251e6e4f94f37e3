"""DPO of a 7B Llama 2 with LoRA on 8 chips of TPU v5e (a slice of 2 x 4).

The numbers of `dpo_llama2_7b_a100x8.py`; but adapters of rank 64 on frozen bfloat16 weights, which are the reference
too, and ten times the learning rate, 5e-6, as adapters want it (Biderman et al. 2024, arXiv 2405.09673).

    dpo-jax dpo configs/dpo_llama2_7b_lora_v5e8.py --model SFT_MODEL --data PAIRS.jsonl --out runs/aligned

What it needs there: `dpo-jax plan` with this file, --topology v5e:2x4 --model_shape llama2_7b.
"""

from dpo_jax.config import derive

config = derive("dpo_llama2_7b_a100x8", {"dpo.reference": "cached", "lora.rank": 64, "optimizer.learning_rate": 5e-6})
