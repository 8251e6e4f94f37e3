"""`dpo-jax eval`: a model judged on preference pairs, and by the texts that it writes."""

from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.complete.writing.responses import Response
from dpo_jax.complete.writing.writer import Writer
from dpo_jax.config import EvalRun
from dpo_jax.data.rows.comparisons import parse_preference
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sources.checked_rows import CheckedRows
from dpo_jax.data.tokens import cuts
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_json
from dpo_jax.files.log import ProgressBar, say
from dpo_jax.judge import reward_eval as evaluate_rewards
from dpo_jax.judge.figures import preferences as judgement
from dpo_jax.judge.loading import Setting, check_output, load_data
from dpo_jax.mesh import put_batch, replicated
from dpo_jax.model.groups import response_logps
from dpo_jax.model.llama import Llama
from dpo_jax.report import html, terminal, text_health as texts
from dpo_jax.report.statistics import kl_estimates
from dpo_jax.types import PreferenceBatch
from dpo_jax.weights.opened import open_checkpoint

Answers = list[tuple[list[int], Response]]
"""Prompt ids and response of each generated text."""


def evaluate(run: EvalRun) -> dict[str, Any]:
    """Judge `run.model`; print tables, write `run.out` if it is given, and return what is in it. Raises `InputError`.

    A reward model is judged by `evaluate_rewards.evaluate`. Of a language model:

    The result holds `model`, `reference`, `data`, `pairs`, `dropped` (rows left out, by reason), the figures of
    `judgement.figures` and, with --samples, `statistics.kl_estimates` (where there is a reference and the answers are
    drawn: neither greedy nor beams); under `tables` the groups, and under `samples` the answers' `text_health` and the
    share of them that end by themselves.
    """
    place = open_checkpoint(run.model)
    if place.architecture.num_labels:
        return evaluate_rewards.evaluate(run)
    if run.judge is not None or run.report is not None:
        raise InputError(f"--judge and --report have no effect: {run.model} is no reward model")
    setting = Setting.of(run.mesh, run.data, run)
    out = None if run.out is None else check_output(run.out, run.data.files)
    tokenizer, dataset = load_data(place, run.data.files, run.data, run.on_bad_rows)
    beta = run.settled.beta

    model, variables = setting.load(place, tokenizer)
    policy = setting.logps(model, variables, dataset, "log-probabilities")
    answers: Answers = []
    written = None
    if run.samples is not None:
        answers = _answer(run, setting, model, variables, tokenizer, dataset)
        if run.reference is not None and run.sample.temperature > 0 and run.sample.beams is None:
            written = _answer_logps(setting, model, variables, answers, run.sample.temperature)
    del variables  # one model at a time on the devices

    reference, kl = None, {}
    if run.reference is not None:
        model, variables = setting.load(run.reference, tokenizer)
        reference = setting.logps(model, variables, dataset, "log-probabilities under the reference")
        if written is not None:
            mask = np.arange(written.shape[1]) < np.array([len(answer.ids) for _, answer in answers])[:, None]
            under = _answer_logps(setting, model, variables, answers, run.sample.temperature)
            kl = kl_estimates(written, under, mask)

    lengths = dataset.response_lengths
    result = {
        "model": run.model,
        "reference": run.reference,
        "data": run.data.files,
        "pairs": len(dataset),
        "dropped": dict(dataset.dropped),
        "cut": dict(cuts.counts(dataset.cuts)),
        **judgement.figures(policy, lengths, reference, beta=beta),
        **kl,
        "tables": judgement.tables(policy, lengths, reference, dataset.extras, beta=beta),
        "samples": _health([answer for _, answer in answers]) if answers else None,
    }
    _show(result)
    if out is not None:
        write_json(out, result)
        say(f"{out}: written")
    return result


def _answer(
    run: EvalRun,
    setting: Setting,
    model: Llama,
    variables: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PreferenceDataset,
) -> Answers:
    """The model's answers to the prompts of the first `run.samples` usable rows."""
    encoder = ConversationEncoder.of(tokenizer, run.data)
    wanted = set(dataset.row_numbers[: run.samples].tolist())
    prompts: list[list[int]] = []
    new = run.sample.max_new_tokens
    longest = min(run.data.prompt_room(new), max(model.config.max_position - new, 1))
    cut = 0
    rows = CheckedRows(run.data.files, run.data.limit, columns=run.data.columns, compared=True)
    for number, row in rows.together():
        if number in wanted and not isinstance(row, BadRow):
            pair = parse_preference(row)
            prompt = pair.raw[0] if run.data.template == "raw" and pair.raw is not None else pair.messages
            prompts.append(encoder.prompt_ids(prompt, max_length=longest))
            cut += len(encoder.prompt_ids(prompt)) > longest
        if len(prompts) == len(wanted):
            break
    if cut:
        say(f"{run.data.files}: {cut} prompts to answer cut at their beginning, to {longest} tokens")
    sizes: dict[str, Any] = {"batch_size": setting.batch_size, "mesh": setting.mesh}
    writer = Writer(lambda: (model, variables), tokenizer, encoder, run.sample, **sizes)
    answers: dict[int, Response] = {}
    with ProgressBar("answers", len(prompts)) as bar:
        for some in writer.responses(prompts, [(i, 0) for i in range(len(prompts))], seed=run.seed):
            answers |= {i: response for (i, _), response in some}
            bar.update(len(answers))
    return [(prompt, answers[i]) for i, prompt in enumerate(prompts)]


def _answer_logps(setting: Setting, model: Llama, variables: Any, answers: Answers, temperature: float) -> np.ndarray:
    """float64 [N, R] log-probability of each token of the answers; R is the longest one's length."""
    longest_prompt = max(len(prompt) for prompt, _ in answers)
    longest = max(len(answer.ids) for _, answer in answers)
    size = setting.batch_size

    def padded(rows: list[list[int]], width: int) -> np.ndarray:
        table = np.zeros((size, width), np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row)] = row
        return table

    def forward(variables: Any, batch: PreferenceBatch) -> jax.Array:
        return response_logps(model.apply, variables, batch, temperature=temperature)

    jitted = jax.jit(forward, out_shardings=replicated(setting.mesh))
    parts = []
    for start in range(0, len(answers), size):
        part = answers[start : start + size]
        filler = size - len(part)
        arrays: dict[str, Any] = {
            "prompts": padded([prompt for prompt, _ in part], longest_prompt),
            "prompt_lengths": np.array([len(prompt) for prompt, _ in part] + [1] * filler, np.int32),
            "responses": padded([answer.ids for _, answer in part], longest)[:, None],
            "response_lengths": np.array([len(answer.ids) for _, answer in part] + [0] * filler, np.int32)[:, None],
            "weights": np.array([1.0] * len(part) + [0.0] * filler, np.float32),
            "rows": np.full(size, -1, np.int32),
        }
        batch = PreferenceBatch(**arrays)
        with jax.set_mesh(setting.mesh):
            parts.append(np.asarray(jitted(variables, put_batch(setting.mesh, batch)))[: len(part), 0])
    return np.concatenate(parts).astype(np.float64)


def _health(answers: list[Response]) -> dict[str, Any]:
    """`text_health` without the terminators, and `finished`: the share of answers that have one."""
    stopped = [answer.finish_reason == "stop" for answer in answers]
    bodies = [answer.ids[:-1] if stop else answer.ids for answer, stop in zip(answers, stopped, strict=True)]
    return {**texts.health(bodies), "finished": float(np.mean(stopped))}


def _show(result: dict[str, Any]) -> None:
    """The result as tables on stdout."""
    head = ("figure", "chosen", "rejected")
    both = [name.removesuffix("/chosen") for name in result if name.endswith("/chosen")]
    cells = [(name, *(f"{result[f'{name}/{side}']:.4f}" for side in head[1:])) for name in sorted(both)]
    title = f"{result['model']} on {result['pairs']:,} pairs of {result['data']}"
    tables = [terminal.table(title, html.Table(head, cells), left=1)]

    sides = {f"{name}/{side}" for name in both for side in ("chosen", "rejected")}
    cells = [(n, f"{value:.4f}") for n, value in result.items() if n.startswith("eval_") and n not in sides]
    cells += [(f"samples/{name}", _told(value)) for name, value in (result["samples"] or {}).items()]
    tables.append(terminal.table("whole pairs and texts", html.Table(("figure", "value"), cells)))

    for column, rows in result["tables"].items():
        names = [name for name in rows[0] if name != "value"]
        cells = [
            ("(none)" if row["value"] is None else str(row["value"]), *(_told(row[name]) for name in names))
            for row in rows
        ]
        tables.append(terminal.table(f"by {column}", html.Table((column, *names), cells)))
    terminal.show(*tables)


def _told(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
