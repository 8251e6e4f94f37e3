"""Llama 2-Chat from the base model: Touvron et al. 2023 (arXiv 2307.09288), section 3.

The stages have the numbers of their own recipes beside this file: SFT, the helpfulness and the safety reward model,
four rounds of rejection sampling, PPO. Each can be changed: --ppo.ppo.kl_coefficient 0.005 for 34B and 70B. People
compared the answers there; here --judge and --safety_judge do, and the four degrees of their ratings are quarters of
the judge's gaps. The labels of the safety model's auxiliary loss stand in --safety_data only. What the paper leaves
open is ours: how many answers are compared, at which temperature, and how many prompts are held out.

    dpo-jax recipe llama2_chat configs/llama2_chat.py --model LLAMA2_BASE --sft_data DIALOGUES.jsonl \
        --helpful_data HELPFULNESS.jsonl --safety_data SAFETY.jsonl --prompts PROMPTS.jsonl \
        --judge http://HOST/helpfulness --safety_judge http://HOST/safety --out runs/llama2_chat
"""

from dpo_jax.config import ON_COMMAND_LINE, SET_BY_RECIPE, ChatRecipeConfig, Llama2ChatRun, derive

SET = dict.fromkeys(("model", "data.files", "out"), SET_BY_RECIPE)

config = Llama2ChatRun(
    model=ON_COMMAND_LINE,
    sft_data=ON_COMMAND_LINE,
    helpful_data=ON_COMMAND_LINE,
    prompts=ON_COMMAND_LINE,
    judge=ON_COMMAND_LINE,
    out=ON_COMMAND_LINE,
    safety_data=ON_COMMAND_LINE,
    safety_judge=ON_COMMAND_LINE,
    recipe=ChatRecipeConfig(rounds=4),
    sft=derive("llama2_sft", SET),
    helpful=derive("llama2_rm_helpful", SET),
    safety=derive("llama2_rm_safe", SET | {"mix_data": SET_BY_RECIPE}),
    rejection=derive("llama2_rejection", SET | {"reward": SET_BY_RECIPE}),
    ppo=derive("llama2_ppo", SET | {"reward": SET_BY_RECIPE, "safety_reward": SET_BY_RECIPE}),
)
