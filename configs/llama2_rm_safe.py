"""Llama 2's safety reward model: Touvron et al. 2023 (arXiv 2307.09288), section 3.2.2 and Table 29.

As the helpfulness model (see `llama2_rm_helpful.py`), on 90 % safety data and 10 % helpfulness data, with an auxiliary
loss that tells safe from unsafe responses; rows carry it as `"labels": {"safety": ["safe", "unsafe"]}`. (The paper
prints neither the auxiliary loss nor its weight. Without labels: `--reward.multi_class` with nothing behind it, and
`--reward.exclude_unsafe_chosen False`.) Rows that prefer an unsafe response to a safe one are left out, as there.

    dpo-jax reward configs/llama2_rm_safe.py --model CHAT_MODEL --data SAFETY.jsonl --mix_data HELPFULNESS.jsonl \\
        --out runs/safe
"""

from dpo_jax.config import ON_COMMAND_LINE, derive

config = derive(
    "llama2_rm_helpful",
    {
        "mix_data": ON_COMMAND_LINE,
        "mix": 0.1,
        "reward.multi_class": ("safety=safe,unsafe",),
        "reward.exclude_unsafe_chosen": True,
    },
)
