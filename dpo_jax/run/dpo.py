"""`dpo-jax dpo`: from a model and a preference file to an aligned model, in the order in which it happens."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.align import dpo
from dpo_jax.config import DPOConfig, DPOLossConfig, DPORun
from dpo_jax.data.dataset import PreferenceDataset, load_preferences
from dpo_jax.data.loader import PreferenceLoader, eval_batches
from dpo_jax.data.templates import RAW, ChatTemplate
from dpo_jax.errors import InputError
from dpo_jax.mesh import batch_parts, make_mesh
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama, shardings
from dpo_jax.run import distributed, report
from dpo_jax.run.folder import RunFolder, as_json
from dpo_jax.run.heldout import evaluator
from dpo_jax.run.log import MetricLog, Row, read_metrics, say, show_log
from dpo_jax.run.loop import Plan, fit
from dpo_jax.run.reference import add_reference
from dpo_jax.state import TrainState
from dpo_jax.weights import pretrained
from dpo_jax.weights.checkpoint import Checkpoints
from dpo_jax.weights.fingerprint import fingerprint
from dpo_jax.weights.pretrained import load_pretrained, save_pretrained
from dpo_jax.weights.source import resolve
from dpo_jax.weights.tokenizer import check_vocabulary, load_tokenizer


def train(config: DPORun) -> Path:
    """Run DPO; return the run folder. An unfinished run in `config.out` is resumed exactly, a finished one left alone.

    Raises `InputError` for bad input; everything that can be checked before the weights are read is checked before.
    """
    _check_options(config)

    # -------------------------------------------------------------- processes, devices, the run folder
    distributed.initialize(config.distributed)
    show_log()
    main = distributed.is_main()
    talk = say if main else (lambda text: None)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    _check_batch(config, mesh)
    out = Path(config.out)
    folder = RunFolder(out, "dpo", as_json(config), writes=main)
    status = folder.open()
    if status == "finished":
        talk(f"{out}: this run is finished (model in {out / 'model'}); to train again choose another --out")
        return out

    # -------------------------------------------------------------- the model's shape, before its weights
    architecture = read_architecture(config.model)
    shardings(Llama(architecture, lora=config.lora), mesh)
    vocabulary = architecture.vocab_size
    if config.reference is not None:
        vocabulary = min(vocabulary, read_architecture(config.reference).vocab_size)
    tokenizer = load_tokenizer(config.model)
    check_vocabulary(tokenizer, architecture)

    # -------------------------------------------------------------- data
    data = _load_data(config, config.source, tokenizer, vocabulary)
    heldout = None if config.eval_source is None else _load_data(config, config.eval_source, tokenizer, vocabulary)
    for dataset in (data, heldout):
        if dataset is not None:
            check_lengths(dataset, architecture)
            talk(dataset.summary())

    # -------------------------------------------------------------- options that follow from the data
    lengths = {"steps": config.train.steps, "epochs": config.train.epochs}
    if lengths == {"steps": None, "epochs": None}:
        lengths = {"steps": None, "epochs": 1.0}
    planned = _loader(config, data, **lengths)
    total = planned.total_steps
    resolved = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=total, epochs=None),
        optimizer=dataclasses.replace(config.optimizer, total_steps=config.optimizer.total_steps or total),
    )
    step_config = DPOConfig(
        **{f.name: getattr(config.dpo, f.name) for f in dataclasses.fields(DPOLossConfig)},
        optimizer=resolved.optimizer,
        accumulate=config.train.accumulate,
        layout=config.train.layout,
    )
    folder.claim(as_json(resolved))

    # -------------------------------------------------------------- weights and the reference policy
    model, variables = _load_model(config, mesh)
    starting = _fixed_part(config, variables)
    identity = {"the starting model": fingerprint(starting), "the data": data.fingerprint}
    reference = None
    if not step_config.reference_free:
        judge, judge_variables = (model, starting) if config.reference is None else _load_reference(config, mesh)
        if step_config.reference == "cached":
            # In the batches of the first epoch: their shapes are compiled anyway, and a short run needs no other rows.
            batches = planned.every_row()
            data = add_reference(data, judge, judge_variables, config=step_config, mesh=mesh, batches=batches)
            if heldout is not None:
                label = "reference log-probabilities of the evaluation data"
                batches = eval_batches(heldout, **_evaluation_shapes(config, mesh))
                whole = dataclasses.replace(step_config, accumulate=1)
                heldout = add_reference(
                    heldout, judge, judge_variables, config=whole, mesh=mesh, batches=batches, label=label
                )
        elif config.reference is not None or "adapters" not in variables:
            dtype = jnp.dtype(config.train.frozen_dtype or config.train.dtype)
            # A copy, not a view: the arrays of the starting model are given to the first step.
            reference = jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), {"params": judge_variables["params"]})
        del judge, judge_variables

    # -------------------------------------------------------------- state, and where it goes on
    state = dpo.init_state(model, variables, step_config, reference=reference)
    del variables, starting, reference
    checkpoints = Checkpoints(
        out / "checkpoints", keep=config.checkpoint.keep, best=config.checkpoint.best, identity=identity, say=talk
    )
    restored = checkpoints.restore(state)
    loader = _loader(config, data, steps=total, epochs=None)
    start = 0
    if restored is not None:
        state, start = restored.state, restored.step
        loader.set_state(restored.data)
        talk(f"{out}: going on after step {start} of {total}")
    else:
        talk(loader.summary())
    del restored

    # -------------------------------------------------------------- training
    evaluate = None
    if heldout is not None:
        evaluate = evaluator(heldout, config=step_config, mesh=mesh, **_evaluation_shapes(config, mesh))
    plan = Plan(
        steps=total,
        steps_per_epoch=loader.steps_per_epoch,
        checkpoint_every=config.checkpoint.every,
        eval_every=config.train.eval_every,
        save_after_eval=config.checkpoint.best is not None,
    )
    with MetricLog(out, total=total, start=start, writes=main) as log:
        outcome = fit(
            state,
            dpo.jit_train_step(step_config, mesh),
            loader,
            plan=plan,
            mesh=mesh,
            log=log,
            checkpoints=checkpoints,
            evaluate=evaluate,
        )
    checkpoints.close()
    loader.close()
    state = outcome.state
    if not outcome.finished:
        talk(f"{out}: stopped after step {outcome.step} of {total}, all saved; the same command goes on from there")
        return out

    # -------------------------------------------------------------- the aligned model, and the report
    if config.data.template not in (None, RAW):
        # Whoever loads the model is to speak to it as it was spoken to here.
        tokenizer.chat_template = ChatTemplate(tokenizer, config.data.template).jinja
    _export(config, out, model, state, tokenizer)
    if main:
        _write_report(out, resolved, data, heldout)
    distributed.barrier("run finished")
    folder.finish()
    talk(f"{out}: finished; the model is in {out / 'model'}, the report in {out / 'report.html'}")
    return out


def read_architecture(source: str | Path) -> LlamaConfig:
    """The architecture of a checkpoint; names and shapes of its tensors are checked too, without reading them."""
    return pretrained.read_architecture(resolve(source))


# ---------------------------------------------------------------- checks


def _check_options(config: DPORun) -> None:
    """Refuse options that would have no effect, or that contradict each other across sections."""
    live = config.dpo.reference == "live" and not config.dpo.reference_free
    best = config.checkpoint.best
    if config.reference is not None and config.dpo.reference_free:
        raise InputError(f"--reference has no effect: --dpo.loss {config.dpo.loss} has no reference policy")
    if config.dpo.reference == "live" and config.dpo.reference_free:
        raise InputError(f"--dpo.reference has no effect: --dpo.loss {config.dpo.loss} has no reference policy")
    if config.train.frozen_dtype is not None and not config.lora.rank and not live:
        raise InputError(
            "--train.frozen_dtype has no effect: nothing is frozen without --lora.rank or a live reference"
        )
    if config.train.eval_every is not None and config.eval_source is None:
        raise InputError("--train.eval_every has no effect without --eval_data")
    if best is not None and (config.eval_source is None or not best.startswith("eval_")):
        raise InputError(f"--checkpoint.best {best}: give --eval_data and a metric of it, such as eval_loss")


def _check_batch(config: DPORun, mesh: Mesh) -> None:
    parts = batch_parts(mesh) * config.train.accumulate
    if config.train.batch_size % parts:
        raise InputError(
            f"--train.batch_size {config.train.batch_size} does not divide by {parts} (devices that split the batch x"
            f" --train.accumulate); choose a multiple of {parts}"
        )


def check_lengths(dataset: PreferenceDataset, architecture: LlamaConfig) -> None:
    """Raise `InputError` where a row, as truncated, is longer than the model's context."""
    totals = dataset.prompt_lengths + dataset.response_lengths.max(axis=1)
    longest = int(totals.argmax())
    if totals[longest] > architecture.max_position:
        raise InputError(
            f"{dataset.source}, row {dataset.row_numbers[longest]}: {totals[longest]} tokens, and the model's context"
            f" is {architecture.max_position}; set --data.max_length to at most {architecture.max_position}"
        )


# ---------------------------------------------------------------- loading


def _load_data(config: DPORun, source: str, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> PreferenceDataset:
    unpaired = config.dpo.loss == "kto"
    return load_preferences(
        source,
        tokenizer,
        config.data,
        on_bad_rows=config.on_bad_rows,
        vocab_size=vocabulary,
        with_mismatched=unpaired,
        with_format_masks=config.dpo.mask_format_tokens,
        needs_pairs=not unpaired,
    )


def _loader(config: DPORun, data: PreferenceDataset, *, steps: int | None, epochs: float | None) -> PreferenceLoader:
    return PreferenceLoader(
        data,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        buckets=config.data.buckets,
        steps=steps,
        epochs=epochs,
        workers=config.data.workers,
    )


def _load_model(config: DPORun, mesh: Mesh) -> tuple[Llama, dict[str, Any]]:
    frozen = config.train.frozen_dtype or config.train.dtype
    return load_pretrained(
        config.model,
        mesh=mesh,
        dtype=jnp.dtype(frozen if config.lora.rank else "float32"),
        lora=config.lora,
        compute_dtype=jnp.dtype(config.train.dtype),
        remat=config.train.remat,
        attention=config.train.attention,
        seed=config.train.seed,
    )


def _load_reference(config: DPORun, mesh: Mesh) -> tuple[Llama, dict[str, Any]]:
    assert config.reference is not None
    model, variables = load_pretrained(
        config.reference,
        mesh=mesh,
        dtype=jnp.dtype(config.train.frozen_dtype or config.train.dtype),
        compute_dtype=jnp.dtype(config.train.dtype),
        remat="none",
        attention=config.train.attention,
    )
    live = config.dpo.reference == "live"
    if live and ("adapters" in variables or model.config != read_architecture(config.model)):
        raise InputError(
            f"--reference {config.reference}: a live reference must have the architecture of --model, and no adapters"
            " of its own; use --dpo.reference cached"
        )
    return model, variables


def _fixed_part(config: DPORun, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that give the starting policy: fresh adapters add nothing to it, those of an adapter folder do."""
    if config.lora.rank or "adapters" not in variables:
        return {"params": variables["params"]}
    if config.dpo.reference == "live":
        raise InputError(
            f"--model {config.model}: with an adapter folder a live reference would lack the adapters; use"
            " --dpo.reference cached, or merge them with dpo-jax convert first"
        )
    return dict(variables)


def _evaluation_shapes(config: DPORun, mesh: Mesh) -> dict[str, int]:
    """Batches without gradients: as large as in training, at least one row a device."""
    micro = config.train.batch_size // config.train.accumulate
    parts = batch_parts(mesh)
    return {"batch_size": math.ceil(micro / parts) * parts, "buckets": config.data.buckets}


# ---------------------------------------------------------------- results


def _export(config: DPORun, out: Path, model: Llama, state: TrainState, tokenizer: PreTrainedTokenizerBase) -> None:
    """`model/`, for everyone; under LoRA with the adapters merged, and `adapter/` with the adapters alone."""
    save_pretrained(out / "model", model, state.variables, tokenizer, source=config.model)
    if "adapters" in state.trainable:
        save_pretrained(out / "adapter", model, state.variables, tokenizer, source=config.model, merge=False)


def _write_report(out: Path, config: DPORun, data: PreferenceDataset, heldout: PreferenceDataset | None) -> None:
    rows: list[Row] = read_metrics(out / "metrics.jsonl")
    sections = [
        report.final_section(rows),
        report.training_section(rows),
        *(data_section(title, d) for title, d in (("Data", data), ("Evaluation data", heldout)) if d is not None),
        report.options_section(as_json(config)),
    ]
    summary = f"{config.model}, aligned with {config.source} in {config.train.steps} steps ({config.dpo.loss})."
    report.write_report(out / "report.html", "DPO run", summary, sections)


def data_section(title: str, data: PreferenceDataset) -> report.Section:
    """What was read, what was left out and why, and how long the texts are."""
    responses = data.response_lengths
    lengths: dict[str, np.ndarray] = {"prompt": data.prompt_lengths}
    lengths |= {
        name: column[column > 0] for name, column in (("chosen", responses[:, 0]), ("rejected", responses[:, 1]))
    }
    counts = [("rows read", data.rows_read), ("rows used", len(data))]
    counts += [(f"left out: {reason}", count) for reason, count in data.dropped.most_common()]
    return report.Section(
        title,
        note=data.source,
        plots=(report.lengths_plot("Lengths", lengths),),
        table=report.Table(("what", "rows"), counts),
    )
