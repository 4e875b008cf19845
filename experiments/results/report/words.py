"""Text on the page: prompts with what an attack changed in them, and no character that plays tricks on a reader."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple

_TOKENS = re.compile(r"\w+|[^\w\s]")

_CONTROL_PICTURES = 0x2400
"""Where Unicode keeps a picture of every control character from 0 to 31."""


class Piece(NamedTuple):
    """A part of a prompt: in both prompts, in the attack's alone, or in the plain one alone."""

    text: str
    kind: Literal["same", "inserted", "removed"]


def marked(plain: str, adversarial: str) -> list[Piece]:
    """The adversarial prompt beside the plain one, word by word and sign by sign, whatever spaces are between them.

    >>> [tuple(piece) for piece in marked("a red church, old", "a xqz red church , odd")]
    [('a', 'same'), ('xqz', 'inserted'), ('red church ,', 'same'), ('old', 'removed'), ('odd', 'inserted')]
    """
    before, after = (list(_TOKENS.finditer(text)) for text in (plain, adversarial))
    words, new_words = ([token[0].lower() for token in tokens] for tokens in (before, after))
    pieces: list[Piece] = []
    for tag, start, end, new_start, new_end in SequenceMatcher(None, words, new_words, autojunk=False).get_opcodes():
        if tag in {"replace", "delete"}:
            pieces.append(Piece(_between(plain, before[start:end]), "removed"))
        if tag != "delete":
            found = _between(adversarial, after[new_start:new_end])
            pieces.append(Piece(found, "same" if tag == "equal" else "inserted"))
    return pieces


def _between(text: str, tokens: Sequence[re.Match[str]]) -> str:
    return text[tokens[0].start() : tokens[-1].end()]


def visible(text: str) -> str:
    r"""``text`` with every character that a browser would hide, obey or refuse shown as a sign of its own.

    Control characters become their pictures, and those that turn the direction of writing, or that have no width, or
    that no file can hold, their numbers. Tabs and ends of lines stay.

    >>> visible("a\x00b\u202ec")
    'a␀b⟨U+202E⟩c'
    """
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\t\n":
        return character
    if code < 0x20:
        return chr(_CONTROL_PICTURES + code)
    if code == 0x7F:
        return "␡"
    # Other controls, marks of format, lone halves of surrogate pairs, and what Unicode says is no character.
    if unicodedata.category(character) in {"Cc", "Cf", "Cs"} or code & 0xFFFE == 0xFFFE:
        return f"⟨U+{code:04X}⟩"
    return character


def readable(name: str) -> str:
    """A name as prose has it: ``van_gogh`` is van gogh."""
    return name.replace("_", " ")


def concept_name(summary: Mapping[str, Any]) -> str:
    """What was erased, as prose has it; styles are called by their artists' names."""
    name = readable(summary["concept"])
    return name.title() if summary["config"]["concept"].get("kind") == "style" else name
