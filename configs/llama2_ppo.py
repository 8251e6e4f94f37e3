"""The PPO of Llama 2-Chat: Touvron et al. 2023 (arXiv 2307.09288), section 3.2.3.

AdamW (0.9, 0.95, eps 1e-5, weight decay 0.1), gradients clipped at 1.0, a constant 1e-6; 512 responses an iteration in
mini-batches of 64, one gradient step each; PPO clip 0.2; a KL coefficient of 0.01 at 7B and 13B (0.005 above: give
--ppo.kl_coefficient 0.005); 200 to 400 iterations. Two reward models: the safety score decides where the prompt is
tagged (`safety` true in its row) or the score's sigmoid is below 0.15, else the helpfulness score; the result is
whitened. What the paper does not say is ours: values from a separate model that starts as the policy (--value_model
gives it another start), GAE with lambda 0.95, temperature 1, lengths.

    dpo-jax ppo configs/llama2_ppo.py --model SFT_MODEL --reward HELPFULNESS_MODEL --safety_reward SAFETY_MODEL \
        --data PROMPTS.jsonl --out runs/llama2_ppo
"""

from dpo_jax import config as c

config = c.PPORun(
    **c.OPEN,
    reward=c.ON_COMMAND_LINE,
    safety_reward=c.ON_COMMAND_LINE,
    ppo=c.PPOLossConfig(epochs=1, minibatches=8, clip=0.2, kl_coefficient=0.01),
    sample=c.SampleConfig(max_new_tokens=1024),
    optimizer=c.OptimizerConfig(learning_rate=1e-6, b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.1, clip_norm=1.0),
    data=c.DataConfig(template="llama2", max_length=4096, max_prompt_length=2048),
    train=c.TrainConfig(batch_size=512, steps=400, dtype="bfloat16", remat="full"),
    checkpoint=c.CheckpointConfig(every=20),
)
