"""Reads what a file or a folder of other people holds, without knowing yet what it means."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.files import in_short
from diffusion.loading.pipeline_kinds import GUARDED_PIPELINE
from diffusion.sources import WEIGHT_NAMES, weight_files
from diffusion.weight_files import is_safetensors, read_weights
from erasure.edit import Edit

Weights = dict[str, Tensor]
"""Tensors by the names that a checkpoint gives them, with a dot between levels of nesting."""

ADAPTER_FILES = ("eraser_weights.pt", "eraser_config.json")
"""Receler's."""

ADAPTER = re.compile(r".*\.(down|up)\.(weight|bias)")
"""Names of the tensors of Receler's erasers."""

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
LORA_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
"""Those of diffusers' ``save_lora_weights``."""

GUARDED_EDIT = "edit.safetensors"
"""In a pipeline's folder with a guard: all that the erasure changed and added."""

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "params")
"""What training code calls the weights among the other things that it saves."""

NESTING = 3
"""Levels of dicts that are looked into."""

EXAMPLES = 3
"""How many entries an error names."""

_BOOKKEEPING = re.compile(r"(\w*_)?(optim\w*|sched\w*|scaler|lr\w*|rng\w*|random\w*|callbacks|loops|ema\w*)", re.I)
"""What holds tensors in the checkpoint of a training and is no weight, or an averaged copy."""

_SHELLS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.")
"""What wrappers of PyTorch and PEFT put before or into the names of parameters."""

_OUTER = re.compile(r"^(base_model\.model\.|(pipe|pipeline|diffuser|net|network)\.|model\.(?!diffusion_model\.))+")
"""What classes around a model put before them."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        tensors: By their names, as the file has them.
        header: Texts that describe them: the header of a safetensors file, and the text of :data:`PEFT_CONFIG` under
            its name.
    """

    tensors: Weights
    header: Mapping[str, str] = field(default_factory=dict)


def read_checkpoint(path: Path) -> Edit | Contents:
    """Read what a checkpoint holds; tensors stay on the disk until they are used, where the format allows it.

    Raises:
        FileNotFoundError: There is nothing at ``path``, or a folder without weights.
        ValueError: It is damaged, holds code, is of a kind that is no change of weights, or is a pointer or a web page
            in the place of a checkpoint.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {path}; give the path of a file or of a folder.")
    content = _read_folder(path) if path.is_dir() else _read_file(path)
    if isinstance(content, Edit):
        return content
    tensors = content.tensors
    if not tensors:
        raise ValueError(f"{path} holds no tensors.")
    if odd := [f"{key!r}" for key, tensor in tensors.items() if tensor.layout != torch.strided or tensor.is_meta]:
        raise ValueError(f"{path} is no checkpoint of weights: {examples(odd, len(tensors))} are no plain tensors.")
    return content


def bare_name(key: str) -> str:
    """A parameter's name without what wrappers of training code put around it.

    >>> bare_name("module._orig_mod.conv_in.weight")
    'conv_in.weight'
    """
    return _OUTER.sub("", _SHELLS.sub("", key))


def examples(described: Sequence[str], total: int) -> str:
    """How many entries of a file something is said of, and the first of them."""
    more = ", ..." if len(described) > EXAMPLES else ""
    return f"{len(described)} of {total} entries ({', '.join(described[:EXAMPLES])}{more})"


def _read_folder(folder: Path) -> Edit | Contents:
    if any((folder / name).is_file() for name in ADAPTER_FILES):
        return _read_adapters(*(folder / name for name in ADAPTER_FILES))
    if (folder / PEFT_CONFIG).is_file():
        return _first_file(folder, PEFT_WEIGHTS)
    if any((folder / name).is_file() for name in LORA_WEIGHTS):
        return _first_file(folder, LORA_WEIGHTS)
    if not (folder / "model_index.json").is_file():
        return _read_part(folder)
    if GUARDED_PIPELINE in (read_json(folder / "model_index.json").get("_class_name") or ""):
        return _read_file(folder / GUARDED_EDIT)
    if (folder / "text_encoder_2").is_dir():
        network = folder / ("transformer" if (folder / "transformer").is_dir() else "unet")
        raise ValueError(f"{folder} has several text encoders, whose changes cannot be taken over; give {network}.")
    parts = {part: _read_part(folder / part).tensors for part in ("unet", "text_encoder")}
    return Contents({f"{part}.{key}": tensor for part, weights in parts.items() for key, tensor in weights.items()})


def _first_file(folder: Path, names: Sequence[str]) -> Edit | Contents:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}; give the path of a checkpoint.")
    return _read_file(found)


def _read_part(folder: Path) -> Contents:
    found = weight_files(folder)
    if not found:
        raise FileNotFoundError(
            f"{folder} holds none of {', '.join(WEIGHT_NAMES)}, whole or in all its parts; give the path of a "
            "checkpoint."
        )
    tensors: Weights = {}
    for file in found:
        content = _read_file(file)
        if isinstance(content, Edit):
            raise ValueError(f"{file} is an edit of this project; give its own path.")
        tensors |= content.tensors
    return Contents(tensors)


def _read_file(path: Path) -> Edit | Contents:
    content, header = read_weights(path)
    if "edit" in header:
        return Edit.load(path)
    if path.name in PEFT_WEIGHTS and (config := path.with_name(PEFT_CONFIG)).is_file():
        header = {**header, PEFT_CONFIG: config.read_text(encoding="utf-8", errors="replace")}
    return Contents(content if is_safetensors(path) else _state_dict(content, path), header)


def _state_dict(content: Any, path: Path) -> Weights:
    if isinstance(content, list | tuple):
        raise ValueError(
            f"{path} holds a list, as EcoDiff's gates on heads and neurons are saved, which act while the model "
            "computes and belong to no parameter; ask for a checkpoint of the pruned model."
        )
    if isinstance(content, Mapping):
        content = _without_bookkeeping(_unwrapped(content, path))
    leaves = dict(_leaves(content))
    if others := [f"{key!r}" for key, value in leaves.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path} is no checkpoint of weights: {examples(others, len(leaves))} are no tensors.")
    return leaves


def _unwrapped(content: Mapping[Any, Any], path: Path) -> Mapping[Any, Any]:
    """The weights among what training code has saved.

    Raises:
        ValueError: There are others beside them.
    """
    for _ in range(NESTING):
        wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if wrapper is None or not _has_tensors(content[wrapper]):
            break
        beside = [
            str(key)
            for key, value in content.items()
            if key != wrapper and _has_tensors(value) and not _BOOKKEEPING.fullmatch(str(key))
        ]
        if beside:
            raise ValueError(
                f"{path} holds weights under {wrapper!r} and others under {', '.join(map(repr, beside[:EXAMPLES]))}; "
                "ask for a file of the erased weights alone."
            )
        content = content[wrapper]
    return content


def _without_bookkeeping(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Drop what a training keeps beside weights: its optimizer's state, and numbers and texts of its own."""
    if not _has_tensors(content):
        return content
    return {
        key: value
        for key, value in content.items()
        if isinstance(value, Tensor)
        or (isinstance(value, Mapping) and not _BOOKKEEPING.fullmatch(str(key)))
        or (not isinstance(value, Mapping | list | tuple) and "." in str(key))
    }


def _has_tensors(content: Any, levels: int = NESTING) -> bool:
    if isinstance(content, Mapping) and levels:
        return any(_has_tensors(value, levels - 1) for value in content.values())
    if isinstance(content, list | tuple) and levels:
        return any(_has_tensors(value, levels - 1) for value in content)
    return isinstance(content, Tensor)


def _leaves(content: Any, prefix: str = "", levels: int = NESTING) -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping) and levels:
        for key, value in content.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key), levels - 1)
    else:
        yield prefix, content


def _read_adapters(weights: Path, config: Path) -> Contents:
    if absent := [str(path) for path in (weights, config) if not path.is_file()]:
        raise FileNotFoundError(f"Adapters consist of {' and '.join(ADAPTER_FILES)}; there is no {absent[0]}.")
    content = _read_file(weights)
    described = read_json(config)
    if described.get("eraser_type") != "adapter" or isinstance(content, Edit):
        raise ValueError(f"{config} describes no adapters: its eraser_type must be 'adapter'.")
    tensors = content.tensors
    if odd := [f"{key!r}" for key in tensors if not ADAPTER.fullmatch(key)]:
        raise ValueError(f"{weights} does not hold adapters alone: {examples(odd, len(tensors))} are none.")
    ranks = [list(tensor.shape[:1]) for key, tensor in tensors.items() if key.endswith(".down.weight")]
    if odd := [str(rank) for rank in ranks if rank != [described.get("eraser_rank")]]:
        raise ValueError(
            f"{weights} holds {examples(odd, len(ranks))} of another rank than the eraser_rank in {config}; take both "
            "from one training."
        )
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one if it holds anything else.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {in_short(error)}.") from error
    return described if isinstance(described, dict) else {}
