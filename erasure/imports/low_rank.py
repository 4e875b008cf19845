"""Low-rank changes: LoRA files of kohya's scripts, diffusers and PEFT, and the membranes of SPM."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.model import TextToImage
from diffusion.parameters import TEXT_ENCODER_PREFIX, named_parameters
from erasure.additions.membranes import Membranes, Merge
from erasure.edit import Edit
from erasure.imports.dense import require_finite
from erasure.imports.reading import PEFT_CONFIG, Contents, Weights, bare_name

Factors = dict[str, tuple[Tensor, Tensor]]
"""Low-rank changes of parameters, by name: float64 [outputs, rank], scale included, and [rank, inputs, ...]."""

SPM_HEADER = {"prompts", "rank", "alpha"}
"""What the header of SPM's files tells."""

DIFFUSERS_HEADER = "lora_adapter_metadata"
"""Under which diffusers keeps PEFT's settings in a header, as JSON with the part before each name."""

_NAMES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<layer>.+)\.lora_(?P<side>up|down)\.weight",
        r"(?P<layer>.+)\.lora_(?P<side>[AB])(\.\w+)?\.weight",
        r"(?P<layer>.+)\.processor\.(?P<projection>to_\w+)_lora\.((?P<side>up|down)\.weight|(?P<alpha>alpha))",
        r"(?P<layer>.+)\.lora(_linear_layer)?\.(?P<side>up|down)\.weight",
        r"(?P<layer>.+?)(\.lora)?\.(?P<alpha>alpha)",
    )
)
"""Names of factors: kohya's, PEFT's with or without an adapter's name, diffusers' of 2023 and of before PEFT."""

_SIDES = {"A": "down", "B": "up"}

_OTHERS = {
    "LoHa": r".*\.hada_\w+(\.weight)?",
    "LoKr": r".*\.lokr_\w+(\.weight)?",
    "DoRA": r".*(\.dora_scale|\.lora_magnitude_vector(\.\w+)?(\.weight)?)",
    "LoCon with a core": r".*\.lora_mid\.weight",
    "OFT": r".*\.oft_\w+(\.\w+)*",
    "IA3": r".*(\.on_input|\.ia3_l(\.\w+)?)",
    "LoRA with biases": r".*\.lora_B(\.\w+)?\.bias",
    "LoRA of embeddings": r".*\.lora_embedding_[AB](\.\w+)?",
}
"""Changes of other shapes, by the names of their tensors."""

_SECOND_ENCODER = re.compile(r"(lora_te[23]_|text_encoder_[23]\.).*")


@dataclass(frozen=True)
class LowRank:
    """The low-rank part of a file.

    Attributes:
        factors: By our parameter names.
        strange: A description of each tensor that has no place in the model.
    """

    factors: Factors
    strange: list[str]


def is_low_rank(key: str) -> bool:
    """Whether a tensor of this name is part of a low-rank change, or of one of its relatives."""
    return any(name.fullmatch(key) for name in _NAMES) or _kind(key) is not None


def low_rank(path: Path, weights: Weights, header: Mapping[str, str], model: TextToImage) -> LowRank:
    """Read factors: up and down by parameter, scaled by alpha / rank; alpha is the rank if the file tells none.

    Args:
        path: The file, for errors.
        weights: Tensors of which :func:`is_low_rank` holds.
        header: What the file says of itself.
        model: Whose layers they are for.

    Raises:
        ValueError: They are of a kind that is not read, or belong to a second text encoder.
    """
    if kinds := {kind for key in weights if (kind := _kind(key))}:
        raise ValueError(
            f"{path} holds {min(kinds)}, which is no product of two factors and is not read; merge it into the weights "
            "and give those."
        )
    if second := next(filter(_SECOND_ENCODER.fullmatch, weights), None):
        raise ValueError(
            f"{path} changes a second text encoder ({second!r}, ...), whose changes cannot be taken over; take these "
            "tensors out of the file."
        )
    settings = _settings(path, weights, header)
    places, parameters = _places(model), named_parameters(model)
    layers: dict[str, Weights] = {}
    for key, tensor in weights.items():
        layer, part = _parse(key)
        layers.setdefault(layer, {})[part] = tensor
    factors: Factors = {}
    strange = []
    for layer, parts in layers.items():
        name = places.get(layer, "")
        weight = parameters.get(f"{name}.weight", torch.empty(0))
        if name and f"{name}.weight" not in factors and _fit_together(parts, weight):
            down = parts["down"].double().reshape(len(parts["down"]), *weight.shape[1:])
            scale = _scale(parts, name, settings, model.denoiser.part)
            factors[f"{name}.weight"] = (scale * parts["up"].double().flatten(1), down)
        else:
            strange += [f"'{layer}.{part}' ({list(tensor.shape)})" for part, tensor in parts.items()]
    return LowRank(factors, strange)


def folded(factors: Factors, model: TextToImage, dense: Weights) -> Weights:
    """W + up down by parameter name, W being that of ``dense`` if it has one."""
    parameters = named_parameters(model)
    values = dict(dense)
    for name, (up, down) in factors.items():
        own = parameters[name].detach().cpu()
        weight = dense.get(name, own)
        values[name] = (weight.double() + (up @ down.flatten(1)).reshape(own.shape)).to(own.dtype)
    return values


def erased_by_spm(contents: Contents) -> tuple[str, ...]:
    """What the header of an SPM file says that it erases; nothing of any other file."""
    if not contents.header.keys() >= SPM_HEADER:
        return ()
    return tuple(phrase.strip() for phrase in contents.header["prompts"].split(",") if phrase.strip())


def membranes(path: Path, factors: Factors, targets: tuple[str, ...], model: TextToImage, merge: Merge) -> Edit:
    """The edit that puts SPM's factors beside the U-Net's layers, as open as the prompt is about ``targets``.

    Raises:
        ValueError: Values are not finite.
    """
    dtype = model.dtype
    up = {name.removesuffix(".weight"): up[None].to(dtype) for name, (up, _) in factors.items()}
    down = {name.removesuffix(".weight"): down[None].to(dtype) for name, (_, down) in factors.items()}
    require_finite(
        path, {f"{layer} ({side})": one[layer] for side, one in (("up", up), ("down", down)) for layer in one}
    )
    return Edit({}, {}, (Membranes(up, down, (targets,), merge=merge),))


def _kind(key: str) -> str | None:
    return next((kind for kind, pattern in _OTHERS.items() if re.fullmatch(pattern, key)), None)


def _parse(key: str) -> tuple[str, str]:
    """The layer and the part (``up``, ``down`` or ``alpha``) that a tensor's name speaks of."""
    for pattern in _NAMES:
        if match := pattern.fullmatch(key):
            found = match.groupdict()
            layer = bare_name(found["layer"])
            if projection := found.get("projection"):
                layer += ".to_out.0" if projection == "to_out" else f".{projection}"
            side = found.get("side") or "alpha"
            return layer, _SIDES.get(side, side)
    return key, ""


def _places(model: TextToImage) -> dict[str, str]:
    """Our names of layers by all the names that files give them."""
    places: dict[str, str] = {}
    for parameter in named_parameters(model):
        name, is_weight, _ = parameter.rpartition(".weight")
        if not is_weight:
            continue
        if name.startswith(TEXT_ENCODER_PREFIX):
            inner = name.removeprefix(TEXT_ENCODER_PREFIX)
            flat = f"text_model_{inner.replace('.', '_')}"
            dotted = (f"text_model.{inner}", inner)
            spellings: Iterable[str] = (*dotted, *(f"text_encoder.{each}" for each in dotted))
            spellings = (*spellings, f"lora_te_{flat}", f"lora_te1_{flat}")
        else:
            spellings = (name, f"{model.denoiser.part}.{name}", f"lora_{model.denoiser.part}_{name.replace('.', '_')}")
        places |= dict.fromkeys(spellings, name)
    return places


def _settings(path: Path, weights: Weights, header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings: those of diffusers' header begin with ``unet.`` or ``transformer.``, and ``text_encoder.``.

    Raises:
        ValueError: They cannot be read, are of another kind than LoRA, or are lacking where PEFT has them in a file of
            their own.
    """
    text = header.get(PEFT_CONFIG) or header.get(DIFFUSERS_HEADER)
    if text is None:
        if any(key.startswith("base_model.model.") for key in weights):
            raise ValueError(
                f"{path} is PEFT's, which keeps the strength of a change in {PEFT_CONFIG}; put that file beside it."
            )
        return {}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"The settings of {path} ({PEFT_CONFIG}) are damaged; take both from one training.")
    if (kind := settings.get("peft_type", "LORA")) != "LORA" or settings.get("use_dora"):
        raise ValueError(
            f"{path} holds {'DoRA' if kind == 'LORA' else kind}, which is not read; merge it and give the weights."
        )
    return settings


def _scale(parts: Weights, name: str, settings: Mapping[str, Any], network: str) -> float:
    rank = len(parts["down"])
    if "alpha" in parts:
        return float(parts["alpha"]) / rank
    prefix = TEXT_ENCODER_PREFIX if name.startswith(TEXT_ENCODER_PREFIX) else f"{network}."
    prefix = "" if "r" in settings else prefix
    alpha = settings.get(f"{prefix}lora_alpha", rank)
    patterns = settings.get(f"{prefix}alpha_pattern") or {}
    inner = name.removeprefix(TEXT_ENCODER_PREFIX)
    alpha = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", inner)), alpha)
    return float(alpha) / (rank**0.5 if settings.get(f"{prefix}use_rslora") else rank)


def _fit_together(parts: Weights, weight: Tensor) -> bool:
    """Whether these are two factors whose product has the shape of ``weight``, and one number at the most."""
    if not {"up", "down"} <= parts.keys() <= {"up", "down", "alpha"}:
        return False
    up, down = parts["up"], parts["down"]
    if min(up.ndim, down.ndim, weight.ndim) < 2 or not len(down):
        return False
    return (
        up.flatten(1).shape == (len(weight), len(down))
        and _without_ones(down.shape[1:]) == _without_ones(weight.shape[1:])
        and ("alpha" not in parts or parts["alpha"].numel() == 1)
    )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a layer's inputs, in which a linear layer and a convolution of 1x1 pixels are alike."""
    return shape if any(size != 1 for size in shape[1:]) else shape[:1]
