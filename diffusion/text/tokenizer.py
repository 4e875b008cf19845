"""CLIP's tokenizer with the clean-up of text that its authors give it."""

from collections.abc import Sequence
from typing import Any

import ftfy


class CleaningTokenizer:
    """A tokenizer of transformers that reads every text as CLIP's authors do: mended by ftfy first.

    CLIP and its text encoders in Stable Diffusion were trained on texts after ``ftfy.fix_text``, which straightens
    quotes, takes ligatures apart and mends what was decoded in a wrong way. The tokenizer of transformers did so as
    long as it was written in Python; the one of today leaves it out.

    Everything but the reading of text is the tokenizer's own.

    Args:
        plain: The tokenizer.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __call__(self, text: str | Sequence[str], **options: Any) -> Any:
        """Encode text as the tokenizer does once it is cleaned; ``options`` are the tokenizer's."""
        return self.plain(cleaned(text) if isinstance(text, str) else [cleaned(one) for one in text], **options)

    def __len__(self) -> int:
        return len(self.plain)

    def __getattr__(self, name: str) -> Any:
        if name == "plain":  # asked for before it is there, by copy and pickle
            raise AttributeError(name)
        return getattr(self.plain, name)


def cleaned(text: str) -> str:
    r"""``text`` after ftfy.

    >>> cleaned("Vincent van Gogh\u2019s \ufb01elds")
    "Vincent van Gogh's fields"
    """
    # Most prompts have nothing to mend, and attacks read thousands.
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    return ftfy.fix_text(text)
