"""Openings of reviews that say nothing yet about whether the reviewer was pleased: the prompts of `dpo-jax demo`.

`python -m dpo_jax.complete.writing.openings > openings.jsonl` writes them as a file of prompts.
"""

import json
import random
from importlib import resources


def review_openings(seed: int) -> list[str]:
    """All 240 openings (`prompts/review_openings.json`), in an order that depends on the seed."""
    file = resources.files("dpo_jax.complete").joinpath("prompts", "review_openings.json")
    groups = json.loads(file.read_text(encoding="utf-8"))
    openings = [stem.format(subject) for group in groups for subject in group["subjects"] for stem in group["stems"]]
    openings = [text[0].upper() + text[1:] for text in openings]
    random.Random(seed).shuffle(openings)
    return openings


if __name__ == "__main__":
    for opening in review_openings(seed=0):
        print(json.dumps({"prompt": opening}))
