"""Ways to need less memory that change no number."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(unet: ModelMixin) -> None:
    """Let the U-Net's blocks keep no activations for the backward pass, which computes them again (1604.06174).

    They are computed with the tensors that stood in for parameters the first time, even where these are gone by then
    (:func:`diffusion.parameters.substituted`). A block that has hooks may depend on more than its inputs and
    parameters, and keeps its activations.
    """
    unet.enable_gradient_checkpointing(_run_again_in_backward)


def _run_again_in_backward(block: nn.Module, *arguments: Any) -> Any:
    if any(part._forward_hooks or part._forward_pre_hooks for part in block.modules()):
        return block(*arguments)
    tensors = [(part, dict(part._parameters)) for part in block.modules()]

    def run(*arguments: Any) -> Any:
        with _parameters_as(tensors):
            return block(*arguments)

    return checkpoint(run, *arguments, use_reentrant=False)


@contextmanager
def _parameters_as(tensors: list[tuple[nn.Module, dict[str, nn.Parameter | None]]]) -> Iterator[None]:
    now = [(part, dict(part._parameters)) for part, _ in tensors]
    try:
        for part, then in tensors:
            part._parameters.update(then)
        yield
    finally:
        for part, current in now:
            part._parameters.update(current)


@contextmanager
def visiting(part: nn.Module, device: torch.device) -> Iterator[None]:
    """Have ``part`` on ``device`` for the length of the context, and then where it came from."""
    home = next(part.parameters()).device
    part.to(device)
    try:
        yield
    finally:
        part.to(home)
