"""`dpo-jax generate`: answers to one prompt, or to a file of prompts."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import GenerateRun, SampleConfig
from dpo_jax.data.encode import ConversationEncoder
from dpo_jax.data.files import read_rows
from dpo_jax.data.messages import Message
from dpo_jax.data.preferences import parse_prompt
from dpo_jax.data.problems import BadRow
from dpo_jax.data.templates import RAW, check_date
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh
from dpo_jax.model.llama import Llama
from dpo_jax.run.config_keys import with_config_keys
from dpo_jax.run.log import ProgressBar, say
from dpo_jax.run.rows import RowsFile
from dpo_jax.sample import Finished, Request, beam_search, check_context, serve
from dpo_jax.weights.fingerprint import fingerprint
from dpo_jax.weights.pretrained import load_pretrained, read_architecture
from dpo_jax.weights.tokenizer import check_vocabulary, load_tokenizer, text_ids


@dataclass(frozen=True)
class Response:
    """What the model wrote behind one prompt.

    Attributes:
      ids: the new tokens, the terminator included, or the token that completes a stop string.
      logps: the model's log-probability of each, at the sampling temperature.
      text: without the terminator; cut in front of a stop string.
      finish_reason: "stop" at a terminator or a stop string, "length" at `max_new_tokens`.
    """

    ids: list[int]
    logps: list[float]
    text: str
    finish_reason: str


def decode(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], response: Sequence[int], *, raw: bool = False
) -> str:
    """The text of a response. `raw`: it goes on where the prompt's text ends, so a space in front of it is kept."""

    def text(ids: Sequence[int]) -> str:
        decoded = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(decoded, str)
        return decoded

    return text([*prompt, *response])[len(text(prompt)) :] if raw else text(response)


class StopStrings:
    """Finds the token that completes a stop string, in the text as it is decoded from the tokens so far.

    The whole response is decoded at each look, so what a tokenizer writes for a token in its place is what is searched.
    """

    def __init__(self, text: Callable[[int, Sequence[int]], str], strings: Sequence[str]):
        """`text(prompt index, tokens)` decodes a response."""
        self._text, self._strings = text, strings
        self._clean: dict[Request, int] = {}

    def begin(self, text: str) -> int | None:
        """Where the first stop string begins; None where there is none."""
        return min((at for at in map(text.find, self._strings) if at >= 0), default=None)

    def __call__(self, request: Request, tokens: list[int]) -> int | None:
        """How many of the tokens it takes to have a stop string; None where they hold none."""
        clean = self._clean.pop(request, 0)
        if self.begin(self._text(request[0], tokens)) is None:
            self._clean[request] = len(tokens)
            return None
        sizes = range(clean + 1, len(tokens) + 1)
        return next(n for n in sizes if self.begin(self._text(request[0], tokens[:n])) is not None)


def answers(
    model: Llama,
    variables: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    config: SampleConfig,
    batch_size: int,
    requests: Sequence[Request],
    raw: bool = False,
    mesh: Mesh | None = None,
) -> Iterator[list[tuple[Request, Response]]]:
    """Responses to `requests` (pairs of a prompt's index and a sample's number), in the order in which they end.

    Each request draws with its own key, so neither the others nor `batch_size` change its text.
    """

    def text(prompt: int, ids: Sequence[int]) -> str:
        return decode(tokenizer, prompts[prompt], ids, raw=raw)

    vocabulary = text_ids(tokenizer, model.config)
    stops = StopStrings(text, config.stop_strings) if config.stop_strings else None
    if config.beams is not None:
        together = max(1, batch_size // config.beams)
        served = _search(model, variables, prompts, config, requests, together, vocabulary, mesh)
    else:
        served = serve(
            model,
            variables,
            prompts,
            jax.random.key(seed),
            config=config,
            requests=requests,
            rows=batch_size,
            ended=stops,
            vocabulary=vocabulary,
            mesh=mesh,
        )

    def response(request: Request, ids: list[int], logps: list[float]) -> Response:
        stopped = ids[-1] in config.stop_tokens
        written = text(request[0], ids[:-1] if stopped else ids)
        at = None if stops is None else stops.begin(written)
        reason = "stop" if stopped or at is not None else "length"
        return Response(ids, logps, written if at is None else written[:at], reason)

    for finished in served:
        yield [(done.request, response(*done)) for done in finished]


def _search(
    model: Llama,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    requests: Sequence[Request],
    together: int,
    vocabulary: int | None,
    mesh: Mesh | None,
) -> Iterator[list[Finished]]:
    """What beam search finds for each request, `together` prompts at a time."""
    for start in range(0, len(requests), together):
        some = list(requests[start : start + together])
        # The last batch is filled up with its last prompt: it needs no program of its own.
        filled = some + [some[-1]] * (min(together, len(requests)) - len(some))
        asked = [prompts[i] for i, _ in filled]
        found = beam_search(model, variables, asked, config=config, vocabulary=vocabulary, mesh=mesh)
        tokens, mask, logps = (np.asarray(x) for x in found)
        yield [Finished(r, tokens[i][mask[i]].tolist(), logps[i][mask[i]].tolist()) for i, r in enumerate(some)]


def responses(
    model: Llama,
    variables: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    config: SampleConfig,
    batch_size: int,
    first: int = 0,
    raw: bool = False,
    mesh: Mesh | None = None,
) -> Iterator[list[Response]]:
    """One response to each of `prompts[first:]`, in order, a list of `batch_size` (the last may be shorter) at a time.

    Row i (counted from 0 over all prompts) draws with its own key, so where it starts and how many go at once change no
    text.
    """
    requests = [(i, 0) for i in range(first, len(prompts))]
    following = range(first, min(first + batch_size, len(prompts)))
    ready: dict[int, Response] = {}
    for some in answers(
        model,
        variables,
        tokenizer,
        prompts,
        seed=seed,
        config=config,
        batch_size=batch_size,
        requests=requests,
        raw=raw,
        mesh=mesh,
    ):
        ready |= {index: response for (index, _), response in some}
        while all(i in ready for i in following):
            yield [ready.pop(i) for i in following]
            following = range(following.stop, min(following.stop + batch_size, len(prompts)))
            if not following:
                return


def terminators(model: Llama, encoder: ConversationEncoder, config: SampleConfig) -> SampleConfig:
    """`config` with the stop tokens of the template, the tokenizer and the model added to its own."""
    every = (*config.stop_tokens, *encoder.terminators, *model.config.stop_ids)
    return replace(config, stop_tokens=tuple(dict.fromkeys(every)))


def _read_prompts(run: GenerateRun) -> Iterator[tuple[int, tuple[Message, ...], str | None]]:
    """(row number from 1, messages, plain text or None) of every prompt."""
    if run.prompt is not None:
        if not run.prompt.strip():
            raise InputError("--prompt is blank; give it a text")
        yield 1, (Message("user", run.prompt),), run.prompt
        return
    assert run.prompts is not None
    for number, row in read_rows(run.prompts):
        try:
            messages, text = parse_prompt(row)
        except BadRow as problem:
            raise InputError(f"{run.prompts}: row {number}: {problem}") from problem
        yield number, messages, text


def _encode(run: GenerateRun, encoder: ConversationEncoder) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """What each output row repeats of its input, and the ids of the prompts."""
    heads: list[dict[str, Any]] = []
    ids: list[list[int]] = []
    for number, messages, text in _read_prompts(run):
        where = "--prompt" if run.prompts is None else f"{run.prompts}: row {number}"
        if run.raw and text is None:
            raise InputError(f"{where}: --raw takes plain text, and the row has several messages; leave --raw out")
        try:
            ids.append(encoder.prompt_ids(text if run.raw and text is not None else messages))
        except InputError as problem:
            raise InputError(f"{where}: {problem}") from problem
        if not ids[-1]:
            raise InputError(f"{where}: the prompt has no token; give it a text")
        prompt = [m.as_dict() for m in messages] if text is None else text
        heads.append({"row": number, "prompt": prompt})
    return heads, ids


def _check_out(out: str | None) -> Path | None:
    if out is None:
        return None
    path = Path(out).expanduser()
    if path.is_dir():
        raise InputError(f"{out}: is a folder; --out names the file to write")
    return path


@with_config_keys
def generate(run: GenerateRun) -> None:
    """The `generate` command. Every prompt is read and checked before the first token is made."""
    out = _check_out(run.out)
    tokenizer = load_tokenizer(run.model)
    check_date(tokenizer, run.template, run.date)
    encoder = ConversationEncoder(tokenizer, RAW if run.raw else run.template, run.date)
    heads, prompts = _encode(run, encoder)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]), default=0)
    if prompts:
        architecture = read_architecture(run.model)
        try:
            check_context(architecture, len(prompts[longest]), run.sample)
        except InputError as problem:
            where = "--prompt" if run.prompts is None else f"{run.prompts}: row {heads[longest]['row']}"
            raise InputError(f"{where}: {str(problem).replace('max_new', '--sample.max_new')}") from problem
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    model, variables = load_pretrained(run.model, mesh=mesh, dtype=run.dtype)
    check_vocabulary(tokenizer, model.config)
    config = terminators(model, encoder, run.sample)

    requests = [(i, k) for i in range(len(prompts)) for k in range(run.samples)]

    def rows(wanted: Sequence[Request]) -> Iterator[list[dict[str, Any]]]:
        for some in answers(
            model,
            variables,
            tokenizer,
            prompts,
            seed=run.seed,
            config=config,
            batch_size=run.batch_size,
            requests=wanted,
            raw=run.raw,
            mesh=mesh,
        ):
            yield [_row(heads[request[0]], request[1], response, run.seed) for request, response in some]

    if out is not None:
        numbers = [(heads[i]["row"], k) for i, k in requests]
        _write(run, out, prompts, fingerprint(variables), config, dict(zip(numbers, requests, strict=True)), rows)
        return
    ready: dict[Any, dict[str, Any]] = {}
    waiting = iter([(heads[i]["row"], k) for i, k in requests])
    following = next(waiting)
    for batch in rows(requests):
        ready |= {_identity(row): row for row in batch}
        while following in ready:
            row = ready.pop(following)
            plain = run.prompts is None and run.samples == 1
            print(row["response"] if plain else json.dumps(row, ensure_ascii=False), flush=True)
            following = next(waiting, None)


def _identity(row: dict[str, Any]) -> tuple[int, int]:
    return row["row"], row["sample"]


def _row(head: dict[str, Any], sample: int, response: Response, seed: int) -> dict[str, Any]:
    return {
        **head,
        "sample": sample,
        "response": response.text,
        "finish_reason": response.finish_reason,
        "tokens": len(response.ids),
        "logp": float(np.sum(response.logps, dtype=np.float64)),
        "seed": seed,
    }


def _write(
    run: GenerateRun,
    out: Path,
    prompts: Sequence[Sequence[int]],
    weights: str,
    config: SampleConfig,
    requests: dict[tuple[int, int], Request],
    rows: Callable[[Sequence[Request]], Iterator[list[dict[str, Any]]]],
) -> None:
    """`requests` by the identity of their rows in the file."""
    settings = {
        "weights": weights,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "sample": asdict(config),
        "samples": run.samples,
        "seed": run.seed,
        "dtype": run.dtype,
        "raw": run.raw,
    }
    with RowsFile(out, settings) as file, ProgressBar("generating", len(requests), done=len(file.rows)) as bar:
        if file.rows:
            bar.say(f"{file.part}: going on behind its {len(file.rows)} rows")
        start, tokens = time.monotonic(), 0
        done = {_identity(row) for row in file.rows}
        for batch in rows([request for identity, request in requests.items() if identity not in done]):
            file.append(batch)
            tokens += sum(row["tokens"] for row in batch)
            bar.update(len(file.rows), f"{tokens / (time.monotonic() - start):.0f} tokens/s")
        written = file.finish(order=_identity)
    say(f"{out}: {len(written)} responses")
