"""`dpo-jax logps`: the log-probabilities of both responses of every row, one JSON object a row."""

from pathlib import Path

from dpo_jax.config import LogpsRun
from dpo_jax.files.jsonl import write_lines
from dpo_jax.files.log import say
from dpo_jax.judge.loading import Setting, check_output, load_data
from dpo_jax.types import CHOSEN, REJECTED
from dpo_jax.weights.opened import open_checkpoint


def logps(run: LogpsRun) -> Path:
    """Write `run.out`, rows in input order: row (its number in the file, from 1), chosen_logps and rejected_logps
    (sums over the response's tokens, terminator included, in nats), chosen_tokens and rejected_tokens.

    Rows that cannot be used are left out, and said, as in training. Returns the path. Raises `InputError`.
    """
    setting = Setting.of(run.mesh, run.data, run)
    out = check_output(run.out, run.data.files)
    place = open_checkpoint(run.model)
    tokenizer, dataset = load_data(place, run.data.files, run.data, run.on_bad_rows)
    model, variables = setting.load(place, tokenizer)
    sums = setting.logps(model, variables, dataset, "log-probabilities")
    rows = [
        {
            "row": int(number),
            "chosen_logps": float(values[CHOSEN]),
            "rejected_logps": float(values[REJECTED]),
            "chosen_tokens": int(tokens[CHOSEN]),
            "rejected_tokens": int(tokens[REJECTED]),
        }
        for number, values, tokens in zip(dataset.row_numbers, sums, dataset.response_lengths, strict=True)
    ]
    write_lines(out, rows)
    say(f"{out}: {len(rows):,} rows")
    return out
