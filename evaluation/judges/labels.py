"""Which of a classifier's labels is meant by the name of a concept, and whether it is among the most likely."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from torch import Tensor

from evaluation.verdicts import Verdicts

_SHOWN = 5


def find_label(name: str, labels: Sequence[str]) -> int:
    """The index of the label that ``name`` means, whatever the case and the separators.

    A label may list synonyms between commas, as ImageNet's do, and ``name`` must be one of them: ``garbage_truck`` is
    "garbage truck, dustcart". Where none is, the last words of a single label will do, as an artist's surname:
    ``van_gogh`` is "vincent-van-gogh".

    Raises:
        ValueError: No label fits, or several do.

    >>> find_label("van_gogh", ["claude-monet", "vincent-van-gogh"])
    1
    """
    words = _words(name)
    synonyms = [[_words(synonym) for synonym in label.split(",")] for label in labels]
    fitting = [index for index, known in enumerate(synonyms) if words in known]
    if not fitting:
        fitting = [index for index, known in enumerate(synonyms) if any(_ends(one, words) for one in known)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        several = ", ".join(repr(labels[index]) for index in fitting[:_SHOWN])
        raise ValueError(f"label is {name!r}, which fits {several}; write one of them.")
    spelt = {" ".join(one): label for label, known in zip(labels, synonyms, strict=True) for one in known}
    nearest = [spelt[close] for close in get_close_matches(" ".join(words), spelt, n=_SHOWN, cutoff=0.4)]
    known = f"the nearest are {', '.join(map(repr, nearest))}" if nearest else f"they are like {labels[0]!r}"
    raise ValueError(f"label is {name!r}, which is none of the classifier's {len(labels)} labels; {known}.")


def rank_label(scores: Tensor, probabilities: Tensor, labels: Sequence[str], index: int, top_k: int) -> Verdicts:
    """Verdicts by the place of one label: present where it is among the ``top_k`` best, scored by its probability.

    Ties count: a verdict hangs on the scores alone, not on the order of sorting. ``details`` names each picture's best
    ``label``.

    Args:
        scores: What labels are ranked by, float [n, labels].
        probabilities: Theirs, float [n, labels].
        labels: Their names.
        index: The label.
        top_k: How many of the best count.
    """
    better = (scores > scores[:, index, None]).sum(dim=1)
    return Verdicts(
        present=better < top_k,
        score=probabilities[:, index],
        details={"label": [labels[best] for best in scores.argmax(dim=1).tolist()]},
    )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold().replace("_", " "))


def _ends(words: Sequence[str], last: Sequence[str]) -> bool:
    return bool(last) and list(words[-len(last) :]) == list(last)
