"""DPO of a 7B Llama 2 with LoRA on one A100 of 80 GB.

The numbers of Tulu 2's DPO of Llama 2 (Ivison et al. 2023, arXiv 2311.10702): beta 0.1, a linear schedule with
10 % warm-up, batches of 32 pairs, 3 epochs, 2048 tokens; but adapters of rank 64 on frozen bfloat16 weights, which are
the reference too, and ten times the learning rate, 5e-6, as adapters want it (Biderman et al. 2024, arXiv 2405.09673).

    dpo-jax dpo configs/dpo_llama2_7b_lora_a100x1.py --model SFT_MODEL --data PAIRS.jsonl --out runs/aligned

What it needs there: `dpo-jax plan` with this file, --topology a100:1 --model_shape llama2_7b.
"""

from dpo_jax.config import (
    ON_COMMAND_LINE,
    DataConfig,
    DPOLossConfig,
    DPORun,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)

config = DPORun(
    model=ON_COMMAND_LINE,
    out=ON_COMMAND_LINE,
    dpo=DPOLossConfig(beta=0.1),
    lora=LoraConfig(rank=64),
    optimizer=OptimizerConfig(learning_rate=5e-6, schedule="linear", warmup_ratio=0.1, weight_decay=0.0),
    data=DataConfig(max_length=2048, max_prompt_length=1024),
    train=TrainConfig(batch_size=32, accumulate=32, epochs=3, dtype="bfloat16", remat="full"),
    mesh=MeshConfig(fsdp=1),
)
