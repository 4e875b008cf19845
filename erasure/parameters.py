"""Which of a model's parameters a method may change, by the names that the field uses."""

from collections.abc import Callable
from typing import Literal, get_args

from torch import nn

from diffusion.model import TextToImage
from diffusion.parameters import TEXT_ENCODER_PREFIX, named_parameters

UNetScope = Literal[
    "xattn",
    "xattn_kv",
    "selfattn",
    "attn",
    "ffn",
    "ffn2",
    "xattn_ffn",
    "noxattn",
    "esd_u",
    "transformers",
    "linear_conv",
    "full",
]
"""Groups of U-Net parameters; sizes are Stable Diffusion 1.4's.

- ``xattn``: query, key, value and output projections of cross-attention, 44.0 M (ESD-x).
- ``xattn_kv``: keys and values of cross-attention, 19.2 M (UCE, AC).
- ``selfattn``, ``attn``: projections of self-attention; of both attentions.
- ``ffn``, ``ffn2``: the GEGLU feed-forwards, 148.8 M; the matrices that leave their hidden units, 49.6 M.
- ``xattn_ffn``: cross-attention and feed-forwards.
- ``noxattn``: all but cross-attention, time embedding and output layers (ESD-u of the paper).
- ``esd_u``: linear layers and convolutions outside cross-attention, no norms (ESD-u of the authors' diffusers code).
- ``transformers``: weights of the linear layers and convolutions in the transformer blocks, 267.0 M (SPM).
- ``linear_conv``: weights of every linear layer and convolution.
- ``full``: everything, 859.5 M.
"""

Scope = UNetScope | Literal["text_encoder", "token_embedding"]
"""A U-Net scope, ``text_encoder``, the layers of the text encoder without its embedding tables, or ``token_embedding``,
its table of tokens."""

UNET_SCOPES: tuple[UNetScope, ...] = get_args(UNetScope)
SCOPES: tuple[Scope, ...] = (*UNET_SCOPES, "text_encoder", "token_embedding")


def _is_linear_or_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


_SELECTORS: dict[UNetScope, Callable[[str, nn.Module], bool]] = {
    "xattn": lambda name, module: ".attn2." in name,
    "xattn_kv": lambda name, module: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "selfattn": lambda name, module: ".attn1." in name,
    "attn": lambda name, module: ".attn1." in name or ".attn2." in name,
    "ffn": lambda name, module: ".ff." in name,
    "ffn2": lambda name, module: name.endswith(".ff.net.2.weight"),
    "xattn_ffn": lambda name, module: ".attn2." in name or ".ff." in name,
    "noxattn": lambda name, module: (
        ".attn2." not in name and not name.startswith(("time_embedding.", "conv_norm_out.", "conv_out."))
    ),
    "esd_u": lambda name, module: _is_linear_or_conv(module) and ".attn2." not in name,
    "transformers": lambda name, module: (
        _is_linear_or_conv(module) and name.endswith(".weight") and ".attentions." in name
    ),
    "linear_conv": lambda name, module: _is_linear_or_conv(module) and name.endswith(".weight"),
    "full": lambda name, module: True,
}


def scope_parameters(model: TextToImage, scope: Scope) -> dict[str, nn.Parameter]:
    """The parameters of ``scope`` by name, in module order.

    U-Net parameters go by their diffusers names; those of the text encoder start with ``text_encoder.``.

    Raises:
        ValueError: The scope is unknown, this model has no such parameters, or two text encoders where one is asked
            for.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; it must be one of {', '.join(SCOPES)}.")
    if scope in {"text_encoder", "token_embedding"}:
        model.require_one_text_encoder(f"Scope {scope!r}")
    if scope == "text_encoder":
        selected = {
            f"{TEXT_ENCODER_PREFIX}{name}": parameter
            for name, parameter in model.text_encoder.named_parameters()
            if "embedding" not in name
        }
    elif scope == "token_embedding":
        selected = {name: value for name, value in named_parameters(model).items() if value is model.vocabulary}
    else:
        selects = _SELECTORS[scope]
        selected = {
            name: parameter
            for name, parameter in model.unet.named_parameters()
            if selects(name, model.unet.get_submodule(name.rpartition(".")[0]))
        }
    if not selected:
        raise ValueError(
            f"scope {scope!r} selects no parameter of {model.name!r}; choose another of {', '.join(SCOPES)}."
        )
    return selected
