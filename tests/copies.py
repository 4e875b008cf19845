"""Copies of a tiny pipeline, in a tenth of the time that making its hundreds of modules takes."""

import copy
import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from transformers import CLIPTokenizer

from diffusion.canvas.tiny import tiny_pipeline

HOOKS = frozenset(name for name, value in vars(nn.Identity()).items() if "hooks" in name and isinstance(value, dict))
PARTS = frozenset({"_parameters", "_buffers", "_modules"})
PLAIN = (bool, int, float, str, tuple, torch.dtype, type(None))
"""What need not be copied."""


def copied_tiny_pipeline(tokenizer_folder: Path, seed: int) -> StableDiffusionPipeline:
    """What :func:`tiny_pipeline` makes, and PyTorch's own stream where that leaves it; nothing is shared."""
    original, stream = _made(tokenizer_folder, seed)
    torch.set_rng_state(stream)
    parts = {
        name: copied_module(part) if isinstance(part, nn.Module) else copy.deepcopy(part)
        for name, part in original.components.items()
    }
    # A copied one of transformers decodes without its decoder.
    parts["tokenizer"] = CLIPTokenizer.from_pretrained(tokenizer_folder)
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


@functools.cache
def _made(tokenizer_folder: Path, seed: int) -> tuple[StableDiffusionPipeline, torch.Tensor]:
    pipeline = tiny_pipeline(tokenizer_folder, seed=seed)
    return pipeline, torch.get_rng_state()


def copied_module(module: nn.Module, memory: dict[int, Any] | None = None) -> nn.Module:
    """A module with weights, buffers, settings and children of its own, and without the hooks of ``module``.

    Args:
        module: What is copied.
        memory: Copies of what several of its parts have in common, as :func:`copy.deepcopy` keeps them.
    """
    memory = {} if memory is None else memory
    made = module.__new__(type(module))
    own = vars(module).copy()
    for name, value in own.items():
        if name in HOOKS:
            own[name] = OrderedDict()
        elif name not in PARTS and not isinstance(value, PLAIN):
            own[name] = copy.deepcopy(value, memory)
    own["_parameters"] = {
        name: weight if weight is None else nn.Parameter(weight.detach().clone(), weight.requires_grad)
        for name, weight in module._parameters.items()
    }
    own["_buffers"] = {name: buffer if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    own["_modules"] = {name: copied_module(child, memory) for name, child in module._modules.items()}
    made.__dict__ = own
    return made
