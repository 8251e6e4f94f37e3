"""PPO of a 7B Llama 2-Chat on 8 chips of TPU v5p (2 x 2 x 2), as on 8 A100: the paper's numbers (2023).

    dpo-jax ppo configs/ppo_llama2_7b_v5p8.py --model SFT_MODEL --data PROMPTS.jsonl --out runs/ppo \
        --reward HELPFULNESS_MODEL --safety_reward SAFETY_MODEL

What it needs there: `dpo-jax plan` with this file, --topology v5p:2x2x2 --model_shape llama2_7b.
"""

from dpo_jax.config import derive

config = derive("ppo_llama2_7b_a100x8")
