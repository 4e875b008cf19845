"""A model's parameters by name, and stand-ins for them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import Tensor, nn

from diffusion.denoisers.protocol import Selector
from diffusion.model import TextToImage

TEXT_ENCODER_PREFIX = "text_encoder."
"""Marks the names of text encoder parameters; U-Net parameters go by their diffusers names."""

_CROSS_ATTENTION = "attn2"


def named_parameters(model: TextToImage) -> dict[str, nn.Parameter]:
    """The U-Net's parameters, and the text encoder's with their prefix."""
    text = {f"{TEXT_ENCODER_PREFIX}{name}": value for name, value in model.text_encoder.named_parameters()}
    return {**dict(model.network.named_parameters()), **text}


def selected_parameters(model: TextToImage, selects: Selector) -> dict[str, nn.Parameter]:
    """The network's parameters that a scope or a door selects, by name, in module order."""
    return {
        name: parameter
        for name, parameter in model.network.named_parameters()
        if selects(name, model.network.get_submodule(name.rpartition(".")[0]))
    }


def matching_parameters(model: TextToImage, pattern: str) -> dict[str, nn.Parameter]:
    """The network's parameters whose names match, as ``*`` or ``*.attn2.*``.

    Raises:
        ValueError: There are none, or the pattern names a U-Net's cross-attention and the network has none.
    """
    if _CROSS_ATTENTION in pattern:
        # Some transformers call another attention so, which sees no text.
        model.denoiser.text_attention()
    matching = {name: value for name, value in model.network.named_parameters() if fnmatchcase(name, pattern)}
    if not matching:
        raise ValueError(
            f"parameters is {pattern!r}; no parameter of the U-Net of {model.name!r} has such a name: give a pattern "
            "like '*' (all) or '*.attn2.*' (cross-attention)."
        )
    return matching


@contextmanager
def substituted(model: TextToImage, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the model compute with ``tensors`` in place of its parameters of these names, for the length of the context.

    Gradients flow into ``tensors``; the parameters themselves stay where they are. Contexts may be nested.

    Args:
        model: Whose U-Net and text encoder.
        tensors: Stand-ins by parameter name, of the parameters' shapes.
    """
    owners = {name: _owner(model, name) for name in tensors}
    replaced = {name: module._parameters[leaf] for name, (module, leaf) in owners.items()}
    try:
        for name, (module, leaf) in owners.items():
            # Assigning to the module itself would insist on an nn.Parameter, which cuts the graph.
            module._parameters[leaf] = tensors[name]  # type: ignore[assignment]
        yield
    finally:
        for name, (module, leaf) in owners.items():
            module._parameters[leaf] = replaced[name]


def _owner(model: TextToImage, name: str) -> tuple[nn.Module, str]:
    """The module that has the parameter, and the parameter's name in it."""
    whole = model.text_encoder if name.startswith(TEXT_ENCODER_PREFIX) else model.network
    path, _, leaf = name.removeprefix(TEXT_ENCODER_PREFIX).rpartition(".")
    return whole.get_submodule(path), leaf
