"""Sums that are rounded as on another processor: ``pytest -p tests.other_processor tests/test_x.py``.

One processor adds up a row of a matrix product in the same order whatever the batch, another does not. With this plugin
every result of a layer is off by up to one unit of rounding, in a way that depends on the shape of the batch and on the
place in it, and on nothing else: a test that asks numbers of different batch sizes to be equal fails here as it would
fail there, and one that repeats the same computation does not.
"""

from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any

import pytest
import torch

LAYERS = ("linear", "conv2d", "scaled_dot_product_attention", "layer_norm", "group_norm")
ROUNDED = (torch.float32, torch.float64)


@cache
def _factors(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return (1 + torch.finfo(dtype).eps * (2 * draws - 1).round()).to(dtype)


def _rounded_otherwise(layer: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(layer)
    def other(*arguments: Any, **named: Any) -> torch.Tensor:
        result = layer(*arguments, **named)
        return result * _factors(result.shape, result.dtype) if result.dtype in ROUNDED else result

    return other


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop() -> Iterator[None]:
    """Round otherwise while tests run."""
    functional = torch.nn.functional
    before = {name: getattr(functional, name) for name in LAYERS}
    for name, layer in before.items():
        setattr(functional, name, _rounded_otherwise(layer))
    try:
        return (yield)
    finally:
        for name, layer in before.items():
            setattr(functional, name, layer)
