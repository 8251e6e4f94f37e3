"""DPO of a 7B Llama 2, all weights trained, on 16 chips of TPU v5e (a slice of 4 x 4): Tulu 2's numbers (2023).

    dpo-jax dpo configs/dpo_llama2_7b_v5e16.py --model SFT_MODEL --data PAIRS.jsonl --out runs/aligned

What it needs there: `dpo-jax plan` with this file, --topology v5e:4x4 --model_shape llama2_7b.
"""

from dpo_jax.config import derive

config = derive("dpo_llama2_7b_a100x8", {"train.accumulate": 2, "mesh.fsdp": 16})
