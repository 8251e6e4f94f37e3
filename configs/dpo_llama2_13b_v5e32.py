"""DPO of a 13B Llama 2, all weights trained, on 32 chips of TPU v5e (4 x 8): Tulu 2's numbers (2023), as at 7B.

    dpo-jax dpo configs/dpo_llama2_13b_v5e32.py --model SFT_MODEL --data PAIRS.jsonl --out runs/aligned

What it needs there: `dpo-jax plan` with this file, --topology v5e:4x8 --model_shape llama2_13b.
"""

from dpo_jax.config import derive

config = derive("dpo_llama2_7b_a100x8", {"train.accumulate": 1, "mesh.fsdp": 32})
