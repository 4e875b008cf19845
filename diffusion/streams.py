"""Where random numbers come from: one stream for every seed, purpose and index, none of them like another.

A purpose is a text written where it is used, as ``"esd/noise"``: the place, a slash, what is drawn. No two places write
the same one, so that no two draws share their numbers by accident. Adding to a seed does not do this:
``torch.Generator().manual_seed`` keeps 32 bits of it, and seeds near each other meet.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_WORDS = 624
"""32-bit numbers that a Mersenne Twister's state consists of."""

_FIRST_BYTE = 24
"""Where they begin in a torch CPU generator's state, each in 8 bytes; before them are its seed and its place."""


def stream(seed: int, purpose: str, *index: int | str) -> torch.Generator:
    """A torch generator on the CPU whose numbers depend on the arguments alone, all bits of them.

    Args:
        seed: Any integer.
        purpose: What is drawn, a literal that no other place gives.
        index: Which of several such draws, as a training step or a case's number: any integers and texts.
    """
    generator = torch.Generator()
    state = _seeded_state().clone()
    words = _sequence(seed, purpose, index).generate_state(_WORDS)
    _words_of(state)[:] = words
    generator.set_state(state)
    return generator


def numpy_stream(seed: int, purpose: str, *index: int | str) -> np.random.Generator:
    """A numpy generator for the same arguments as :func:`stream`."""
    return np.random.default_rng(_sequence(seed, purpose, index))


def derived_seed(seed: int, purpose: str, *index: int | str) -> int:
    """A seed from 0 to 2^63 - 1 for a part of a job that draws for several purposes; arguments as in :func:`stream`."""
    return int(_sequence(seed, purpose, index).generate_state(1, np.uint64)[0] >> 1)


def _sequence(seed: int, purpose: str, index: Sequence[int | str]) -> np.random.SeedSequence:
    digest = hashlib.sha256(json.dumps([purpose, seed, *index]).encode()).digest()
    return np.random.SeedSequence(int.from_bytes(digest, "little"), pool_size=8)


def _words_of(state: torch.Tensor) -> npt.NDArray[np.uint64]:
    """The Mersenne Twister's numbers in a torch generator's state, as a view."""
    words: npt.NDArray[Any] = state.numpy()[_FIRST_BYTE : _FIRST_BYTE + 8 * _WORDS].view(np.uint64)
    return words


@cache
def _seeded_state() -> torch.Tensor:
    """A generator's state right after seeding.

    Raises:
        RuntimeError: This torch keeps it otherwise than is known here.
    """
    state = torch.Generator().manual_seed(0).get_state()
    # Both libraries begin with Knuth's generator here, so numpy tells which numbers must stand in torch's state.
    expected = np.random.RandomState(0).get_state(legacy=False)["state"]["key"]
    if not np.array_equal(_words_of(state), expected):
        raise RuntimeError(
            f"torch {torch.__version__} keeps the state of its CPU generator in another way than this project knows; "
            "install a version that pyproject.toml allows."
        )
    return state
