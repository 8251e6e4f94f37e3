"""Generation from a Llama.

`generate` for a batch (`engine.py`), `serve` for a queue of requests (`continuous.py`), `beam_search` (`beams.py`).
"""

from dpo_jax.sample.beams import beam_search
from dpo_jax.sample.continuous import Finished, Request, serve
from dpo_jax.sample.decode import check_context
from dpo_jax.sample.engine import Generation, generate, generate_mixture, generate_with_plain_logps
from dpo_jax.sample.layout import resolved as with_layout
from dpo_jax.sample.program import Weights, is_narrow, prepare

__all__ = [
    "Finished",
    "Generation",
    "Request",
    "Weights",
    "beam_search",
    "check_context",
    "generate",
    "generate_mixture",
    "generate_with_plain_logps",
    "is_narrow",
    "prepare",
    "serve",
    "with_layout",
]
