"""K responses to every prompt of a file: a file that is made once, and can be gone on with in the middle.

What is drawn is a function of the weights, the prompts, the seed and the temperature. So a run that was killed ends
with the file of a run that was not."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax.complete.responses import Response, answers, terminators
from dpo_jax.config import RejectionRun
from dpo_jax.data.sets.prompts import PromptDataset
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.templates import RAW
from dpo_jax.files.jsonl import Row, RowsFile, read_lines
from dpo_jax.files.log import ProgressBar, say
from dpo_jax.processes import distributed
from dpo_jax.weights.fingerprint import fingerprint
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import load_tokenizer


def key_of(prompt: str | list[dict[str, str]]) -> str:
    """What equal prompts have in common."""
    return json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def select(data: PromptDataset, indices: Sequence[int]) -> PromptDataset:
    """Some of the prompts."""
    prompts = tuple(data.prompts[i] for i in indices)
    return data.taken(indices, ids=data.ids.take(indices), prompts=prompts, safety=data.safety[list(indices)])


def write_once(
    path: Path, settings: Callable[[], Any], work: Callable[[RowsFile], Any], order: Callable[[Row], Any] | None = None
) -> list[Row]:
    """The rows of the file `path`: read where it is there, else made by `work`, which appends those that are missing.

    Args:
      path: on a file system that all processes share; process 0 writes it.
      settings: gives, JSON-able, all that decides the rows.
      work: is given the unfinished file.
      order: of the rows in the finished file.
    """
    if distributed.flag_from_main(path.exists()):
        return read_lines(path)
    with RowsFile(path, settings(), writes=distributed.is_main()) as file:
        work(file)
        rows = file.finish(order=order)
    distributed.barrier(str(path))
    return rows


class Sampler:
    """A model that writes. Its weights are read when they are first needed, and kept until it is given up."""

    def __init__(self, source: str, config: RejectionRun, mesh: Mesh):
        """`source`: as for `--model`."""
        self._source, self._config, self._mesh = source, config, mesh
        self._loaded: tuple[Any, Any, str] | None = None
        self._tokenizer = load_tokenizer(source)
        self._encoder = ConversationEncoder(self._tokenizer, config.data.template, config.data.date)

    def close(self) -> None:
        """Give its weights up, to make room on the devices."""
        self._loaded = None

    def _load(self) -> tuple[Any, Any, str]:
        """Model, variables, fingerprint."""
        if self._loaded is None:
            train = self._config.train
            frozen = train.kept_dtype
            model, variables = load_pretrained(
                self._source,
                mesh=self._mesh,
                dtype=jnp.dtype(frozen),
                compute_dtype=jnp.dtype(train.dtype),
                attention=train.attention,
            )
            self._loaded = model, variables, fingerprint(variables)
        return self._loaded

    def write(
        self, path: Path, data: PromptDataset, *, label: str, temperatures: Sequence[float], samples: int, seed: int
    ) -> list[Row]:
        """`samples` responses to every prompt at each temperature, as rows of the file `path`, in the prompts' order.

        A response that was cut in the middle of a character loses that character.
        """
        prompts = self._ids(data)
        numbers = {int(number): i for i, number in enumerate(data.row_numbers)}
        places = {temperature: j for j, temperature in enumerate(temperatures)}

        def settings() -> dict[str, Any]:
            return {
                "weights": self._load()[2],
                "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
                "sample": dataclasses.asdict(self._config.sample),
                "temperatures": list(temperatures),
                "samples": samples,
                "seed": seed,
            }

        def order(row: Row) -> tuple[int, int, int]:
            return numbers[row["row"]], places[row["temperature"]], row["sample"]

        def work(file: RowsFile) -> None:
            total, main = len(prompts) * len(temperatures) * samples, distributed.is_main()
            if file.rows and main:
                say(f"{file.part}: going on behind its {len(file.rows)} rows")
            done = {order(row) for row in file.rows}
            start, tokens = time.monotonic(), 0
            with ProgressBar(label, total, done=len(done), shown=main) as bar:
                for j, temperature in enumerate(temperatures):
                    wanted = [(i, k) for i in range(len(prompts)) for k in range(samples) if (i, j, k) not in done]
                    key = int(np.random.SeedSequence([seed, j]).generate_state(1)[0])
                    for some in self._answers(prompts, wanted, temperature, key):
                        file.append(_row(data, i, k, temperature, response) for (i, k), response in some)
                        tokens += sum(len(response.ids) for _, response in some)
                        bar.update(len(file.rows), f"{tokens / (time.monotonic() - start):.0f} tokens/s")

        return write_once(path, settings, work, order)

    def _ids(self, data: PromptDataset) -> list[list[int]]:
        """The prompts as this model reads them: a student's tokenizer may differ from that of `data`."""
        raw = self._config.data.template == RAW
        asked = (prompt.text if raw and prompt.text is not None else prompt.messages for prompt in data.prompts)
        return [self._encoder.prompt_ids(prompt) for prompt in asked]

    def _answers(
        self, prompts: list[list[int]], wanted: list[tuple[int, int]], temperature: float, seed: int
    ) -> Iterator[list[tuple[tuple[int, int], Response]]]:
        if not wanted:
            return
        model, variables, _ = self._load()
        config = dataclasses.replace(self._config.sample, temperature=temperature)
        yield from answers(
            model,
            variables,
            self._tokenizer,
            prompts,
            seed=seed,
            config=terminators(model, self._encoder, config),
            batch_size=self._config.sample_batch_size,
            requests=wanted,
            raw=self._config.data.template == RAW,
            mesh=self._mesh,
        )


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
