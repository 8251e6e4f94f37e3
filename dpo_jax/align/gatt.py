"""Ghost Attention: Llama 2's way to make an instruction hold for a whole dialogue.

Touvron et al. 2023 (arXiv 2307.09288), section 3.3 and appendix A.3.5. With user messages u₁ … u_n, answers a₁ … a_n
and an instruction i that all answers are to respect:

    sampling   u₁' a₁ u₂' a₂ … u_n' -> a_n     with u_t' = i + u_t in every turn t
    training   u₁' a₁ u₂  a₂ … u_n  -> a_n     the instruction in the first turn only;
               loss  −Σ_k log π(a_n,k | …)     nothing but the last answer counts: zero on all tokens of earlier turns,
                                               a₁ … a_{n−1} included, which were made with more than the model sees now

The same dialogue without the loss, i in the first turn only, is how the model is asked later, and how it is judged:
which answers a_t keep to i, turn by turn?
"""

from collections.abc import Sequence
from typing import Literal

from dpo_jax.data.rows.messages import Message

TRAIN_ON: Literal["last"] = "last"
"""How `data/tokens/encode_dialogue.py` calls a loss on the last answer alone: none on the earlier turns."""

JOINT = "\n\n"
"""Between an instruction and what the user says."""

Where = Literal["every", "first"]
"""Which user turns hold the instruction."""


def conversation(
    instruction: str, users: Sequence[str], answers: Sequence[str], *, where: Where
) -> tuple[Message, ...]:
    """The dialogue so far as messages: u₁' a₁ u₂ a₂ …

    Args:
      instruction: i.
      users: u₁ … u_n.
      answers: a₁ … a_n, or one less, to ask for a_n.
      where: "every": u_t' = i + u_t in all turns, to sample with. "first": in the first alone.
    """
    assert len(users) - len(answers) in (0, 1), "user and assistant take turns"
    messages = []
    for t, user in enumerate(users):
        said = f"{instruction}{JOINT}{user}" if where == "every" or t == 0 else user
        messages.append(Message("user", said))
        if t < len(answers):
            messages.append(Message("assistant", answers[t]))
    return tuple(messages)


def asking(instruction: str, users: Sequence[str], answers: Sequence[str], *, where: Where) -> tuple[Message, ...]:
    """What the model reads before it writes the answer behind `answers`: turn len(answers) + 1 of the dialogue."""
    return conversation(instruction, users[: len(answers) + 1], answers, where=where)


def training_form(
    instruction: str, users: Sequence[str], answers: Sequence[str], *, turn: int | None = None
) -> tuple[Message, ...]:
    """The dialogue that trains a_turn (counted from 1; not given: the last answer); the loss is `TRAIN_ON`.

    `instruction` may be a terser form than the answers were sampled with.
    """
    n = len(answers) if turn is None else turn
    return conversation(instruction, users[:n], answers[:n], where="first")
