"""`dpo-jax generate`: answers to one prompt, or to a file of prompts."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.commands.config_keys import with_config_keys
from dpo_jax.complete.responses import Response, answers, terminators
from dpo_jax.config import GenerateRun, SampleConfig
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.preferences import parse_prompt
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sources.files import read_rows
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.templates import RAW, check_date
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import RowsFile
from dpo_jax.files.log import ProgressBar, say
from dpo_jax.mesh import make_mesh
from dpo_jax.sample import Request, check_context
from dpo_jax.weights.fingerprint import fingerprint
from dpo_jax.weights.opened import open_checkpoint
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import check_vocabulary


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
    place = open_checkpoint(run.model)
    tokenizer = place.tokenizer()
    check_date(tokenizer, run.template, run.date)
    encoder = ConversationEncoder(tokenizer, RAW if run.raw else run.template, run.date)
    heads, prompts = _encode(run, encoder)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]), default=0)
    if prompts:
        architecture = place.architecture
        try:
            check_context(architecture, len(prompts[longest]), run.sample)
        except InputError as problem:
            where = "--prompt" if run.prompts is None else f"{run.prompts}: row {heads[longest]['row']}"
            raise InputError(f"{where}: {str(problem).replace('max_new', '--sample.max_new')}") from problem
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    model, variables = load_pretrained(place, mesh=mesh, dtype=run.dtype)
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
