"""PPO that two CPU cores can make: SmolLM2-135M learns to write kind reviews, judged by a sentiment lexicon.

The controlled-sentiment experiment of `dpo-jax demo` (Rafailov et al. 2023, section 6.1) with PPO in the place of DPO:
the model goes on with openings of reviews, VADER judges what it wrote. The numbers are ours, for so small a model.

    python -m dpo_jax.complete.openings > openings.jsonl
    dpo-jax ppo configs/smollm2_sentiment_ppo.py --data openings.jsonl --out runs/kind
"""

from dpo_jax.config import (
    ON_COMMAND_LINE,
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    OptimizerConfig,
    PPOLossConfig,
    PPORun,
    SampleConfig,
    TrainConfig,
)

config = PPORun(
    model="smollm2",
    out=ON_COMMAND_LINE,
    reward="vader",
    ppo=PPOLossConfig(epochs=2, minibatches=2, kl_coefficient=0.02, value="stopped"),
    sample=SampleConfig(max_new_tokens=24, temperature=0.8),
    lora=LoraConfig(rank=16),
    optimizer=OptimizerConfig(learning_rate=3e-4),
    data=DataConfig(template="raw", max_length=56, max_prompt_length=32),
    train=TrainConfig(batch_size=32, steps=40),
    checkpoint=CheckpointConfig(every=10),
)
