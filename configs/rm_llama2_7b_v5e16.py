"""A 7B reward model of Llama 2 on 16 chips of TPU v5e (a slice of 4 x 4).

The numbers of Llama 2's helpfulness reward model (Touvron et al. 2023, arXiv 2307.09288, section 3.2.2), which are
those of `llama2_rm_helpful.py`: one epoch, 1e-5, cosine to 10 %, warm-up 3 %, 512 pairs, small margins by `rating`.

    dpo-jax reward configs/rm_llama2_7b_v5e16.py --model CHAT_MODEL --data PAIRS.jsonl --out runs/rm

What it needs there: `dpo-jax plan` with this file, --topology v5e:4x4 --model_shape llama2_7b.
"""

from dpo_jax.config import (
    ON_COMMAND_LINE,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RewardLossConfig,
    RewardRun,
    TrainConfig,
)

config = RewardRun(
    model=ON_COMMAND_LINE,
    out=ON_COMMAND_LINE,
    reward=RewardLossConfig(margin="small"),
    optimizer=OptimizerConfig(
        learning_rate=1e-5,
        schedule="cosine",
        warmup_ratio=0.03,
        floor=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-5,
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    data=DataConfig(max_length=4096, max_prompt_length=2048),
    train=TrainConfig(batch_size=512, accumulate=32, epochs=1, dtype="bfloat16", remat="full"),
    mesh=MeshConfig(fsdp=16),
)
