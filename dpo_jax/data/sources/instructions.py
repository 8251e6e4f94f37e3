"""Instructions that a whole dialogue is to respect: made from short lists, or read from a file.

Llama 2 (Touvron et al. 2023, section 3.3) makes them of a few kinds of constraints, alone and in random combinations,
and writes about half of them more tersely in the training data ("Always act as Napoleon from now" -> "Figure:
Napoleon."). The lists here are short and plain; a model can only keep to what it knows.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_jax.data.rows.messages import columns_of, text_of
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sources.attributes import LANGUAGE, SURE, Check, identify, keywords, parse_check
from dpo_jax.data.sources.checked_rows import CheckedRows, OnBadRows

KINDS = ("hobby", "language", "figure", "persona")
COLUMNS = ("instruction", "system_prompt", "system")
"""Any one of them holds the instruction of a row."""

# Name, and what an answer that brings it up names.
HOBBIES = (
    ("tennis", "tennis, racket, racquet"),
    ("gardening", "gardening, garden, gardens, gardener"),
    ("chess", "chess, checkmate, grandmaster"),
    ("cooking", "cooking, cook, kitchen, recipe"),
    ("photography", "photography, camera, photograph, photographs"),
    ("hiking", "hiking, hike, hikes, trail"),
    ("painting", "painting, paint, paintings, canvas"),
    ("fishing", "fishing, fish, angler"),
    ("cycling", "cycling, bicycle, bike, cyclist"),
    ("playing the guitar", "guitar, guitarist, chords"),
    ("bird-watching", "bird, birds, birdwatching, bird-watching, birding"),
    ("sailing", "sailing, sail, sailboat, boat"),
    ("knitting", "knitting, knit, yarn"),
    ("astronomy", "astronomy, telescope, stars, astronomer"),
    ("baking bread", "bread, baking, bake, sourdough"),
    ("swimming", "swimming, swim, pool"),
)
LANGUAGES = (
    ("Spanish", "es"),
    ("French", "fr"),
    ("German", "de"),
    ("Italian", "it"),
    ("Portuguese", "pt"),
    ("Dutch", "nl"),
    ("Polish", "pl"),
    ("Swedish", "sv"),
    ("Turkish", "tr"),
    ("Russian", "ru"),
    ("Arabic", "ar"),
    ("Hindi", "hi"),
    ("Chinese", "zh"),
    ("Japanese", "ja"),
    ("Korean", "ko"),
    ("English", "en"),
)
FIGURES = (
    ("Napoleon", "Napoleon, Bonaparte, emperor, Waterloo, Josephine"),
    ("Albert Einstein", "Einstein, relativity, physics, spacetime"),
    ("Cleopatra", "Cleopatra, Egypt, Nile, pharaoh, Alexandria"),
    ("William Shakespeare", "Shakespeare, thee, thou, thy, hath, doth, bard"),
    ("Marie Curie", "Curie, radium, radioactivity, polonium"),
    ("Leonardo da Vinci", "Leonardo, Vinci, Florence, Mona Lisa, inventions"),
    ("Julius Caesar", "Caesar, Rome, Roman, legions, Gaul"),
    ("Abraham Lincoln", "Lincoln, Union, Gettysburg, emancipation"),
    ("Mahatma Gandhi", "Gandhi, nonviolence, non-violence, India, satyagraha"),
    ("Wolfgang Amadeus Mozart", "Mozart, Vienna, Salzburg, symphony, opera"),
    ("Socrates", "Socrates, Athens, philosopher, Plato"),
    ("Isaac Newton", "Newton, gravity, Principia, calculus"),
    ("Joan of Arc", "Joan, Orleans, Arc, Dauphin"),
    ("Charles Darwin", "Darwin, evolution, Beagle, Galapagos, species"),
    ("Queen Victoria", "Victoria, Empire, Albert, Majesty"),
    ("Neil Armstrong", "Armstrong, moon, Apollo, lunar, astronaut"),
)
PERSONAS = (
    ("a pirate", "arr, arrr, ahoy, matey, aye, ye, treasure, captain"),
    ("a ship's cook", "galley, ship, stew, sailors, sea"),
    ("a medieval knight", "knight, sire, castle, sword, honour, honor, quest"),
    ("a cheerful robot", "robot, beep, circuits, processing, human"),
    ("a wise old wizard", "wizard, spell, magic, wand, apprentice"),
    ("a sports commentator", "goal, score, crowd, match, ladies and gentlemen"),
    ("a cowboy", "howdy, partner, yeehaw, ranch, saddle"),
    ("a detective", "case, clue, clues, evidence, mystery, detective"),
)

_SPOKEN = {
    "hobby": ("You love {}; bring it up in every answer.", "Hobby: {}."),
    "language": ("Always answer in {}.", "Language: {}."),
    "figure": ("Always act as {} from now on.", "Figure: {}."),
    "persona": ("Always talk like {}.", "Persona: {}."),
}


@dataclass(frozen=True)
class Instruction:
    """What holds for every answer of a dialogue.

    Attributes:
      text: as it is said.
      short: the same, tersely; None where there is no such form.
      checks: what an answer that keeps to it has, all of it; none where no check is known.
    """

    text: str
    short: str | None
    checks: tuple[Check, ...]


def constraints(kind: str, languages: Sequence[str] = ()) -> tuple[Instruction, ...]:
    """All single constraints of one of `KINDS`; of languages only those whose codes are given, if any are."""
    table = {"hobby": HOBBIES, "language": LANGUAGES, "figure": FIGURES, "persona": PERSONAS}[kind]
    text, short = _SPOKEN[kind]
    found = []
    for name, seen in table:
        if kind == "language" and languages and seen not in languages:
            continue
        spec = LANGUAGE + seen if kind == "language" else keywords(seen.split(", "))
        found.append(Instruction(text.format(name), short.format(name), (Check(kind, spec),)))
    return tuple(found)


def synthesise(
    count: int, *, seed: int, kinds: Sequence[str] = KINDS, combine: int = 1, languages: Sequence[str] = ()
) -> list[Instruction]:
    """`count` instructions, each of one to `combine` constraints of different kinds, each number as likely.

    A pure function of its arguments. They are all different as long as there are enough; the list then begins anew.
    """
    rng = random.Random(seed)
    tables = {kind: constraints(kind, languages) for kind in kinds}
    made: dict[str, Instruction] = {}
    tries = 0
    while len(made) < count and tries < 20 * count:
        tries += 1
        chosen = rng.sample(list(kinds), rng.randint(1, min(combine, len(kinds))))
        one = combined([rng.choice(tables[kind]) for kind in chosen])
        made.setdefault(one.text, one)
    distinct = list(made.values())
    return [distinct[i % len(distinct)] for i in range(count)]


def combined(parts: Sequence[Instruction]) -> Instruction:
    """Several instructions as one: all their checks hold."""
    shorts = [part.text if part.short is None else part.short for part in parts]
    short = None if all(part.short is None for part in parts) else " ".join(shorts)
    return Instruction(" ".join(part.text for part in parts), short, tuple(c for part in parts for c in part.checks))


# ---------------------------------------------------------------- files


def parse_instruction(row: dict[str, Any], languages: Sequence[str] = ()) -> Instruction:
    """Read a row: `instruction` (or `system_prompt`, `system`), and `short` and `check` where they are there.

    An instruction without `check` that is clearly not in English asks for answers in its own language: that is what is
    checked then (of languages only those whose codes are given, if any are). Raises `BadRow`.
    """
    row = {name: value for name, value in row.items() if value is not None}
    name = next((name for name in COLUMNS if name in row), None)
    if name is None:
        raise BadRow("no instruction", f"{columns_of(row)}; write it into 'instruction' or 'system_prompt'")
    text = text_of(row[name], name).strip()
    if not text:
        raise BadRow("empty instruction", f"'{name}' is blank; remove the row")
    short = text_of(row["short"], "short").strip() if "short" in row else None
    if short == "":
        raise BadRow("'short' is blank", "write the terse form of the instruction, or leave the column out")
    if "check" in row:
        return Instruction(text, short, (parse_check(text_of(row["check"], "check")),))
    code, confidence = identify(text)
    spoken = code != "en" and confidence > SURE and (not languages or code in languages)
    return Instruction(text, short, (Check("language", LANGUAGE + code),) if spoken else ())


def read_instructions(
    source: str, *, languages: Sequence[str] = (), on_bad_rows: OnBadRows = "refuse"
) -> tuple[Instruction, ...]:
    """The different instructions of a file, in order of first appearance; see `parse_instruction`.

    Raises `InputError` for an unreadable file, bad rows, or none that can be used.
    """
    read = CheckedRows(source, None).read(lambda row: parse_instruction(row, languages), on_bad_rows)
    return tuple(dict.fromkeys(read))
