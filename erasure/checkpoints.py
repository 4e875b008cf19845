"""Erased checkpoints as other projects publish them, read as edits of a loaded model.

The format is told by what a file holds, never by its name:

- parameters by diffusers names, some or all, as safetensors or pickled (ESD, UCE, SPEED, SalUn, RECE, ConceptPrune);
- the same nested by module, ``{"unet.mid_block...": {"weight": ..., "bias": ...}}`` (STEREO), or by part,
  ``{"unet": {...}, "text_encoder": {...}}`` (AC's ``delta.bin``);
- CompVis names ``model.diffusion_model...``, bare or as a Lightning ``state_dict``, some or all (ESD, SalUn, AC);
- low-rank factors ``lora_unet_...``, folded into the weights at full strength, whatever the prompt; those whose header
  says what they erase (SPM) as :class:`erasure.additions.membranes.Membranes`, as open as the paper's formula says;
- the folder of a pipeline (FMN, MACE, :func:`erasure.edit.export`), of a U-Net or of a CLIP text encoder
  (AdvUnlearn), or the text encoder's parameters as a file;
- adapters behind cross-attention, ``eraser_weights.pt`` beside ``eraser_config.json`` or alone (Receler);
- an edit of this project.

No code of a file is ever run. A tensor that has no place in the model is an error, but for what an edit cannot change
or sampling does not use: the autoencoder, the noise schedule, averaged copies and embeddings of added tokens.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers.loaders.single_file_utils import LDM_UNET_KEY, convert_ldm_unet_checkpoint
from safetensors import safe_open
from torch import Tensor

from diffusion.loading import LOADING_ERRORS, in_short, lightning_names_allowed
from diffusion.model import TextToImage
from diffusion.parameters import TEXT_ENCODER_PREFIX, named_parameters
from erasure.additions.adapters import Adapters, layer_widths
from erasure.additions.membranes import Membranes
from erasure.edit import Edit

log = logging.getLogger(__name__)

Weights = dict[str, Tensor]
"""Tensors by the names that a checkpoint gives them, with a dot between levels of nesting."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""Low-rank changes of parameters, by name: float64 [outputs, rank], scale included, and [rank, inputs, ...]."""

WEIGHT_FILES = tuple(
    f"{stem}{variant}.{suffix}"
    for variant in ("", ".fp16")
    for suffix in ("safetensors", "bin")
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
)
"""Where a folder of diffusers or transformers keeps its weights, in the order of preference."""

_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WRAPPERS = re.compile(r"^(unet\.|text_encoder\.|cond_stage_model\.transformer\.)?(text_model\.)?")
_PASSED_OVER = {
    "the autoencoder": r"(first_stage_model|vae)\..*",
    "the noise schedule": r"(\w*(betas|alphas_cumprod)\w*|posterior_\w+|scale_factor|logvar|lvlb_weights)",
    "averaged copies": r"model_ema\..*",
    "embeddings of added tokens": r"embed",
    "position ids": r"(.*\.)?position_ids",
}

ADAPTER_FILES = ("eraser_weights.pt", "eraser_config.json")
_ADAPTER = re.compile(r".*\.(down|up)\.(weight|bias)")

LORA_PREFIX = "lora_unet_"
LORA_FACTORS = ("lora_up.weight", "lora_down.weight")
SPM_HEADER = {"prompts", "rank", "alpha"}
"""What the header of SPM's files tells."""

NESTING = 3
"""Levels of dicts that are looked into."""

UNRELATED = 0.05
"""Cosine between the values of a file and a model below which the file does not hold an edited copy of the model's."""

EXAMPLES = 3
"""How many entries an error names."""


def read_checkpoint(path: Path) -> Edit | Weights:
    """Read what a checkpoint holds; tensors stay on the disk until they are used, where the format allows it.

    Raises:
        FileNotFoundError: There is nothing at ``path``, or a folder without weights.
        ValueError: It is damaged, holds code, or is of a kind that is no change of weights.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {path}; give the path of a file or of a folder.")
    content = _read_folder(path) if path.is_dir() else _read_file(path)
    if not isinstance(content, Edit):
        if not content:
            raise ValueError(f"{path} holds no tensors.")
        if odd := [f"{key!r}" for key, tensor in content.items() if tensor.layout != torch.strided or tensor.is_meta]:
            raise ValueError(
                f"{path} is no checkpoint of weights: {_examples(odd, len(content))} are no plain tensors."
            )
    return content


def edit_of(path: Path, model: TextToImage) -> Edit:
    """The edit that makes the checkpoint at ``path`` of ``model``.

    A tensor that is the model's own, but for the rounding to the file's precision or the model's, counts as unchanged.

    Raises:
        FileNotFoundError: See :func:`read_checkpoint`.
        ValueError: See there; or the checkpoint does not fit ``model``.
    """
    content = read_checkpoint(path)
    if isinstance(content, Edit):
        if content.metadata.get("base") not in {None, model.fingerprint()}:
            log.warning("import: %s was made from other weights than those of %s", path, model.name)
        return Edit(content.entries, {"imported": content.metadata}, content.additions)
    reasons = {key: reason for key in content if (reason := _skipped_as(key))}
    skipped = Counter(reasons.values())
    weights = {key: tensor for key, tensor in content.items() if key not in reasons}
    if not weights:
        raise ValueError(f"{path} holds nothing of a U-Net or a text encoder, but {', '.join(skipped)}.")
    if all(_ADAPTER.fullmatch(key) for key in weights):
        return _adapters_edit(path, weights, model)
    factors: Factors = {}
    fitting: Weights = {}
    if any(key.startswith("lora_") for key in weights):
        factors, strange = _low_rank(weights, model)
    else:
        fitting, strange = _fitting(weights, model)
    if strange:
        raise ValueError(
            f"{path} does not fit {model.name!r}: {_examples(strange, len(weights))} have no place in it; choose the "
            "model that it was made from (model=, model.source=)."
        )
    if factors and (targets := _erased_by_spm(path)):
        log.info("import: membranes of %d layers in %s, against %s", len(factors), path, ", ".join(targets))
        return _membranes(path, factors, targets, model)
    fitting = fitting or _folded(factors, model)
    edit = _dense_edit(path, fitting, model)
    log.info(
        "import: %d tensors in %s, %d differ from the model's%s",
        len(fitting),
        path,
        len(edit.entries),
        "".join(f"; {count} of {reason} passed over" for reason, count in skipped.items()),
    )
    return edit


def _read_folder(folder: Path) -> Edit | Weights:
    if any((folder / name).is_file() for name in ADAPTER_FILES):
        return _read_adapters(*(folder / name for name in ADAPTER_FILES))
    if not (folder / "model_index.json").is_file():
        return _read_part(folder)
    if (folder / "text_encoder_2").is_dir():
        raise ValueError(f"{folder} has two text encoders, whose changes cannot be taken over; give {folder / 'unet'}.")
    parts = {part: _read_part(folder / part) for part in ("unet", "text_encoder")}
    return {f"{part}.{key}": tensor for part, weights in parts.items() for key, tensor in weights.items()}


def _read_part(folder: Path) -> Weights:
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}; give the path of a checkpoint.")
    content = _read_file(found)
    if isinstance(content, Edit):
        raise ValueError(f"{found} is an edit of this project; give its own path.")
    return content


def _read_file(path: Path) -> Edit | Weights:
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"{path} is empty.")
    try:
        # A safetensors file starts with a length of eight bytes, whatever they are, and a JSON object.
        if start[8:] != b"{":
            with lightning_names_allowed(path):
                pickled = torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(b"PK"))
        else:
            with safe_open(path, "pt") as file:
                if "edit" not in (file.metadata() or {}):
                    return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return Edit.load(path)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} is damaged or holds more than tensors{f' ({named[1]})' if named else ''}, and no code of a "
            "checkpoint is ever run; ask for a file of the weights alone."
        ) from error
    except LOADING_ERRORS as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {in_short(error)}.") from error
    return _state_dict(pickled, path)


def _state_dict(content: Any, path: Path) -> Weights:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if isinstance(content, list | tuple):
        raise ValueError(
            f"{path} holds a list, as EcoDiff's gates on heads and neurons are saved, which act while the model "
            "computes and belong to no parameter; ask for a checkpoint of the pruned model."
        )
    leaves = dict(_leaves(content))
    if others := [f"{key!r}" for key, value in leaves.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path} is no checkpoint of weights: {_examples(others, len(leaves))} are no tensors.")
    return leaves


def _leaves(content: Any, prefix: str = "", levels: int = NESTING) -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping) and levels:
        for key, value in content.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key), levels - 1)
    else:
        yield prefix, content


def _read_adapters(weights: Path, config: Path) -> Weights:
    if absent := [str(path) for path in (weights, config) if not path.is_file()]:
        raise FileNotFoundError(f"Adapters consist of {' and '.join(ADAPTER_FILES)}; there is no {absent[0]}.")
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is damaged: {in_short(error)}.") from error
    content = _read_file(weights)
    if not isinstance(described, dict) or described.get("eraser_type") != "adapter" or isinstance(content, Edit):
        raise ValueError(f"{config} describes no adapters: its eraser_type must be 'adapter'.")
    if odd := [f"{key!r}" for key in content if not _ADAPTER.fullmatch(key)]:
        raise ValueError(f"{weights} does not hold adapters alone: {_examples(odd, len(content))} are none.")
    ranks = [list(tensor.shape[:1]) for key, tensor in content.items() if key.endswith(".down.weight")]
    if odd := [str(rank) for rank in ranks if rank != [described.get("eraser_rank")]]:
        raise ValueError(
            f"{weights} holds {_examples(odd, len(ranks))} of another rank than the eraser_rank in {config}; take both "
            "from one training."
        )
    return content


def _adapters_edit(path: Path, weights: Weights, model: TextToImage) -> Edit:
    """Adapters by the names of our layers; a published one goes by the name of the block around it."""
    widths = layer_widths(model)
    named: Weights = {}
    for key, tensor in weights.items():
        block, matrix, kind = key.rsplit(".", 2)
        within = [name for name in widths if f"{name}.".startswith(f"{block}.")]
        name = f"{within[0]}.{matrix}.{kind}" if len(within) == 1 else key
        named[key if name in named else name] = tensor
    _require_finite(path, named)
    adapters = Adapters(named)
    try:
        if lacking := [f"{name!r}" for name in widths if name not in adapters.layers]:
            raise ValueError(f"adapters are lacking for {_examples(lacking, len(widths))}.")
        adapters.attach(model)()
    except ValueError as error:
        raise ValueError(f"{path} does not fit {model.name!r}: {error}") from error
    return Edit({}, {}, (adapters,))


def _skipped_as(key: str) -> str | None:
    return next((reason for reason, pattern in _PASSED_OVER.items() if re.fullmatch(pattern, key)), None)


def _fitting(weights: Weights, model: TextToImage) -> tuple[Weights, list[str]]:
    """The tensors by our parameter names, and a description of each that has no place in the model."""
    parameters = named_parameters(model)
    diffusers_names = _diffusers_names([key for key in weights if key.startswith(LDM_UNET_KEY)], model)
    fitting: Weights = {}
    strange = []
    for key, tensor in weights.items():
        name = _WRAPPERS.sub("", diffusers_names.get(key, key))
        if TEXT_ENCODER_PREFIX + name in parameters:
            name = TEXT_ENCODER_PREFIX + name
        if name not in parameters or name in fitting:
            strange.append(f"{key!r}")
        elif tensor.shape != parameters[name].shape:
            strange.append(f"{key!r} ({list(tensor.shape)} for {list(parameters[name].shape)})")
        elif tensor.dtype not in _PRECISIONS:
            strange.append(f"{key!r} ({tensor.dtype})")
        else:
            fitting[name] = tensor
    return fitting, strange


def _diffusers_names(keys: Sequence[str], model: TextToImage) -> dict[str, str]:
    """Diffusers names of U-Net parameters by their CompVis names; those that the converter does not know are left out.

    The converter counts the blocks that it is given, so all are shown to it, by keys that mean nothing.
    """
    config = model.unet.config
    blocks = len(config.down_block_types) * (config.layers_per_block + 1)
    counts = {"input_blocks": blocks, "middle_block": 3, "output_blocks": blocks}
    shown = {f"{LDM_UNET_KEY}{block}.{n}.shown": "" for block, count in counts.items() for n in range(count)}
    converted = convert_ldm_unet_checkpoint({**shown, **{key: key for key in keys}}, config)
    return {key: name for name, key in converted.items() if key}


def _low_rank(weights: Weights, model: TextToImage) -> tuple[Factors, list[str]]:
    """(alpha / rank) up and down by parameter name, and what has no place in the model; alpha is the rank if absent."""
    parameters = {
        LORA_PREFIX + name.removesuffix(".weight").replace(".", "_"): (name, weight)
        for name, weight in model.unet.named_parameters()
        if name.endswith(".weight")
    }
    layers: dict[str, Weights] = {}
    for key, tensor in weights.items():
        layer, _, part = key.partition(".")
        layers.setdefault(layer, {})[part] = tensor
    factors: Factors = {}
    strange = []
    for layer, parts in layers.items():
        name, weight = parameters.get(layer, ("", torch.empty(0)))
        if _is_low_rank(parts, weight):
            up, down = (parts[factor].double() for factor in LORA_FACTORS)
            scale = float(parts["alpha"]) / len(down) if "alpha" in parts else 1.0
            factors[name] = (scale * up.flatten(1), down)
        else:
            strange += [f"'{layer}.{part}' ({list(tensor.shape)})" for part, tensor in parts.items()]
    return factors, strange


def _folded(factors: Factors, model: TextToImage) -> Weights:
    """W + up down by parameter name."""
    parameters = {name: weight.detach().cpu() for name, weight in model.unet.named_parameters() if name in factors}
    return {
        name: (weight.double() + (factors[name][0] @ factors[name][1].flatten(1)).reshape(weight.shape)).to(
            weight.dtype
        )
        for name, weight in parameters.items()
    }


def _erased_by_spm(path: Path) -> tuple[str, ...]:
    """What the header of an SPM file says that it erases; nothing of any other file."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except LOADING_ERRORS:
        return ()
    if not header.keys() >= SPM_HEADER:
        return ()
    return tuple(phrase.strip() for phrase in header["prompts"].split(",") if phrase.strip())


def _membranes(path: Path, factors: Factors, targets: tuple[str, ...], model: TextToImage) -> Edit:
    dtype = model.dtype
    up = {name.removesuffix(".weight"): up[None].to(dtype) for name, (up, _) in factors.items()}
    down = {name.removesuffix(".weight"): down[None].to(dtype) for name, (_, down) in factors.items()}
    _require_finite(
        path, {f"{layer} ({side})": one[layer] for side, one in (("up", up), ("down", down)) for layer in one}
    )
    return Edit({}, {}, (Membranes(up, down, (targets,)),))


def _is_low_rank(parts: Weights, weight: Tensor) -> bool:
    """Whether these are two factors whose product has the shape of ``weight``, and one number at the most."""
    if not {*LORA_FACTORS} <= parts.keys() <= {*LORA_FACTORS, "alpha"}:
        return False
    up, down = (parts[factor] for factor in LORA_FACTORS)
    if min(up.ndim, down.ndim, weight.ndim) < 2 or not len(down):
        return False
    return (
        up.flatten(1).shape == (len(weight), len(down))
        and down.shape[1:] == weight.shape[1:]
        and ("alpha" not in parts or parts["alpha"].numel() == 1)
    )


def _dense_edit(path: Path, weights: Weights, model: TextToImage) -> Edit:
    parameters = named_parameters(model)
    before, after = {}, {}
    for name, tensor in weights.items():
        own = parameters[name].detach().cpu()
        coarser = min(own.dtype, tensor.dtype, key=lambda dtype: dtype.itemsize)
        before[name], after[name] = own.to(coarser), tensor.detach().to(coarser)
    _require_finite(path, after)
    if (cosine := _cosine(before, after)) < UNRELATED:
        raise ValueError(
            f"{path} names parameters of {model.name!r}, but its values have nothing to do with theirs (cosine "
            f"{cosine:.3f}); gradients, such as CAD's attributions, are no weights and cannot be imported."
        )
    return Edit.from_weights(before, after)


def _require_finite(path: Path, tensors: Weights) -> None:
    def finite(tensor: Tensor) -> bool:
        return tensor.dtype in _PRECISIONS and bool(tensor.isfinite().all())

    if broken := [f"{name!r}" for name, tensor in tensors.items() if not finite(tensor)]:
        raise ValueError(f"{path} holds infinite values or none at all: {_examples(broken, len(tensors))}.")


def _cosine(one: Weights, other: Weights) -> float:
    def product(first: Weights, second: Weights) -> float:
        return sum(float((first[name].float() * second[name].float()).sum()) for name in one)

    norms = (product(one, one) * product(other, other)) ** 0.5
    return product(one, other) / norms if norms else 1.0


def _examples(described: Sequence[str], total: int) -> str:
    more = ", ..." if len(described) > EXAMPLES else ""
    return f"{len(described)} of {total} entries ({', '.join(described[:EXAMPLES])}{more})"
