"""Iterative RPO, all rounds: Pang et al. 2024 (arXiv 2404.19733), for Llama 2 70B chat on GSM8K.

Four rounds; 30 answers a problem at temperature 0.8, at 1.3 from the third round on; right against wrong, up to 10
pairs a problem; each round as in `iterative_rpo.py` beside this file, from the model before it, which is its reference.
The length of an answer is ours.

    dpo-jax recipe iterative_rpo configs/iterative_rpo_rounds.py --model MODEL --prompts PROBLEMS.jsonl --out runs/rpo
"""

from dpo_jax.config import ON_COMMAND_LINE, SET_BY_RECIPE, IterativeRPORun, SampleConfig, derive

config = IterativeRPORun(
    model=ON_COMMAND_LINE,
    prompts=ON_COMMAND_LINE,
    out=ON_COMMAND_LINE,
    rounds=4,
    samples=30,
    temperatures=(0.8, 0.8, 1.3),  # the last holds for all rounds after it
    pairs_per_prompt=10,
    sample=SampleConfig(max_new_tokens=512),
    dpo=derive("iterative_rpo", dict.fromkeys(("model", "data.files", "out"), SET_BY_RECIPE)),
)
