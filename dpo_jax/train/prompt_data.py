"""Prompts of a run that learns from what the model writes: those that it learns from, and those that are held out."""

from collections.abc import Callable
from functools import partial
from typing import Any

from dpo_jax.config import JudgedRun, PPORun, SampledRun
from dpo_jax.data.rows.messages import MAX_TEXT
from dpo_jax.data.sets.prompts import PromptDataset, PromptLoader, load_prompts
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.train.row_data import read_alike
from dpo_jax.train.session import Training


def read_prompts(
    training: Training[Any], architecture: LlamaConfig, encoder: ConversationEncoder
) -> tuple[PromptDataset, PromptDataset | None]:
    """`--data`, and `--eval_data` where it is given; checked, and told.

    Raises `InputError` for a reward model, for bad rows, and for a prompt that leaves no room for its response in the
    model's context.
    """
    config: SampledRun = training.config
    if architecture.num_labels:
        raise InputError(f"--model {config.model}: is a reward model; the policy is a language model")
    tagged = isinstance(config, JudgedRun) and config.safety_reward is not None
    plays = isinstance(config, PPORun) and config.environment is not None

    def read(source: str) -> PromptDataset:
        found = load_prompts(
            source,
            encoder,
            config.data,
            longest=MAX_TEXT if plays else config.longest_prompt,  # an environment is given rows whole
            vocab_size=architecture.vocab_size,
            on_bad_rows=config.on_bad_rows,
            tagged=tagged,
        )
        check_context(config, found, architecture)
        return found

    data, heldout = read_alike(config.data.files, read), None
    if config.eval_data is not None:
        heldout = read_alike(config.eval_data, read)
        known = {data.ids[i].tobytes() for i in range(len(data))}
        shared = sum(heldout.ids[i].tobytes() in known for i in range(len(heldout)))
        if shared:
            training.say(f"--eval_data {config.eval_data}: {shared} of {len(heldout)} prompts are learnt from, too")
    training.told(data, heldout)
    return data, heldout


def loader_of(config: SampledRun, data: PromptDataset, *, rows: int, group: int = 1) -> Callable[..., PromptLoader]:
    """Makes the loader of `rows` responses a step, `group` to a prompt, of so many steps or epochs."""
    told: dict[str, Any] = {"seed": config.train.seed, "shuffle": config.data.shuffle}
    return partial(PromptLoader, data, batch_size=rows, group=group, **told)


def check_context(
    config: SampledRun, data: PromptDataset, architecture: LlamaConfig, *, whose: str = "model's"
) -> None:
    """Refuse a prompt that leaves no room for its response in the model's context. Raises `InputError`."""
    if isinstance(config, PPORun) and config.environment is not None:
        most, room = config.data.max_length, architecture.max_position
        if most > room:  # its first messages are not those of the data, and may be as long as is left
            raise InputError(f"--data.max_length {most} exceeds the {whose} context of {room}; lower it")
        return
    longest = int(data.ids.lengths.argmax())
    needed, room = int(data.ids.lengths[longest]) + config.response_room, architecture.max_position
    if needed > room:
        raise InputError(
            f"{data.source}, row {data.row_numbers[longest]}: {data.ids.lengths[longest]} tokens and"
            f" --sample.max_new_tokens {config.sample.max_new_tokens} (--data.max_length {config.data.max_length})"
            f" exceed the {whose} context of {room}; set --data.max_length to at most {room}"
        )
