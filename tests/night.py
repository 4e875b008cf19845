"""Cases of parametrised tests that wait for the night (``make slow``): other values on a quick case's way."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def nightly(*values: object) -> Any:
    """One case, with as many values as the test has parameters."""
    return pytest.param(*values, marks=pytest.mark.slow)


def all_but(quick: Collection[str], names: Iterable[str]) -> list[Any]:
    """``names`` as cases, all of which wait but those in ``quick``.

    Raises:
        ValueError: A name in ``quick`` is not among them, so that nothing would be tested by day.
    """
    names = list(names)
    if unknown := [name for name in quick if name not in names]:
        raise ValueError(f"quick is {unknown}; it must be among {', '.join(names)}.")
    return [name if name in quick else nightly(name) for name in names]
