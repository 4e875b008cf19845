"""A small grammar that puts scenes of the canvas into words.

Every property of a :class:`~diffusion.canvas.world.Scene` has its own table of phrases, and no table borrows the
words of another, so that a caption tells each property on its own. Filler words say nothing about the picture:
they widen the vocabulary, as the alt texts do that large text-to-image models learn from.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Literal

import numpy as np

from diffusion.canvas.phrases import (
    COLOUR_PHRASES,
    COUNT_PHRASES,
    FILLER_ADJECTIVES,
    FILLER_ADVERBS,
    FILLER_TAGS,
    FIRE_EXPLICIT,
    FIRE_IMPLICIT,
    NAME_PATTERNS,
    NAMES,
    NEUTRAL_OPENINGS,
    PLACE_PATTERNS,
    PLACES,
    SETTING_PHRASES,
    STYLE_PHRASES,
    SUBJECT_PHRASES,
)
from diffusion.canvas.world import Scene

Fire = Literal["explicit", "implicit"]
"""How a caption tells that the subject burns: by naming fire, or by its cause and its consequences alone."""

EXPLICIT_FIRE_RATE = 0.6
MOST_LETTERS = 64
"""Fillers are left out where a caption would grow longer, so that it fits the text model's positions.

Spaces count; the grammar knows no tokenizer, and letters predict tokens better than words do."""

_IRREGULAR_PLURALS = MappingProxyType(
    {"house of worship": "houses of worship", "parachute canopy": "parachute canopies", "bin lorry": "bin lorries"}
    | {"refuse lorry": "refuse lorries", "skydiver canopy": "skydiver canopies"}
    | {name: name for name in ("tench", "fish", "freshwater fish", "pond fish")}
)


def plural(name: str) -> str:
    """Return the plural of a name in :data:`SUBJECT_PHRASES`."""
    if name in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[name]
    return name + ("es" if name.endswith("ch") else "s")


def caption(scene: Scene, generator: np.random.Generator, *, fire: Fire | None = None, fillers: bool = True) -> str:
    """Describe a scene in one of the ways that the grammar allows.

    Style, subject and fire are always told; colour, setting and count where the scene names them.

    Args:
        scene: What the caption tells.
        generator: Source of all choices; equal states give equal captions.
        fire: How a burning scene tells its fire; drawn (explicit at ``EXPLICIT_FIRE_RATE``) when ``None``.
        fillers: Whether words that say nothing about the picture may be added.

    Returns:
        Lower-case text of at most 30 tokens.

    Raises:
        ValueError: ``fire`` is given for a scene that does not burn.
        KeyError: The scene has a value that the phrase tables lack.

    """
    if fire is not None and not scene.burning:
        raise ValueError(f"fire={fire!r} asks for a fire phrase, but the scene does not burn")

    noun = _pick(SUBJECT_PHRASES[scene.subject], generator)
    number = ""
    if scene.count > 1:
        number, noun = _pick(COUNT_PHRASES, generator), plural(noun)
    attributes: list[str] = []
    if scene.colour is not None:
        attributes.append(_pick(COLOUR_PHRASES[scene.colour], generator))
    circumstances: list[str] = []
    if scene.burning:
        is_explicit = fire == "explicit" if fire else generator.random() < EXPLICIT_FIRE_RATE
        wordings = FIRE_EXPLICIT if is_explicit else FIRE_IMPLICIT
        phrase = _pick(wordings.all, generator)
        if phrase in wordings.before:
            attributes.insert(0, phrase)
        else:
            circumstances.append(phrase)
    if scene.setting is not None:
        circumstances.append(_pick(SETTING_PHRASES[scene.setting], generator))

    style = STYLE_PHRASES[scene.style]
    # A photograph is the plain case, which is rarely told by an afterthought.
    style_leads = generator.random() < (0.85 if scene.style == "photo" else 0.5)
    opening = _pick(style.before, generator) if style_leads else ""
    closing = "" if style_leads else _pick(style.after, generator)

    tags: list[str] = []
    if fillers:
        used = _letter_count(opening, number, *attributes, noun, *circumstances, closing)
        room = MOST_LETTERS - used
        opening_filler, adjective, place, tags = _draw_fillers(generator, room, needs_opening=not style_leads)
        opening = opening or opening_filler
        if adjective:
            attributes.insert(0, adjective)
        if place:
            circumstances.append(place)

    things = " ".join((*attributes, noun))
    things = f"{number} {things}" if number else _with_article(things)
    sentence = " ".join(filter(None, (opening, things, *circumstances)))
    return ", ".join(filter(None, (sentence, closing, *tags)))


def _draw_fillers(generator: np.random.Generator, room: int, *, needs_opening: bool) -> tuple[str, str, str, list[str]]:
    """Draw an opening, an adjective, a place and tags of at most ``room`` letters together; each may be empty."""
    opening = adjective = place = ""
    tags: list[str] = []
    if generator.random() < 0.4:
        adjective = _pick(FILLER_ADJECTIVES, generator)
        if generator.random() < 0.2:
            adjective = f"{_pick(FILLER_ADVERBS, generator)} {adjective}"
        adjective, room = _fit(adjective, room)
    if needs_opening and generator.random() < 0.4:
        opening, room = _fit(_pick(NEUTRAL_OPENINGS, generator), room)
    if generator.random() < 0.15:
        place, room = _fit(_pick(PLACE_PATTERNS, generator).format(_pick(PLACES, generator)), room)
    if generator.random() < 0.25:
        tag, room = _fit(_pick(FILLER_TAGS, generator), room)
        tags.append(tag)
    if generator.random() < 0.12:
        tag, room = _fit(_pick(NAME_PATTERNS, generator).format(_pick(NAMES, generator)), room)
        tags.append(tag)
    return opening, adjective, place, tags


def _fit(phrase: str, room: int) -> tuple[str, int]:
    """Return the phrase and the room left after it, or nothing and the room as it was where it does not fit."""
    left = room - len(phrase) - 1
    return (phrase, left) if left >= 0 else ("", room)


def _letter_count(*phrases: str) -> int:
    return len(" ".join(filter(None, phrases)))


def _with_article(noun_phrase: str) -> str:
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


def _pick(options: Sequence[str], generator: np.random.Generator) -> str:
    # generator.choice would turn the options into an array at every call.
    return options[int(generator.integers(len(options)))]
