"""Options of `dpo-jax lm-eval`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dpo_jax.config.bases import WritesTexts
from dpo_jax.config.checks import Count, Within, require


@dataclass(frozen=True, kw_only=True)
class LmEvalRun(WritesTexts):
    """Tasks of EleutherAI's lm-evaluation-harness on a model of ours: `dpo-jax lm-eval`.

    TruthfulQA, GSM8K and hundreds more, and tasks of your own; needs `pip install 'dpo_jax[lm_eval]'`.
    """

    model: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint or run folder of ours, or smollm2."""
    tasks: tuple[str, ...]
    """Names of tasks or groups, as `lm_eval` takes them; * stands for any letters."""
    include_path: str | None = None
    """Folder of tasks of your own, as YAML. Such a file may name Python code, which is run: only folders you trust."""
    num_fewshot: Annotated[int, Within(0)] | None = None
    """Examples in front of each question. Not given: what the task says."""
    limit: Count | None = None
    """Only the first so many rows of each task: for a try, not for a figure."""
    apply_chat_template: bool = False
    """Put each question by the tokenizer's chat template."""
    system_instruction: str | None = None
    """A system message in front of each question."""
    out: str | None = None
    """JSON file for the harness's results."""
    rows: str | None = None
    """JSONL file for what the model said in each row."""
    batch_size: Count = 8
    """Sequences at once, over all devices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and computation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tasks, "--tasks is empty: give it the name of a task")
