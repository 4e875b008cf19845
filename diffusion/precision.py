"""Precision of arithmetic."""

import torch


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 if that is more precise."""
    return torch.promote_types(dtype, torch.float32)
