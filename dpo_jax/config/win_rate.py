"""Options of `dpo-jax win-rate`."""

from dataclasses import dataclass

from dpo_jax.config.checks import Options, Seed


@dataclass(frozen=True)
class WinRateRun(Options):
    """How often one model's answers beat another's, with and without the longer answer's advantage: `dpo-jax win-rate`.

    Of all verdicts, and at equal length by AlpacaEval's minimal formula, each with a 95 % bootstrap interval.
    """

    answers: str
    """Answers of the model: rows with `instruction` and `output` (AlpacaEval's outputs.json), or `prompt` and
    `response`."""
    against: str
    """Answers of the other model to the same instructions."""
    judgments: str
    """Verdicts, laid out as AlpacaEval's annotations.json: `instruction`, `output_1`, `output_2` and `preference`, 1
    for output_1, 2 for output_2, 1.5 (or 0) for neither, between them by degrees, null for none. Several verdicts on
    one pair (both orders) count as their mean. With --judge the file to write."""
    judge: str | None = None
    """Judge the answers first: judge:FILE.yaml, whose file holds options of `dpo-jax judge` (`ask: pair` asks in both
    orders), or whatever --reward of `dpo-jax ppo` takes, whose scores are compared. A judging that was interrupted goes
    on."""
    json: bool = False
    """Print one JSON object instead of a table."""
    out: str | None = None
    """JSON file for the same object."""
    seed: Seed = 0
    """Seed of the bootstrap."""
