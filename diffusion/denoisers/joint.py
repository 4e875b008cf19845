"""What the names of scopes mean where text and picture are one sequence: in Stable Diffusion 3 and FLUX."""

from typing import NoReturn

from torch import nn

from diffusion.denoisers.protocol import Doors, ParameterGroups

_TEXT_KEYS = (".attn.add_k_proj.", ".attn.add_v_proj.")
_TEXT = (*_TEXT_KEYS, ".attn.add_q_proj.", ".attn.to_add_out.")
# The second attention of Stable Diffusion 3.5 medium is called as a U-Net's cross-attention is, and sees no text.
_KEYS = tuple(f".{attention}.to_{side}." for attention in ("attn", "attn2") for side in ("k", "v"))
_IMAGE = (*_KEYS, *(f".{attention}.to_{side}." for attention in ("attn", "attn2") for side in ("q", "out")))
_JOINT = "transformer_blocks."
_BLOCKS = (_JOINT, "single_transformer_blocks.")
"""Blocks in which text has weights of its own, and those of FLUX in which it shares the picture's."""


def _has(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name for part in parts)


def _is_linear_or_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


GROUPS: ParameterGroups = {
    "xattn": lambda name, module: _has(name, _TEXT),
    "xattn_kv": lambda name, module: _has(name, _TEXT_KEYS),
    "selfattn": lambda name, module: name.startswith(_JOINT) and _has(name, _IMAGE),
    "attn": lambda name, module: _has(name, (*_TEXT, *_IMAGE)),
    "attn_kv": lambda name, module: _has(name, _KEYS),
    "ffn": lambda name, module: _has(name, (".ff.", ".proj_mlp.")),
    "ffn2": lambda name, module: name.endswith(".ff.net.2.weight"),
    "xattn_ffn": lambda name, module: _has(name, (*_TEXT, ".ff.", ".proj_mlp.")),
    "ffn_text": lambda name, module: ".ff_context." in name,
    "modulation": lambda name, module: (
        name.startswith(_BLOCKS) and _has(name, (".norm1.", ".norm1_context.", ".norm."))
    ),
    "text_projection": lambda name, module: name.startswith(("context_embedder.", "time_text_embed.text_embedder.")),
    "noxattn": lambda name, module: name.startswith(_BLOCKS) and not _has(name, _TEXT),
    "esd_u": lambda name, module: name.startswith(_BLOCKS) and _is_linear_or_conv(module) and not _has(name, _TEXT),
    "transformers": lambda name, module: (
        name.startswith(_BLOCKS) and _is_linear_or_conv(module) and name.endswith(".weight")
    ),
    "linear_conv": lambda name, module: _is_linear_or_conv(module) and name.endswith(".weight"),
    "full": lambda name, module: True,
}

DOORS: Doors = {
    "rows": lambda name, module: name == "context_embedder.weight",
    "pooled": lambda name, module: name == "time_text_embed.text_embedder.linear_1.weight",
}
"""Behind these, keys and values of text depend on the picture and the time too."""


def refuse_cross_attention() -> NoReturn:
    """Say that there are no layers that only read text.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        "This transformer has no cross-attention: text and picture attend to each other in one sequence; choose a "
        "method that trains weights, as eraser=esd, ac or salun."
    )
