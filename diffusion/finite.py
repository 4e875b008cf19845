"""Numbers that must be finite: a NaN ends a job where it arises, before it can pass for a picture without a concept."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """A number is infinite or NaN; the message is a sentence that says where."""


def is_finite(values: Tensor | float) -> bool:
    """Return whether all ``values`` are finite; whole numbers and masks are."""
    if not isinstance(values, Tensor):
        return math.isfinite(values)
    return not values.is_floating_point() or bool(values.isfinite().all())


def require_finite(values: Tensor | float, what: str, remedy: str) -> None:
    """Refuse values that are infinite or NaN.

    Args:
        values: A number or float [...].
        what: What they are, as the start of a sentence: "The loss of fine-tuning at step 3 of 60".
        remedy: What to do about it, as its end.

    Raises:
        NotFiniteError: One of them is infinite or NaN.
    """
    if is_finite(values):
        return
    if isinstance(values, Tensor) and values.numel() > 1:
        count = int((~values.isfinite()).sum())
        raise NotFiniteError(f"{what}: {count:,} of {values.numel():,} values are infinite or no number; {remedy}.")
    raise NotFiniteError(f"{what} is {float(values)}; {remedy}.")


def require_finite_tensors(tensors: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Refuse tensors of which one has a value that is infinite or NaN.

    Args:
        tensors: By name.
        what: What each is, before its name: "The erased model's weight".
        remedy: See :func:`require_finite`.

    Raises:
        NotFiniteError: One of their values is infinite or NaN.
    """
    for name, tensor in tensors.items():
        require_finite(tensor, f"{what} {name!r}", remedy)


def require_finite_numbers(data: object, what: str) -> None:
    """Refuse plain data, as of a JSON file, with a number in it that is infinite or NaN.

    Args:
        data: Mappings, sequences, texts and numbers.
        what: What it is, as the start of a sentence.

    Raises:
        NotFiniteError: There is one.
    """
    if (found := find_not_finite(data)) is not None:
        place, value = found
        raise NotFiniteError(f"{what} is {value} at {'.'.join(place) or 'its top'}; only finite numbers are results.")


def find_not_finite(data: object) -> tuple[list[str], float] | None:
    """Where plain data has a number that is infinite or NaN, as keys and places in lists, and that number."""
    if isinstance(data, float):
        return None if math.isfinite(data) else ([], data)
    inner: Iterable[tuple[object, object]] = ()
    if isinstance(data, Mapping):
        inner = data.items()
    elif isinstance(data, (list, tuple)):
        inner = enumerate(data)
    for key, value in inner:
        if (found := find_not_finite(value)) is not None:
            return [str(key), *found[0]], found[1]
    return None


def overflow_remedy(dtype: torch.dtype | None, otherwise: str) -> str:
    """What to do about numbers that are not finite where the arithmetic is of ``dtype``."""
    if dtype is torch.float16:
        return (
            "in float16 whatever exceeds 65,504 overflows, so set model.precision to fp32, bf16 or bf16_autocast in "
            f"place of fp16 or fp16_autocast; if it is the same there, {otherwise}"
        )
    return otherwise
