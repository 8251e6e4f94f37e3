"""Heads of a model in files.

The score of a reward model is `score.weight` among the weights of a `LlamaForSequenceClassification` folder, which
`transformers` loads (in an adapter folder: among the adapters, as PEFT's `modules_to_save`). All other heads stand
beside the weights in `heads.safetensors`: for each head NAME one tensor `NAME.weight`, float32 [n, D]; in the header,
as JSON, the classes that the n outputs stand for, where they were named.

`transformers` scores at the last token that is not the pad token, so a reward model must not be padded with a token
that ends answers: `padded_apart` chooses another.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import ClassHead
from dpo_jax.errors import InputError
from dpo_jax.model import heads
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.llama import Llama
from dpo_jax.weights.huggingface import layout, shards

FILE = "heads.safetensors"
_CLASSES = "classes"


def target_of(model: Llama, sizes: Mapping[str, int], mesh: Mesh | None) -> Any:
    """Shape, dtype and place of every head."""
    places = None if mesh is None else heads.shardings(model, sizes, mesh)
    return layout.placed(heads.abstract_heads(model, sizes), places, jnp.float32)


def load_score(model: Llama, read: layout.Read, mesh: Mesh | None, prefix: str = "") -> dict[str, Any]:
    """{"score": ...} from the tensors of a reward model, or of an adapter file."""
    slot = layout.score_slot(model.config, prefix)
    return layout.load_tree([slot], read, target_of(model, {heads.SCORE: 1}, mesh))


def load_others(file: Path, model: Llama, mesh: Mesh | None) -> dict[str, Any]:
    """The heads in a `heads.safetensors`; none where there is no such file."""
    if not file.is_file():
        return {}
    reader = shards.SafetensorsReader(file.parent, [FILE])
    width, sizes = model.config.hidden_size, {}
    for key, shape in reader.shapes.items():
        name = key.removesuffix(".weight")
        if name == key or name == heads.SCORE or len(shape) != 2 or shape[1] != width:
            raise InputError(f"{file}: tensor {key} {shape} is not a head NAME.weight of [n, {width}]")
        sizes[name] = shape[0]
    target = target_of(model, sizes, mesh)
    return layout.load_tree(layout.head_slots(target), reader.read, target)


def read_classes(file: Path) -> tuple[ClassHead, ...]:
    """The heads whose classes a `heads.safetensors` names (weight 1). Raises `InputError`."""
    if not file.is_file():
        return ()
    found = []
    shapes = shards.SafetensorsReader(file.parent, [FILE]).shapes
    try:
        for name, told in json.loads(shards.read_metadata(file).get(_CLASSES, "{}")).items():
            head = ClassHead(name, tuple(map(str, told["classes"])), 1.0, bool(told["overlapping"]))
            if len(head.classes) != shapes[f"{name}.weight"][0]:
                raise ValueError(f"{len(head.classes)} classes of {name}")
            found.append(head)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"what its header says of classes does not fit its heads ({error})"
        raise InputError(f"{file}: {problem}; export the model again") from error
    return tuple(found)


def write_others(folder: Path, tensors: Mapping[str, np.ndarray], classes: Sequence[ClassHead]) -> None:
    """Write `heads.safetensors`, where there is a head beside the score. For one process; see `gathered`."""
    if not tensors:
        return
    shapes = {f"{name}.weight": values.shape for name, values in tensors.items()}
    named = {h.name: {"classes": h.classes, "overlapping": h.overlapping} for h in classes if h.name in tensors}
    shards.write_file(
        folder / FILE, shapes, iter(tensors.values()), np.float32, {_CLASSES: json.dumps(named)} if named else {}
    )


def gathered(collection: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every head but the score, [n, D], whole on the host of process 0. All processes call this together."""
    others = {name: leaf for name, leaf in collection.items() if name != heads.SCORE}
    slots = layout.head_slots(others)
    return dict(zip((slot.path[0] for slot in slots), layout.tensors(slots, others, np.float32), strict=True))


def as_reward_model(model: Llama, variables: Mapping[str, Any]) -> tuple[Llama, dict[str, Any]]:
    """The same model as a reward model: without the output matrix of a language model."""
    params = {name: leaf for name, leaf in variables["params"].items() if name != "lm_head"}
    config = dataclasses.replace(model.config, num_labels=1)
    return model.clone(config=config), {**variables, "params": params}


def padded_apart(
    config: LlamaConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[LlamaConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer (a copy) whose pad token never is the last token of a rendered text.

    The pad token that is there, else the unknown token, BOS, or another special token: the first that is neither EOS
    nor spelled in the chat template, and has a row in the embedding. Raises `InputError` where there is none to spare.
    """
    added = sorted(tokenizer.added_tokens_decoder.items())
    special = [i for i, token in added if token.special]
    # A template writes the end of a turn either as the tokenizer's EOS or as a token that it spells out.
    template = str(tokenizer.chat_template or "")
    enders = {*config.eos_token_ids, cast(int | None, tokenizer.eos_token_id)}
    enders |= {i for i, token in added if token.content in template}
    named = [config.pad_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    known = {i for i in tokenizer.get_vocab().values() if i < config.vocab_size}
    spare = next((i for i in cast(list[int], [*named, *special]) if i in known and i not in enders), None)
    if spare is None:
        raise InputError(
            "the tokenizer has no special token but those that end an answer, and transformers scores at the last token"
            " that is not padding; add a pad token to the tokenizer, and a row for it to the model"
        )
    changed = copy.deepcopy(tokenizer)
    changed.pad_token = cast(str, tokenizer.convert_ids_to_tokens(spare))
    return dataclasses.replace(config, pad_token_id=spare), changed
