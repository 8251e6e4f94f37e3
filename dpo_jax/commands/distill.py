"""`dpo-jax distill`: from a student, a teacher and prompts to a better student, in the order in which it happens."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dpo_jax.align import distill, ppo
from dpo_jax.config import DistillRun
from dpo_jax.data.sets.prompts import PromptDataset, load_answered_prompts
from dpo_jax.data.sets.tokenised import fingerprint_of
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.ragged import Ragged
from dpo_jax.errors import InputError
from dpo_jax.files.log import read_metrics
from dpo_jax.files.sample_log import SampleLog
from dpo_jax.mesh import batch_parts
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.report.datasets import prompts_section
from dpo_jax.train.answered import Policy
from dpo_jax.train.distillation import StudentResponses
from dpo_jax.train.fixed_prompts import FixedPrompts
from dpo_jax.train.flops import ModelFlops, distill_flops
from dpo_jax.train.prompt_data import check_context, loader_of, read_prompts
from dpo_jax.train.row_data import files_alike, rows_alike
from dpo_jax.train.session import Training
from dpo_jax.weights.integrity.fingerprint import fingerprint
from dpo_jax.weights.opened import StoredModel, open_checkpoint
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import check_vocabulary


def train(config: DistillRun) -> Path:
    """Run the distillation; return the run folder. Resumed and refused as every training (`train/session.py`)."""
    training = Training.begin(config, "distill")
    if training is None:
        return Path(config.out)
    mesh = training.mesh
    config.check_sizes(batch_parts(mesh))

    # -------------------------------------------------------------- the shapes of both models, the prompts
    architecture, tokenizer = training.read_model_shape()
    config = training.config
    teacher = open_checkpoint(config.teacher, merged=True)
    if teacher.has_adapters:
        raise InputError(f"--teacher {config.teacher}: is an adapter folder; merge it with dpo-jax convert first")
    for name, shape in (
        (f"--model {config.model}", architecture),
        (f"--teacher {config.teacher}", teacher.architecture),
    ):
        if shape.num_labels:
            raise InputError(f"{name}: is a reward model; student and teacher are language models")
    vocabulary = _one_vocabulary(config, tokenizer, teacher)
    encoder = ConversationEncoder.of(tokenizer, config.data)
    data, answers = _read(training, architecture, encoder)
    samples = FixedPrompts.of(config, tokenizer, architecture, data)
    check_context(config, data, teacher.architecture, whose="teacher's")

    # -------------------------------------------------------------- options that follow from the data
    loader = loader_of(config, data, rows=config.train.batch_size)
    planned = loader(**training.length)
    step_config = training.resolve(planned.total_steps).step_config(vocabulary)

    # -------------------------------------------------------------- weights: student and teacher
    model, variables = training.load_model()
    kept = jnp.dtype(config.teacher_dtype)
    judge, judged_by = load_pretrained(teacher, mesh=mesh, dtype=kept, remat="none", attention=config.train.attention)
    starting = {"params": variables["params"]} if config.lora.rank else variables
    identity = {
        "the starting model": fingerprint(starting),
        "the teacher": fingerprint(judged_by),
        "the prompts": data.fingerprint,
    }
    if answers is not None:
        identity["the answers of the data"] = fingerprint_of((answers.values, answers.starts))
    flops = ModelFlops.of(architecture, model.lora if "adapters" in variables else None)
    training.say(flops.describe())
    state = distill.init_state(model, variables, judged_by, step_config)
    del variables, judged_by, starting
    how: dict[str, Any] = {"rows": config.train.batch_size, "vocabulary": vocabulary, "held": state}
    policy = Policy.of(config, state, model, tokenizer, encoder, mesh, **how)

    # -------------------------------------------------------------- training
    responses = StudentResponses(
        policy,
        data,
        loader(steps=planned.total_steps, epochs=None),
        SampleLog(training.out / "samples.jsonl", writes=training.main),
        answers=answers,
        on_policy=config.distill.on_policy,
    )
    final = training.fit(
        state,
        distill.jit_train_step(step_config, mesh, judge.apply),
        responses,
        identity=identity,
        flops_of=distill_flops(flops, ModelFlops.of(teacher.architecture, None)),
        prepare=responses.prepare,
        sample=None if samples is None else samples.answered_by(model, mesh, training.out, like=policy.sample),
    )

    # -------------------------------------------------------------- the student, and the report
    rows = read_metrics(training.out / "metrics.jsonl")
    told = f"Divergence {rows[0]['loss']:.4f} nats a token in the first step and {rows[-1]['loss']:.4f} in the last."
    training.say(told)
    return training.finish(
        model,
        ppo.policy_of(final.variables),
        tokenizer,
        title="Distillation",
        summary=f"{config.model}, distilled from {config.teacher} on {config.data.files} in {training.told_steps}."
        f" {told}",
        sections=[prompts_section(data)],
        terminators=encoder.terminators,
    )


def _one_vocabulary(config: DistillRun, tokenizer: Any, teacher: StoredModel) -> int:
    """Ids of text, the same for both. Raises `InputError` where the two tokenizers are not one."""
    theirs = teacher.tokenizer()
    check_vocabulary(theirs, teacher.architecture)
    ours, others = tokenizer.get_vocab(), theirs.get_vocab()
    if ours != others:
        differ = len(set(ours.items()) ^ set(others.items()))
        raise InputError(
            f"--teacher {config.teacher}: has another vocabulary than --model {config.model} ({len(others)} and"
            f" {len(ours)} tokens, {differ} of which differ), and distributions over tokens are compared; take a"
            " teacher with the same tokenizer, or learn its texts with dpo-jax sft"
        )
    return max(ours.values()) + 1


def _read(
    training: Training[DistillRun], architecture: LlamaConfig, encoder: ConversationEncoder
) -> tuple[PromptDataset, Ragged | None]:
    """The prompts, and the data's answers where they are learnt on."""
    config = training.config
    if config.distill.on_policy == 1:
        return read_prompts(training, architecture, encoder)[0], None
    source = config.data.files
    files_alike(source)
    data, answers = load_answered_prompts(
        source,
        encoder,
        config.data,
        longest=config.longest_prompt,
        answer=config.response_room,
        vocab_size=architecture.vocab_size,
        on_bad_rows=config.on_bad_rows,
    )
    rows_alike(source, data)
    check_context(config, data, architecture)
    training.told(data, None)
    return data, answers
