"""DPO of a 13B Llama 2, all weights trained, on a node of 8 A100 of 80 GB: Tulu 2's numbers (2023), as at 7B.

    dpo-jax dpo configs/dpo_llama2_13b_a100x8.py --model SFT_MODEL --data PAIRS.jsonl --out runs/aligned

What it needs there: `dpo-jax plan` with this file, --topology a100:8 --model_shape llama2_13b.
"""

from dpo_jax.config import derive

config = derive("dpo_llama2_7b_a100x8")
