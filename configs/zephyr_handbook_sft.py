"""Zephyr's SFT as the alignment handbook runs it since 2024: another batch than the paper's, one epoch.

Cosine schedule from 2e-5 with 10 % warm-up, batches of 128 windows of 2048 tokens, UltraChat 200k. The handbook put an
empty system message before every dialogue without one (its default until 2025), and so does this. Source:
alignment-handbook 925acdf.

    dpo-jax sft configs/zephyr_handbook_sft.py --model MISTRAL_7B --data ULTRACHAT_200K.jsonl --out runs/handbook_sft
"""

from dpo_jax.config import derive

config = derive("zephyr_dsft", {"train.batch_size": 128, "train.epochs": 1, "data.empty_system": True})
