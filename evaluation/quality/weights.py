"""Published weights that come as one file: given by path, found in torch's hub folder, or fetched into it."""

import hashlib
import re
from pathlib import Path

import torch
from pydantic import BeforeValidator
from torch import nn

from diffusion.files import in_short, stands_in
from diffusion.weight_files import read_network_weights


def weights_file(url: str) -> BeforeValidator:
    """Turn a path, or null for the file that ``url`` gives out, into the path of a file that is there.

    What is fetched, and a file of that name in torch's hub folder, is checked by the hash in its name.
    """

    def find(path: object) -> Path:
        if path is not None:
            if not (given := Path(str(path)).expanduser()).is_file():
                raise ValueError(f"it is {str(path)!r}, which is no file; download {url} and name it here.")
            return given
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if not file.is_file():
            _fetch(url, file)
        elif (known := _hash_in(file)) and not _sha256(file).startswith(known):
            fault = stands_in(file) or "is not the published file (its SHA-256 is not that in its name)"
            raise ValueError(f"its weights in {file} cannot be used: it {fault}; delete it, to have it fetched again.")
        return file

    return BeforeValidator(find)


def load_parameters(network: nn.Module, file: Path, name: str) -> None:
    """Give ``network`` the parameters in ``file``; no code in it is run.

    Raises:
        ValueError: The file is damaged, or holds another network's than ``name``'s.
    """
    parameters = read_network_weights(file)
    try:
        network.load_state_dict(parameters)
    except RuntimeError as error:
        raise ValueError(f"{file} holds no weights of {name}; download it again: {in_short(error)}.") from error


def _hash_in(file: Path) -> str | None:
    """The beginning of the SHA-256 that the names of published weights end in."""
    known = re.search(r"-([0-9a-f]{8,})\.", file.name)
    return known[1] if known else None


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _fetch(url: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file), hash_prefix=_hash_in(file))
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"its weights are not in {file.parent} and cannot be fetched ({error}); download {url} to that folder, or "
            "name the file here."
        ) from error
