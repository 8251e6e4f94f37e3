"""Openings of reviews that say nothing yet about whether the reviewer was pleased: the prompts of `dpo-jax demo`.

`python -m dpo_jax.complete.openings > openings.jsonl` writes them as a file of prompts.
"""

import json
import random

_READING = (
    "I finished {} last night and",
    "My review of {}: I thought",
    "About halfway through {}, I",
    "People ask me what I made of {}. It was",
    "The author of {} writes in a way that",
)
_WATCHING = (
    "I watched {} yesterday and",
    "My review of {}: the acting was",
    "When the lights came up after {}, I felt",
    "The ending of {} was",
    "We had heard a lot about {}. In the end it",
)
_EATING = (
    "We had dinner at {} on Friday and the food was",
    "My review of {}: the waiter",
    "I ordered the soup at {} and it",
    "After an hour at {}, we",
    "The first thing you notice at {} is",
)
_STAYING = (
    "We stayed at {} for two nights and the room",
    "My review of {}: the staff",
    "When we arrived at {}, the reception",
    "Breakfast at {} was",
    "I would describe my stay at {} as",
)
_USING = (
    "I have used {} for a month and",
    "My review of {}: it",
    "I bought {} for my sister, and she says it is",
    "The first time I switched on {}, it",
    "Compared with my old one, {} is",
)
_VISITING = (
    "We spent the afternoon at {} and",
    "My review of {}: I found it",
    "The people who work at {} are",
    "Would I go back to {}? I",
    "The tickets for {} cost us thirty dollars, and",
)
_SUBJECTS = {
    _READING: (
        "the new crime novel",
        "this history of the railways",
        "the biography of the painter",
        "his second book of poems",
        "the travel diary",
        "this guide to bread baking",
        "the science fiction trilogy",
        "her book about bees",
    ),
    _WATCHING: (
        "the film about the lighthouse",
        "the second season of the series",
        "the school play",
        "the new superhero movie",
        "this documentary about rivers",
        "the remake of the old western",
        "the puppet show",
        "the silent film with live piano",
    ),
    _EATING: (
        "the noodle bar on the corner",
        "the fish place by the harbour",
        "the new pizza place",
        "the cafe in the museum",
        "the steak house downtown",
        "the vegetarian buffet",
        "the taco truck",
        "the tea room",
    ),
    _STAYING: (
        "the hotel near the station",
        "the lodge in the mountains",
        "the guest house by the lake",
        "the hostel in the old town",
        "the airport motel",
        "the campsite",
        "the beach resort",
        "the farm with rooms to let",
    ),
    _USING: (
        "this coffee machine",
        "the cordless vacuum cleaner",
        "the new phone",
        "this electric toothbrush",
        "the noise-cancelling headphones",
        "the desk lamp",
        "this blender",
        "the robot lawn mower",
    ),
    _VISITING: (
        "the aquarium",
        "the modern art museum",
        "the jazz concert",
        "the climbing hall",
        "the castle tour",
        "the swimming pool",
        "the wine tasting",
        "the science fair",
    ),
}


def review_openings(seed: int) -> list[str]:
    """All 240 openings, in an order that depends on the seed."""
    openings = [stem.format(subject) for stems, subjects in _SUBJECTS.items() for subject in subjects for stem in stems]
    openings = [text[0].upper() + text[1:] for text in openings]
    random.Random(seed).shuffle(openings)
    return openings


if __name__ == "__main__":
    for opening in review_openings(seed=0):
        print(json.dumps({"prompt": opening}))
