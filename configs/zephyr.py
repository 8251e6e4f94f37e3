"""Zephyr end to end: Tunstall et al. 2023 (arXiv 2310.16944): dSFT, AI feedback, dDPO.

The two training stages have the numbers of configs/zephyr_dsft.py and configs/zephyr_ddpo.py, AI feedback those of the
paper: four writers a prompt, the best against a random one that scores lower. The paper took its dialogues (UltraChat)
and its feedback (UltraFeedback, by GPT-4) ready-made; here --dsft.endpoint.* writes the one, --pool and --judge make
the other. What is held out, and how it is answered, is ours.

    dpo-jax recipe zephyr configs/zephyr.py --model MISTRAL_7B --seeds SEEDS.jsonl --prompts PROMPTS.jsonl \
        --pool POOL.yaml --judge judge:JUDGE.yaml --dsft.endpoint.url http://HOST/v1 --dsft.endpoint.model TEACHER \
        --out runs/zephyr
"""

from dpo_jax.config import ON_COMMAND_LINE, SET_BY_RECIPE, ZephyrRun, derive

SET = dict.fromkeys(("model", "data.files", "out"), SET_BY_RECIPE)

config = ZephyrRun(
    model=ON_COMMAND_LINE,
    seeds=ON_COMMAND_LINE,
    prompts=ON_COMMAND_LINE,
    pool=ON_COMMAND_LINE,
    judge=ON_COMMAND_LINE,
    out=ON_COMMAND_LINE,
    sft=derive("zephyr_dsft", SET),
    dpo=derive("zephyr_ddpo", SET),
)
