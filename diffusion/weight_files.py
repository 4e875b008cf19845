"""Files of weights, read without running any code of theirs."""

import re
from contextlib import AbstractContextManager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion.files import in_short, require_itself

LOADING_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError, ImportError),
    *(SafetensorError, UnpicklingError),
)
"""What the libraries raise on files that are damaged or of another kind."""


class _Inert:
    """What a name in a pickled checkpoint stands for when only the weights are of interest."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_INERT_LIBRARIES = frozenset({"pytorch_lightning", "lightning", "lightning_fabric", "omegaconf"})
_INERT_NAMES = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "_codecs.encode", "argparse.Namespace", "types.SimpleNamespace"),
    *("pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "collections.defaultdict"),
)
"""What training code keeps beside the weights: numbers of NumPy, options, paths."""


def inert_names_allowed(path: Path) -> AbstractContextManager[Any]:
    """Let ``torch.load(weights_only=True)`` pass over what training code keeps beside weights.

    The trainer classes that Stable Diffusion's own .ckpt names, NumPy's numbers, options and paths resolve to an empty
    class: neither PyTorch Lightning nor any code of the file is run, and every other name is still refused.
    """
    try:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except LOADING_ERRORS:
        # Files older than PyTorch 1.6 do not tell.
        names = set(_INERT_NAMES)
    inert = sorted(name for name in names if name.split(".")[0] in _INERT_LIBRARIES or name in _INERT_NAMES)
    return torch.serialization.safe_globals([(type(_Inert.__name__, (_Inert,), {}), name) for name in inert])


def is_safetensors(path: Path) -> bool:
    """Whether a file has the format of safetensors, whatever its name says."""
    with path.open("rb") as file:
        # It starts with a length of eight bytes, whatever they are, and a JSON object.
        return file.read(9)[8:] == b"{"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its header's texts.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except LOADING_ERRORS as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {in_short(error)}.") from error


def read_pickled(path: Path) -> Any:
    """What ``torch.save`` wrote into a file: tensors in dicts and lists; they stay on the disk where that is possible.

    Raises:
        ValueError: The file is damaged, or holds code.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    try:
        with inert_names_allowed(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} is damaged or holds more than tensors{f' ({named[1]})' if named else ''}, and no code of a "
            "checkpoint is ever run; ask for a file of the weights alone."
        ) from error
    except LOADING_ERRORS as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {in_short(error)}.") from error


def read_weights(path: Path) -> tuple[Any, dict[str, str]]:
    """What a file of weights holds, pickled or safetensors, and its header's texts.

    Raises:
        ValueError: The file is empty, damaged, holds code, or is a pointer or a web page in the place of another.
    """
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty.")
    require_itself(path)
    return read_safetensors(path) if is_safetensors(path) else (read_pickled(path), {})


def read_network_weights(path: Path) -> dict[str, Tensor]:
    """The parameters of one network from its published file.

    Raises:
        ValueError: See :func:`read_weights`; or the file holds something else.
    """
    content, _ = read_weights(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no network's weights; download it again.")
    return content
