"""`dpo-jax generate`: answers to one prompt, or to a file of prompts."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.complete.writing.responses import Response
from dpo_jax.complete.writing.writer import Draw, Some, open_writer
from dpo_jax.config import GenerateRun
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.preferences import parse_prompt
from dpo_jax.data.sources.files import read_rows
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.templates import check_date
from dpo_jax.errors import InputError, naming
from dpo_jax.files.jsonl import Row, check_own
from dpo_jax.files.log import say
from dpo_jax.judge.loading import check_output
from dpo_jax.mesh import make_mesh
from dpo_jax.sample import check_context
from dpo_jax.weights.opened import open_checkpoint


def _read_prompts(run: GenerateRun) -> Iterator[tuple[int, tuple[Message, ...], str | None]]:
    """(row number from 1, messages, plain text or None) of every prompt."""
    if run.prompt is not None:
        if not run.prompt.strip():
            raise InputError("--prompt is blank; give it a text")
        yield 1, (Message("user", run.prompt),), run.prompt
        return
    assert run.prompts is not None
    for number, row in read_rows(run.prompts):
        with naming(f"{run.prompts}: row {number}"):
            messages, text = parse_prompt(row)
        yield number, messages, text


def _encode(run: GenerateRun, encoder: ConversationEncoder) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """What each output row repeats of its input, and the ids of the prompts."""
    heads: list[dict[str, Any]] = []
    ids: list[list[int]] = []
    for number, messages, text in _read_prompts(run):
        where = "--prompt" if run.prompts is None else f"{run.prompts}: row {number}"
        with naming(where):
            if run.raw and text is None:
                raise InputError("--raw takes plain text, and the row has several messages; leave --raw out")
            ids.append(encoder.prompt_ids(text if run.raw and text is not None else messages))
            if not ids[-1]:
                raise InputError("the prompt has no token; give it a text")
        prompt = [m.as_dict() for m in messages] if text is None else text
        heads.append({"row": number, "prompt": prompt})
    return heads, ids


def generate(run: GenerateRun) -> None:
    """The `generate` command. Every prompt is read and checked before the first token is made."""
    out = None if run.out is None else check_output(Path(run.out).expanduser(), run.prompts)
    if out is not None:
        check_own(out, lambda row: row.keys() >= {"row", "prompt", "response"}, "answers of this command")
    place, mesh = open_checkpoint(run.model), make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    told: dict[str, Any] = {"raw": run.raw, "template": run.template, "date": run.date, "dtype": run.dtype}
    writer = open_writer(place, run.sample, mesh=mesh, batch_size=run.batch_size, **told)
    check_date(writer.tokenizer, run.template, run.date)
    heads, prompts = _encode(run, writer.encoder)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]), default=0)
    if prompts:
        try:
            check_context(place.architecture, len(prompts[longest]), run.sample)
        except InputError as problem:
            where = "--prompt" if run.prompts is None else f"{run.prompts}: row {heads[longest]['row']}"
            raise InputError(f"{where}: {str(problem).replace('max_new', '--sample.max_new')}") from problem
    requests = {(heads[i]["row"], k): (i, k) for i in range(len(prompts)) for k in range(run.samples)}

    def rows(some: Some) -> Iterator[Row]:
        return (_row(heads[i], k, response, run.seed) for (i, k), response in some)

    if out is not None:
        settings = {
            "weights": writer.weights,
            "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
            "sample": asdict(writer.config),
            "samples": run.samples,
            "seed": run.seed,
            "dtype": run.dtype,
            "raw": run.raw,
        }
        draw = Draw(prompts, requests, run.seed, rows)
        written = writer.write(out, "generating", settings, lambda _: [draw], total=len(requests), key=_key)
        say(f"{out}: {len(written)} responses")
        return
    ready: dict[Any, Row] = {}
    waiting = iter(requests)
    following = next(waiting)
    for some in writer.responses(prompts, list(requests.values()), seed=run.seed):
        ready |= {_key(row): row for row in rows(some)}
        while following in ready:
            row = ready.pop(following)
            plain = run.prompts is None and run.samples == 1
            print(row["response"] if plain else json.dumps(row, ensure_ascii=False), flush=True)
            following = next(waiting, None)


def _key(row: Row) -> tuple[int, int]:
    return row["row"], row["sample"]


def _row(head: Row, sample: int, response: Response, seed: int) -> Row:
    return {
        **head,
        "sample": sample,
        "response": response.text,
        "finish_reason": response.finish_reason,
        "tokens": len(response.ids),
        "logp": float(np.sum(response.logps, dtype=np.float64)),
        "seed": seed,
    }
