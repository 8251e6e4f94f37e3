"""A model that writes, and the one loop that writes its responses into a file, which can be interrupted."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.complete.writing.responses import Response, StopStrings, decode, terminators
from dpo_jax.config import SampleConfig
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.templates import RAW
from dpo_jax.files.jsonl import Row, RowsFile
from dpo_jax.files.log import ProgressBar
from dpo_jax.model.llama import Llama
from dpo_jax.processes import distributed
from dpo_jax.sample import Finished, Request, beam_search, serve
from dpo_jax.weights.integrity.fingerprint import fingerprint
from dpo_jax.weights.opened import StoredModel
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import check_vocabulary, load_tokenizer, text_ids

Some = Sequence[tuple[Request, Response]]
"""Responses that ended together."""


@dataclass(frozen=True)
class Draw:
    """Responses that are drawn with one seed.

    Attributes:
      prompts: ids of each.
      requests: by the keys of their rows in the file: (index of the prompt, number of the sample).
      seed: a response depends on it and on its request.
      rows: of the file, for some responses.
      temperature: another than the writer's.
    """

    prompts: Sequence[Sequence[int]]
    requests: Mapping[Any, Request]
    seed: int
    rows: Callable[[Some], Iterable[Row]]
    temperature: float | None = None


@dataclass(frozen=True)
class Writer:
    """A model that writes. Its weights are read when they are first needed, and kept until it is closed.

    Attributes:
      load: gives the model and its variables.
      tokenizer, encoder: of the model, and the template that it is asked with.
      sample: how it draws; `config` has all terminators too.
      batch_size: responses at once.
      raw: they go on with texts, see `decode`.
      mesh: of the variables.
    """

    load: Callable[[], tuple[Llama, Any]]
    tokenizer: PreTrainedTokenizerBase
    encoder: ConversationEncoder
    sample: SampleConfig
    batch_size: int
    raw: bool = False
    mesh: Mesh | None = None

    @cached_property
    def _loaded(self) -> tuple[Llama, Any]:
        return self.load()

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the variables."""
        return fingerprint(self._loaded[1])

    @cached_property
    def config(self) -> SampleConfig:
        """`sample` with all terminators."""
        return terminators(self._loaded[0], self.encoder, self.sample)

    def close(self) -> None:
        """Give the weights up, to make room on the devices."""
        self.__dict__.pop("_loaded", None)

    def responses(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Request],
        *,
        seed: int,
        temperature: float | None = None,
    ) -> Iterator[Some]:
        """Responses to `requests` (pairs of a prompt's index and a sample's number), in the order in which they end.

        Each request draws with its own key, so neither the others nor `batch_size` change its text.
        """
        if not requests:
            return
        model, variables = self._loaded
        config = self.config if temperature is None else replace(self.config, temperature=temperature)

        def text(prompt: int, ids: Sequence[int]) -> str:
            return decode(self.tokenizer, prompts[prompt], ids, raw=self.raw)

        stops = StopStrings(text, config.stop_strings) if config.stop_strings else None
        told: dict[str, Any] = {"vocabulary": text_ids(self.tokenizer, model.config), "mesh": self.mesh}
        if config.beams is not None:
            together = max(1, self.batch_size // config.beams)
            served = _search(model, variables, prompts, config, requests, together, **told)
        else:
            told |= {"config": config, "requests": requests, "rows": self.batch_size, "ended": stops}
            served = serve(model, variables, prompts, jax.random.key(seed), **told)

        def response(request: Request, ids: list[int], logps: list[float]) -> Response:
            stopped = ids[-1] in config.stop_tokens
            written = text(request[0], ids[:-1] if stopped else ids)
            at = None if stops is None else stops.begin(written)
            reason = "stop" if stopped or at is not None else "length"
            return Response(ids, logps, written if at is None else written[:at], reason)

        for finished in served:
            yield [(done.request, response(*done)) for done in finished]

    def write(
        self,
        path: Path,
        label: str,
        settings: Mapping[str, Any],
        draws: Callable[[list[Row]], Iterable[Draw]],
        *,
        total: int,
        key: Callable[[Row], Any],
        counted: str | None = "rows",
        note: Callable[[list[Row]], str] = lambda rows: "",
        form: Callable[[list[Row]], Iterable[Row]] | None = None,
    ) -> list[Row]:
        """The rows of the file `path`, once all are there. A file that was interrupted is gone on with.

        Args:
          path: on a file system that all processes share; process 0 writes it.
          label: of the progress bar.
          settings: JSON-able; all that decides the rows.
          draws: is given the rows so far, a list that grows, and says one by one what is to be drawn.
          total: rows in the end.
          key: sets the rows apart, and is their order in the file.
          counted: what the rows are called when a file is gone on with; None: nothing is said of it.
          note: of the rows so far, in front of the tokens per second.
          form: what the whole file holds instead of the rows, made of them.
        """
        main = distributed.is_main()
        with RowsFile(path, settings) as file, ProgressBar(label, total, done=len(file.rows), shown=main) as bar:
            if file.rows and main and counted:
                bar.say(f"{file.part}: going on behind its {len(file.rows)} {counted}")
            start, tokens = time.monotonic(), 0
            done = {key(row) for row in file.rows}
            for draw in draws(file.rows):
                wanted = [request for at, request in draw.requests.items() if at not in done]
                for some in self.responses(draw.prompts, wanted, seed=draw.seed, temperature=draw.temperature):
                    file.append(draw.rows(some))
                    tokens += sum(len(response.ids) for _, response in some)
                    speed = tokens / (time.monotonic() - start)
                    bar.update(len(file.rows), f"{note(file.rows)}{speed:.0f} tokens/s")
            return file.finish(order=key, form=form)


def open_writer(
    place: StoredModel,
    sample: SampleConfig,
    *,
    mesh: Mesh,
    batch_size: int,
    template: str | None = None,
    date: str | None = None,
    raw: bool = False,
    **loading: Any,
) -> Writer:
    """The model `place`, of which no weights are read yet, asked with its own chat template or another, or `raw`.

    loading: dtype and whatever else `load_pretrained` is to be told.

    Raises `InputError` for a damaged model, and for a tokenizer that does not fit it.
    """
    tokenizer = place.tokenizer()
    check_vocabulary(tokenizer, place.architecture)
    encoder = ConversationEncoder(tokenizer, RAW if raw else template, date)

    def load() -> tuple[Llama, Any]:
        return load_pretrained(place, mesh=mesh, **loading)

    return Writer(load, tokenizer, encoder, sample, batch_size, raw=raw, mesh=mesh)


def raw_writer(source: str, policy: tuple[Llama, Any], sample: SampleConfig, batch_size: int) -> Writer:
    """A policy, model and variables, that goes on with texts; its tokenizer is that of the model `source`."""
    tokenizer = load_tokenizer(source)
    return Writer(lambda: policy, tokenizer, ConversationEncoder(tokenizer, RAW), sample, batch_size, raw=True)


def _search(
    model: Llama,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    requests: Sequence[Request],
    together: int,
    **told: Any,
) -> Iterator[list[Finished]]:
    """What beam search finds for each request, `together` prompts at a time."""
    for start in range(0, len(requests), together):
        some = list(requests[start : start + together])
        # The last batch is filled up with its last prompt: it needs no program of its own.
        filled = some + [some[-1]] * (min(together, len(requests)) - len(some))
        found = beam_search(model, variables, [prompts[i] for i, _ in filled], config=config, **told)
        tokens, mask, logps = (np.asarray(x) for x in found)
        yield [Finished(r, tokens[i][mask[i]].tolist(), logps[i][mask[i]].tolist()) for i, r in enumerate(some)]
