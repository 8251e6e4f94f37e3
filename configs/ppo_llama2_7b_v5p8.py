"""PPO of a 7B Llama 2-Chat on 8 chips of TPU v5p (a slice of 2 x 2 x 2).

The numbers of Llama 2-Chat's PPO (Touvron et al. 2023, arXiv 2307.09288, section 3.2.3), which are those of
`llama2_ppo.py`: 512 responses an iteration in mini-batches of 64, 1e-6, clip 0.2, KL coefficient 0.01, two reward
models. Responses are sampled 128 at a time.

    dpo-jax ppo configs/ppo_llama2_7b_v5p8.py --model SFT_MODEL --data PROMPTS.jsonl --out runs/ppo \
        --reward HELPFULNESS_MODEL --safety_reward SAFETY_MODEL

What it needs there: `dpo-jax plan` with this file, --topology v5p:2x2x2 --model_shape llama2_7b.
"""

from dpo_jax.config import (
    ON_COMMAND_LINE,
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    PPOLossConfig,
    PPORun,
    SampleConfig,
    TrainConfig,
)

config = PPORun(
    model=ON_COMMAND_LINE,
    out=ON_COMMAND_LINE,
    reward=ON_COMMAND_LINE,
    safety_reward=ON_COMMAND_LINE,
    rollout_batch_size=128,
    ppo=PPOLossConfig(epochs=1, minibatches=8, clip=0.2, kl_coefficient=0.01),
    sample=SampleConfig(max_new_tokens=1024),
    optimizer=OptimizerConfig(learning_rate=1e-6, b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.1, clip_norm=1.0),
    data=DataConfig(template="llama2", max_length=2048, max_prompt_length=1024),
    train=TrainConfig(batch_size=512, accumulate=8, steps=400, dtype="bfloat16", remat="full"),
    checkpoint=CheckpointConfig(every=20),
    mesh=MeshConfig(fsdp=8),
)
