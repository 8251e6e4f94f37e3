"""PPO of a 7B Llama 2-Chat on a node of 8 A100 of 80 GB.

The paper's numbers (2023), those of `llama2_ppo.py`, with shorter texts. Responses are sampled 128 at a time.

    dpo-jax ppo configs/ppo_llama2_7b_a100x8.py --model SFT_MODEL --data PROMPTS.jsonl --out runs/ppo \
        --reward HELPFULNESS_MODEL --safety_reward SAFETY_MODEL

What it needs there: `dpo-jax plan` with this file, --topology a100:8 --model_shape llama2_7b.
"""

from dpo_jax.config import derive

config = derive(
    "llama2_ppo",
    {
        "rollout_batch_size": 128,
        "data.max_length": 2048,
        "data.max_prompt_length": 1024,
        "train.accumulate": 8,
        "mesh.fsdp": 8,
    },
)
