"""A concept in one phrase, for methods that describe all of it to the text encoder at once."""

import logging
from itertools import zip_longest

from diffusion.model import TextToImage
from erasure.concept import Concept

log = logging.getLogger(__name__)


def joined_targets(model: TextToImage, concept: Concept) -> str:
    """The targets of all concepts in one phrase, separated by commas.

    Concepts take turns, so that each is named where the text encoder has no room for all targets; those that are left
    out are logged.
    """
    turns = zip_longest(*(part.targets for part in concept.parts))
    targets = list(dict.fromkeys(target for turn in turns for target in turn if target is not None))
    fitting = list(targets)
    while len(fitting) > 1 and not _fits(model, ", ".join(fitting)):
        fitting.pop()
    if len(fitting) < len(targets):
        log.info("%r has no room for the targets %s", model.name, ", ".join(targets[len(fitting) :]))
    return ", ".join(fitting)


def _fits(model: TextToImage, phrase: str) -> bool:
    ids = model.tokenizer(phrase, truncation=True, max_length=model.max_tokens + 1).input_ids
    return len(ids) <= model.max_tokens
