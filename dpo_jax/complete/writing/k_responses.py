"""K responses to every prompt of a file: a file that is made once, and can be gone on with in the middle.

What is drawn is a function of the weights, the prompts, the seed and the temperature. So a run that was killed ends
with the file of a run that was not."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dpo_jax.complete.writing.responses import Response
from dpo_jax.complete.writing.writer import Draw, Some, Writer
from dpo_jax.data.sets.prompts import PromptDataset
from dpo_jax.files.jsonl import Row, read_lines
from dpo_jax.processes import distributed


def key_of(prompt: str | list[dict[str, str]]) -> str:
    """What equal prompts have in common."""
    return json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def write_responses(
    writer: Writer,
    path: Path,
    data: PromptDataset,
    *,
    label: str,
    temperatures: Sequence[float],
    samples: int,
    seed: int,
) -> list[Row]:
    """`samples` responses to every prompt at each temperature, as rows of the file `path`, in the prompts' order.

    The file is read where it is there. A response that was cut in the middle of a character loses that character.
    """
    if distributed.flag_from_main(path.exists()):
        return read_lines(path)
    asked = (p.text if writer.raw and p.text is not None else p.messages for p in data.prompts)
    prompts = [writer.encoder.prompt_ids(prompt) for prompt in asked]
    numbers = {int(number): i for i, number in enumerate(data.row_numbers)}
    places = {temperature: j for j, temperature in enumerate(temperatures)}
    settings = {
        "weights": writer.weights,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "sample": dataclasses.asdict(writer.sample),
        "temperatures": list(temperatures),
        "samples": samples,
        "seed": seed,
    }

    def draws(_: list[Row]) -> Iterator[Draw]:
        for j, temperature in enumerate(temperatures):

            def rows(some: Some, temperature: float = temperature) -> Iterator[Row]:
                return (_row(data, i, k, temperature, response) for (i, k), response in some)

            requests = {(i, j, k): (i, k) for i in range(len(prompts)) for k in range(samples)}
            key = int(np.random.SeedSequence([seed, j]).generate_state(1)[0])
            yield Draw(prompts, requests, key, rows, temperature)

    def key(row: Row) -> tuple[int, int, int]:
        return numbers[row["row"]], places[row["temperature"]], row["sample"]

    total = len(prompts) * len(temperatures) * samples
    return writer.write(path, label, settings, draws, total=total, key=key)


def _row(data: PromptDataset, index: int, sample: int, temperature: float, response: Response) -> Row:
    cut = response.finish_reason == "length"
    return {
        "row": int(data.row_numbers[index]),
        "prompt": data.prompts[index].plain,
        "temperature": temperature,
        "sample": sample,
        "response": response.text.rstrip("\N{REPLACEMENT CHARACTER}") if cut else response.text,
        "finish_reason": response.finish_reason,
        "tokens": len(response.ids),
    }
