"""Zephyr's DPO with adapters, the numbers of the alignment handbook's QLoRA run, on weights that are not quantised.

Rank 128, alpha 128, 5e-6, else as configs/zephyr_handbook.py. The handbook quantises the frozen weights to 4 bits and
drops 5 % of the adapters' inputs; neither exists here, so this is LoRA without dropout and takes the memory of bfloat16
weights. Source: alignment-handbook 925acdf (2024).

    dpo-jax dpo configs/zephyr_qlora.py --model SFT_MODEL --data ULTRAFEEDBACK.jsonl --out runs/zephyr_lora
"""

from dpo_jax.config import derive

config = derive("zephyr_handbook", {"lora.rank": 128, "lora.alpha": 128.0, "optimizer.learning_rate": 5e-6})
