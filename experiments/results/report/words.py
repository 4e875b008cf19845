"""Text on the page: prompts with what an attack changed in them, and no character that plays tricks on a reader."""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple

from diffusion.text_files import visible

_TOKENS = re.compile(r"\w+|[^\w\s]")


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


def shown(text: str) -> str:
    r"""``text`` with every character that a browser would hide, obey or refuse written out; ends of lines stay.

    >>> print(shown("a\x00b\u202ec"))
    a\x00b\u202ec
    """
    return "\n".join(map(visible, text.split("\n")))


def readable(name: str) -> str:
    """A name as prose has it: ``van_gogh`` is van gogh."""
    return name.replace("_", " ")


def concept_name(summary: Mapping[str, Any]) -> str:
    """What was erased, as prose has it; styles are called by their artists' names."""
    name = readable(summary["concept"])
    return name.title() if summary["config"]["concept"].get("kind") == "style" else name
