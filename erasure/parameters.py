"""Which of a model's parameters a method may change, by the names that the field uses."""

from typing import Literal, get_args

from torch import nn

from diffusion.model import TextToImage
from diffusion.parameters import TEXT_ENCODER_PREFIX, named_parameters, selected_parameters

UNetScope = Literal[
    "xattn",
    "xattn_kv",
    "selfattn",
    "attn",
    "attn_kv",
    "ffn",
    "ffn2",
    "xattn_ffn",
    "ffn_text",
    "modulation",
    "text_projection",
    "noxattn",
    "esd_u",
    "transformers",
    "linear_conv",
    "full",
]
"""Groups of the network's parameters; sizes are Stable Diffusion 1.4's. In transformers that have text and picture in
one sequence (Stable Diffusion 3), what belongs to the text's part stands for cross-attention.

- ``xattn``: query, key, value and output projections of cross-attention, 44.0 M (ESD-x); of the text's part.
- ``xattn_kv``: keys and values of cross-attention, 19.2 M (UCE, AC); of the text's part.
- ``selfattn``, ``attn``: projections of self-attention (the picture's part); of both attentions.
- ``attn_kv``: keys and values of the picture's part alone (esd-x-strict of ESD's authors); transformers only.
- ``ffn``, ``ffn2``: the GEGLU feed-forwards, 148.8 M; the matrices that leave their hidden units, 49.6 M.
- ``xattn_ffn``: cross-attention and feed-forwards.
- ``ffn_text``: the text's feed-forwards; transformers only.
- ``modulation``: what time and pooled text scale and shift by; transformers only.
- ``text_projection``: the first layers that read text and pooled text; transformers only.
- ``noxattn``: all but cross-attention, time embedding and output layers (ESD-u of the paper); in blocks alone.
- ``esd_u``: linear layers and convolutions outside cross-attention, no norms (ESD-u of the authors' diffusers code).
- ``transformers``: weights of the linear layers and convolutions in the transformer blocks, 267.0 M (SPM).
- ``linear_conv``: weights of every linear layer and convolution.
- ``full``: everything, 859.5 M.
"""

Scope = UNetScope | Literal["text_encoder", "token_embedding"]
"""A scope of the network, ``text_encoder``, the layers of the text encoder without its embedding tables, or
``token_embedding``, its table of tokens."""

UNET_SCOPES: tuple[UNetScope, ...] = get_args(UNetScope)
SCOPES: tuple[Scope, ...] = (*UNET_SCOPES, "text_encoder", "token_embedding")


def scope_parameters(model: TextToImage, scope: Scope) -> dict[str, nn.Parameter]:
    """The parameters of ``scope`` by name, in module order.

    The network's parameters go by their diffusers names; those of the text encoder start with ``text_encoder.``.

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
    elif (selects := model.denoiser.groups.get(scope)) is None:
        raise ValueError(
            f"scope is {scope!r}, which the {model.denoiser.kind} of {model.name!r} has not; choose one of "
            f"{', '.join(model.denoiser.groups)}."
        )
    else:
        selected = selected_parameters(model, selects)
    if not selected:
        raise ValueError(
            f"scope {scope!r} selects no parameter of {model.name!r}; choose another of "
            f"{', '.join(model.denoiser.groups)}."
        )
    return selected
