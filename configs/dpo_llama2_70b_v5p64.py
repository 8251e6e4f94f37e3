"""DPO of a 70B Llama 2, all weights trained, on 64 chips of TPU v5p (4 x 4 x 4): Tulu 2's numbers (2023).

    dpo-jax dpo configs/dpo_llama2_70b_v5p64.py --model SFT_MODEL --data PAIRS.jsonl --out runs/aligned

What it needs there: `dpo-jax plan` with this file, --topology v5p:4x4x4 --model_shape llama2_70b.
"""

from dpo_jax.config import derive

config = derive("dpo_llama2_7b_a100x8", {"train.accumulate": 1, "mesh.fsdp": 16, "mesh.tensor": 4})
