"""DPO of a 7B Llama 2 on one chip of TPU v5e (16 GB): QLoRA, adapters on weights frozen in 4 bits.

The numbers of `dpo_llama2_7b_lora_v5e8.py`, one pair at a time, the frozen weights in nf4 (Dettmers et al. 2023).

    dpo-jax dpo configs/dpo_llama2_7b_qlora_v5e1.py --model SFT_MODEL --data PAIRS.jsonl --out runs/aligned

What it needs there: `dpo-jax plan` with this file, --topology v5e:1x1 --model_shape llama2_7b.
"""

from dpo_jax.config import derive

config = derive(
    "dpo_llama2_7b_lora_v5e8",
    {"train.accumulate": 32, "train.frozen_dtype": "nf4", "train.remat": "full", "mesh.fsdp": 1},
)
