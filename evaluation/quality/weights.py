"""Published weights that come as one file: given by path, found in torch's hub folder, or fetched into it."""

import re
from pathlib import Path

import torch
from pydantic import BeforeValidator


def weights_file(url: str) -> BeforeValidator:
    """Turn a path, or null for the file that ``url`` gives out, into the path of a file that is there.

    A file of that name in torch's hub folder is taken as it is; what is fetched is checked by the hash in its name.
    """

    def find(path: object) -> Path:
        if path is not None:
            if not (given := Path(str(path)).expanduser()).is_file():
                raise ValueError(f"it is {str(path)!r}, which is no file; download {url} and name it here.")
            return given
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if not file.is_file():
            _fetch(url, file)
        return file

    return BeforeValidator(find)


def _fetch(url: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    known = re.search(r"-([0-9a-f]{8,})\.", file.name)
    try:
        torch.hub.download_url_to_file(url, str(file), hash_prefix=known[1] if known else None)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"its weights are not in {file.parent} and cannot be fetched ({error}); download {url} to that folder, or "
            "name the file here."
        ) from error
