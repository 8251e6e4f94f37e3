"""DPO of a 7B Llama 2, all weights trained, on a node of 8 A100 of 80 GB.

The numbers of Tulu 2's DPO of Llama 2 (Ivison et al. 2023, arXiv 2311.10702): beta 0.1, a linear schedule from 5e-7
with 10 % warm-up, batches of 32 pairs, 3 epochs, 2048 tokens.

    dpo-jax dpo configs/dpo_llama2_7b_a100x8.py --model SFT_MODEL --data PAIRS.jsonl --out runs/aligned

What it needs there: `dpo-jax plan` with this file, --topology a100:8 --model_shape llama2_7b.
"""

from dpo_jax.config import OPEN, DataConfig, DPOLossConfig, DPORun, MeshConfig, OptimizerConfig, TrainConfig

config = DPORun(
    **OPEN,
    dpo=DPOLossConfig(beta=0.1, reference="live"),
    optimizer=OptimizerConfig(learning_rate=5e-7, schedule="linear", warmup_ratio=0.1, weight_decay=0.0),
    data=DataConfig(max_length=2048, max_prompt_length=1024),
    train=TrainConfig(batch_size=32, accumulate=4, epochs=3, dtype="bfloat16", remat="full"),
    mesh=MeshConfig(fsdp=8),
)
