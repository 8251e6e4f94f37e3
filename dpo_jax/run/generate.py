"""`dpo-jax generate`: answers to one prompt, or to a file of prompts."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
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
from dpo_jax.data.templates import RAW
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh
from dpo_jax.model.llama import Llama
from dpo_jax.run.log import ProgressBar, say
from dpo_jax.run.rows import RowsFile
from dpo_jax.sample import generate as sample
from dpo_jax.weights.fingerprint import fingerprint
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import check_vocabulary, load_tokenizer


@dataclass(frozen=True)
class Response:
    """What the model wrote behind one prompt.

    Attributes:
      ids: the new tokens, the terminator included.
      logps: log-probability of each, at the sampling temperature.
      text: without the terminator.
      finish_reason: "stop" at a terminator, "length" at `max_new_tokens`.
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
    """Responses to `prompts[first:]`, in order, a list of at most `batch_size` at a time.

    Row i (counted from 0 over all prompts) draws with its own key, so where it starts and how many go at once change no
    text.
    """
    key = jax.random.key(seed)
    for start in range(first, len(prompts), batch_size):
        rows = list(range(start, min(start + batch_size, len(prompts))))
        # The last batch is filled up with its last row: it needs no program of its own, and is done when that row is.
        filled = rows + [rows[-1]] * (min(batch_size, len(prompts)) - len(rows))
        generation = sample(
            model, variables, [prompts[i] for i in filled], key, config=config, row_ids=filled, mesh=mesh
        )
        tokens, mask, logps = (np.asarray(x)[: len(rows)] for x in generation)
        batch = []
        for i, row in enumerate(rows):
            ids = tokens[i][mask[i]].tolist()
            stopped = ids[-1] in config.stop_tokens
            text = decode(tokenizer, prompts[row], ids[:-1] if stopped else ids, raw=raw)
            batch.append(Response(ids, logps[i][mask[i]].tolist(), text, "stop" if stopped else "length"))
        yield batch


def terminators(model: Llama, encoder: ConversationEncoder, config: SampleConfig) -> SampleConfig:
    """`config` with the stop tokens of the template, the tokenizer and the model added to its own."""
    every = (*config.stop_tokens, *encoder.terminators, *model.config.eos_token_ids)
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
        prompt = [m._asdict() for m in messages] if text is None else text
        heads.append({"row": number, "prompt": prompt})
    return heads, ids


def _check_out(out: str | None) -> Path | None:
    if out is None:
        return None
    path = Path(out).expanduser()
    if path.is_dir():
        raise InputError(f"{out}: is a folder; --out names the file to write")
    return path


def generate(run: GenerateRun) -> None:
    """The `generate` command. Every prompt is read and checked before the first token is made."""
    out = _check_out(run.out)
    tokenizer = load_tokenizer(run.model)
    encoder = ConversationEncoder(tokenizer, RAW if run.raw else run.template)
    heads, prompts = _encode(run, encoder)
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    model, variables = load_pretrained(run.model, mesh=mesh, dtype=run.dtype)
    check_vocabulary(tokenizer, model.config)
    config = terminators(model, encoder, run.sample)

    def rows(first: int) -> Iterator[list[dict[str, Any]]]:
        index = first
        for batch in responses(
            model,
            variables,
            tokenizer,
            prompts,
            seed=run.seed,
            config=config,
            batch_size=run.batch_size,
            first=first,
            raw=run.raw,
            mesh=mesh,
        ):
            yield [_row(heads[index + i], response, run.seed) for i, response in enumerate(batch)]
            index += len(batch)

    if out is not None:
        _write(run, out, prompts, fingerprint(variables), config, rows)
        return
    for batch in rows(0):
        for row in batch:
            print(row["response"] if run.prompts is None else json.dumps(row, ensure_ascii=False), flush=True)


def _row(head: dict[str, Any], response: Response, seed: int) -> dict[str, Any]:
    return {
        **head,
        "response": response.text,
        "finish_reason": response.finish_reason,
        "tokens": len(response.ids),
        "logp": float(np.sum(response.logps, dtype=np.float64)),
        "seed": seed,
    }


def _write(
    run: GenerateRun, out: Path, prompts: Sequence[Sequence[int]], weights: str, config: SampleConfig, rows: Any
) -> None:
    settings = {
        "weights": weights,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "sample": asdict(config),
        "seed": run.seed,
        "dtype": run.dtype,
        "raw": run.raw,
    }
    with RowsFile(out, settings) as file, ProgressBar("generating", len(prompts), done=len(file.rows)) as bar:
        if file.rows:
            bar.say(f"{file.part}: going on behind its {len(file.rows)} rows")
        start, tokens = time.monotonic(), 0
        for batch in rows(len(file.rows)):
            file.append(batch)
            tokens += sum(row["tokens"] for row in batch)
            bar.update(len(file.rows), f"{tokens / (time.monotonic() - start):.0f} tokens/s")
        done = file.finish()
    say(f"{out}: {len(done)} responses")
