"""Whole tensors: names of diffusers, CompVis and transformers, put in their places in a model."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import LDM_UNET_KEY, convert_ldm_unet_checkpoint
from torch import Tensor

from diffusion.model import TextToImage
from diffusion.parameters import TEXT_ENCODER_PREFIX, named_parameters
from erasure.edit import Edit
from erasure.imports.reading import Weights, bare_name, examples

PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

UNRELATED = 0.05
"""Cosine between the values of a file and a model below which the file does not hold an edited copy of the model's."""

TOKEN_TABLE = f"{TEXT_ENCODER_PREFIX}embeddings.token_embedding.weight"
"""The text encoder's table of token embeddings, by our name."""

_AC_ROWS = "embed"
"""What AC's code of CompVis calls the last rows of that table: all, or those of added tokens."""

_PREFIXES = re.compile(
    r"^(unet\.|transformer\.|text_encoder\.|cond_stage_model\.transformer\.|conditioner\.embedders\.0\.transformer\.)?"
    r"(text_encoder\.)?(text_model\.)?"
)
_SINGULAR = re.compile(r"^embedding\.")
"""AdvUnlearn's wrapper holds a text encoder and its parts, one of them under another name."""

_SDXL_EMBEDDING = tuple(f"label_emb.0.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias"))
"""What the converter looks for in a U-Net of Stable Diffusion XL, whatever else it is given."""

_FOREIGN = {
    r"(cond_stage_model|conditioner\.embedders\.\d)\.model\..*": (
        "a text encoder in OpenCLIP's names, which are not read; give a pipeline's folder, or the U-Net's weights"
    ),
    r"(text_encoder_[23]\.|conditioner\.embedders\.1\.).*": (
        "a second text encoder, whose changes cannot be taken over; give the network's weights alone"
    ),
    r"((model\.diffusion_model\.)?|lora_unet_)((double|single)_blocks|joint_blocks)[._].*": (
        "a transformer in its authors' names, which are not read; convert it with diffusers and give its transformer's "
        "weights"
    ),
    r"control_model\..*|controlnet_.*": "a ControlNet, which steers a model and is none",
}
"""Names that tell what a file is, where the model has no place for them."""


@dataclass
class Fit:
    """What of a file finds a place in a model.

    Attributes:
        weights: Tensors by our parameter names.
        strange: A description of each that finds none.
        added_tokens: Rows of the token table that the model's vocabulary does not know.
    """

    weights: Weights = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)
    added_tokens: int = 0


def fit(weights: Mapping[str, Tensor], model: TextToImage) -> Fit:
    """Find the place of every tensor.

    A tensor that a file has twice, under two names, counts once. Of a token table with another number of rows those
    that both know are taken.
    """
    parameters = named_parameters(model)
    bare = {key: bare_name(key) for key in weights}
    diffusers_names = _diffusers_names([name for name in bare.values() if name.startswith(LDM_UNET_KEY)], model)
    found = Fit()
    for key, tensor in weights.items():
        name = _PREFIXES.sub("", diffusers_names.get(bare[key], bare[key]))
        in_text_encoder = TEXT_ENCODER_PREFIX + _SINGULAR.sub("embeddings.", name)
        if in_text_encoder in parameters:
            name = in_text_encoder
        elif name == _AC_ROWS and TOKEN_TABLE in parameters and _is_of_added_tokens(tensor, parameters[TOKEN_TABLE]):
            found.added_tokens = len(tensor)
            continue
        elif name == _AC_ROWS:
            name = TOKEN_TABLE
        if name not in parameters:
            found.strange.append(f"{key!r}")
            continue
        value, own = tensor, parameters[name]
        if name == TOKEN_TABLE and value.ndim == own.ndim == 2 and value.shape[1] == own.shape[1]:
            found.added_tokens = max(found.added_tokens, len(value) - len(own))
            known = min(len(value), len(own))
            value = torch.cat([value[:known], own.detach()[known:].to(value.device, value.dtype)])
        if value.shape != own.shape:
            found.strange.append(f"{key!r} ({list(tensor.shape)} for {list(own.shape)})")
        elif value.dtype not in PRECISIONS:
            found.strange.append(f"{key!r} ({value.dtype})")
        elif name in found.weights and not torch.equal(found.weights[name], value):
            found.strange.append(f"{key!r} (a second value of {name})")
        else:
            found.weights[name] = value
    return found


def _is_of_added_tokens(rows: Tensor, table: Tensor) -> bool:
    return rows.ndim == table.ndim and rows.shape[1] == table.shape[1] and len(rows) < len(table)


def misfit(path: Path, strange: Sequence[str], total: int, model: TextToImage) -> ValueError:
    """What to say of tensors that have no place in a model."""
    for pattern, kind in _FOREIGN.items():
        if any(re.match(rf"'(module\.)?({pattern})'", each) for each in strange):
            return ValueError(f"{path} does not fit {model.name!r}: {examples(strange, total)} are of {kind}.")
    if any("second value" in each for each in strange):
        return ValueError(
            f"{path} holds two values of one parameter: {examples(strange, total)} differ from the first; give the "
            "erased weights alone."
        )
    return ValueError(
        f"{path} does not fit {model.name!r}: {examples(strange, total)} have no place in it; choose the model that "
        "it was made from (model=, model.source=)."
    )


def dense_edit(path: Path, weights: Mapping[str, Tensor], model: TextToImage, *, sums: Collection[str] = ()) -> Edit:
    """The edit that makes ``weights`` of the model's own, which count as unchanged where they differ by rounding alone.

    Args:
        path: Where they come from, for errors.
        weights: By our parameter names.
        model: The unedited model.
        sums: Names of those that are the model's own and a change, and so have to do with them however large it is.

    Raises:
        ValueError: There are values that are not finite, or that have nothing to do with the model's.
    """
    parameters = named_parameters(model)
    before, after = {}, {}
    for name, tensor in weights.items():
        own = parameters[name].detach().cpu()
        coarser = min(own.dtype, tensor.dtype, key=lambda dtype: dtype.itemsize)
        before[name], after[name] = own.to(coarser), tensor.detach().cpu().to(coarser)
    require_finite(path, after)
    copies = weights.keys() - set(sums)
    if (cosine := _cosine(*({name: each[name] for name in copies} for each in (before, after)))) < UNRELATED:
        raise ValueError(
            f"{path} names parameters of {model.name!r}, but its values have nothing to do with theirs (cosine "
            f"{cosine:.3f}); gradients, such as CAD's attributions, are no weights and cannot be imported."
        )
    return Edit.from_weights(before, after)


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """See to it that all values are numbers.

    Raises:
        ValueError: They are not.
    """

    def finite(tensor: Tensor) -> bool:
        return tensor.dtype in PRECISIONS and bool(tensor.isfinite().all())

    if broken := [f"{name!r}" for name, tensor in tensors.items() if not finite(tensor)]:
        raise ValueError(f"{path} holds infinite values or none at all: {examples(broken, len(tensors))}.")


def _diffusers_names(keys: Sequence[str], model: TextToImage) -> dict[str, str]:
    """Diffusers names of U-Net parameters by their CompVis names; those that the converter does not know are left out.

    The converter counts the blocks that it is given and insists on some tensors, so all are shown to it, by keys that
    mean nothing.
    """
    config = model.network.config
    if not keys or "down_block_types" not in config:
        # Those authors' code has U-Nets alone.
        return {}
    blocks = len(config.down_block_types) * (config.layers_per_block + 1)
    counts = {"input_blocks": blocks, "middle_block": 3, "output_blocks": blocks}
    shown = {f"{LDM_UNET_KEY}{block}.{n}.shown": "" for block, count in counts.items() for n in range(count)}
    shown |= {f"{LDM_UNET_KEY}{name}": "" for name in _SDXL_EMBEDDING}
    converted = convert_ldm_unet_checkpoint({**shown, **{key: key for key in keys}}, config)
    return {key: name for name, key in converted.items() if key}


def _cosine(one: Weights, other: Weights) -> float:
    def product(first: Weights, second: Weights) -> float:
        return sum(float((first[name].float() * second[name].float()).sum()) for name in one)

    norms = (product(one, one) * product(other, other)) ** 0.5
    return product(one, other) / norms if norms else 1.0
