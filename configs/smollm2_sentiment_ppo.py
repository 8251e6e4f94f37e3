"""PPO that two CPU cores can make: SmolLM2-135M learns to write kind reviews, judged by a sentiment lexicon.

The controlled-sentiment experiment of `dpo-jax demo` (Rafailov et al. 2023, section 6.1) with PPO in the place of DPO:
the model goes on with openings of reviews, VADER judges what it wrote. The numbers are ours, for so small a model.

    python -m dpo_jax.complete.writing.openings > openings.jsonl
    dpo-jax ppo configs/smollm2_sentiment_ppo.py --data openings.jsonl --out runs/kind
"""

from dpo_jax import config as c

config = c.PPORun(
    model="smollm2",
    out=c.ON_COMMAND_LINE,
    reward="vader",
    ppo=c.PPOLossConfig(epochs=2, minibatches=2, kl_coefficient=0.02, value="stopped"),
    sample=c.SampleConfig(max_new_tokens=24, temperature=0.8),
    lora=c.LoraConfig(rank=16),
    optimizer=c.OptimizerConfig(learning_rate=3e-4),
    data=c.DataConfig(template="raw", max_length=56, max_prompt_length=32),
    train=c.TrainConfig(batch_size=32, steps=40),
    checkpoint=c.CheckpointConfig(every=10),
)
