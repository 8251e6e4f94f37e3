"""Rejection sampling of Llama 2-Chat: Touvron et al. 2023 (arXiv 2307.09288), section 3.2.3.

The best of K responses to each prompt, by the newest reward model, is learnt as in supervised fine-tuning. The paper
shows 10 to 100 samples, and finds temperatures of 1.2 to 1.3 best for them once a model has been through RLHF (Figure
8); before that, lower ones: look at the run's own curves. Since V4 the bests of all versions are learnt together:
--rejection.pool_from takes what the run before has found, and judges it anew, as every version has a newer reward
model. Only the 70B model samples; the smaller ones learn from its bests (--rejection.student). The
fine-tuning has the numbers of section 3.1 (configs/llama2_sft.py). What the paper leaves open is ours: one epoch,
lengths. --safety_reward SAFETY_MODEL adds the second judge as in PPO.

    dpo-jax rejection configs/llama2_rejection.py --model CHAT_MODEL --reward HELPFULNESS_MODEL \
        --data PROMPTS.jsonl --eval_data HELD_OUT.jsonl --rejection.pool_from runs/v3/pool.jsonl --out runs/v4
"""

from dpo_jax import config as c

config = c.RejectionRun(
    **c.OPEN,
    reward=c.ON_COMMAND_LINE,
    rejection=c.RejectionConfig(samples=10, temperatures=(1.2, 1.3), pool="all"),
    sample=c.SampleConfig(max_new_tokens=1024),
    optimizer=c.OptimizerConfig(learning_rate=2e-5, schedule="cosine", weight_decay=0.1),
    data=c.SFTDataConfig(template="llama2", max_length=4096, packing=True, train_on="last"),
    train=c.TrainConfig(batch_size=64, epochs=1, dtype="bfloat16"),
)
