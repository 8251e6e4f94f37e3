"""Options of `dpo-jax mt-bench show`: FastChat's files."""

from dataclasses import dataclass

from dpo_jax.config.checks import require


@dataclass(frozen=True)
class MTBenchShowRun:
    """Scores and win rates from FastChat's judgement files: `dpo-jax mt-bench show`.

    Single judgements (gpt-4_single.jsonl) give mean scores, pairwise ones (gpt-4_pair.jsonl) wins, losses and ties: a
    win only where both orders of the two answers name the same one.
    """

    judgments: str
    """FastChat's model_judgment file: rows with `model` and `score`, or with `model_1`, `model_2`, `g1_winner`."""
    questions: str | None = None
    """FastChat's question.jsonl, for the categories. Not given: ids 81 to 160 are MT-Bench's own, ten a category."""
    models: tuple[str, ...] = ()
    """Only these models, in this order; of pairs, those of two of them. Not given: all."""
    baseline: str | None = None
    """Of pairs, only those with this model."""
    json: bool = False
    """Print one JSON object instead of tables."""
    out: str | None = None
    """Folder for radar.png (categories), bars.png (models, by turn) and summary.json."""

    def __post_init__(self) -> None:
        twice = [name for name in self.models if self.models.count(name) > 1]
        require(not twice, f"--models names {''.join(twice[:1])} twice; name each model once")
        missing = self.baseline is not None and bool(self.models) and self.baseline not in self.models
        require(not missing, f"--baseline {self.baseline} is none of --models; name it there, too")
