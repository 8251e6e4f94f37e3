"""What the length limits cut off rows that are used: told row by row, counted, named."""

from collections.abc import Sequence
from typing import NamedTuple


class RowCut(NamedTuple):
    """What a row lost.

    Attributes:
      prompt: tokens off the beginning of its prompt.
      responses: how many of its responses lost their end.
      system: its prompt began with a system message, which is therefore gone, or a part of it.
    """

    prompt: int = 0
    responses: int = 0
    system: bool = False

    def told(self) -> str:
        """What the prompt lost, in words, with a comma in front; empty where it is whole."""
        system = ", of its system message among them" if self.system else ""
        return f", {self.prompt} tokens cut off the prompt's beginning{system}" if self.prompt else ""


def counts(cuts: Sequence[RowCut]) -> list[tuple[str, int]]:
    """(what was cut, in how many rows), for a report."""
    return [
        ("prompts cut at their beginning", sum(cut.prompt > 0 for cut in cuts)),
        ("system messages lost with it, in whole or in part", sum(cut.system for cut in cuts)),
        ("rows with a response cut at its end", sum(cut.responses > 0 for cut in cuts)),
    ]


def summary(cuts: Sequence[RowCut]) -> str:
    """One line for the log; empty where nothing was cut."""
    told = "; ".join(f"{count} {what}" for what, count in counts(cuts) if count)
    return f"too long for --data.max_length or --data.max_prompt_length: {told}" if told else ""
