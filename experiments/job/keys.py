"""The keys of a job's artefacts: plain data that says everything a result depends on."""

import hashlib
from collections.abc import Mapping, Set
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from attacks.union import Union
from diffusion.sampling import Sampling
from diffusion.source_code import code_of
from experiments.job.settings import SPEED_ONLY, matters
from experiments.job.store import canonical_json


def sampler_key(sampling: Sampling) -> dict[str, Any]:
    """How pictures are sampled."""
    return {"sampling": matters(asdict(sampling))}


def identified(config: Mapping[str, Any], settings: object, speed_only: Set[str] = SPEED_ONLY) -> dict[str, Any]:
    """What an object does: its config and that of the settings within it, the contents of their files, their code."""
    inner = {
        name: identified(config[name], value, speed_only)
        for name, value in vars(settings).items()
        if is_dataclass(value) and isinstance(config.get(name), Mapping)
    }
    key = {**matters(dict(config), speed_only), **_contents(settings), **inner, "code": code_of(settings)}
    if isinstance(settings, Union):
        # In a list, as their order counts.
        members = settings.members.items()
        key["members"] = [[name, identified(config["members"][name], member, speed_only)] for name, member in members]
    return key


def _contents(settings: object) -> dict[str, str]:
    """The hash of every file and folder that results depend on: they count by their content, wherever they lie."""
    paths = {name: path for name, path in vars(settings).items() if isinstance(path, Path) and name not in SPEED_ONLY}
    return {name: _file_hash(path) for name, path in paths.items()}


def _file_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and hashes of all files in a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listing = [[file.relative_to(path).as_posix(), _file_hash(file)] for file in files]
        return hashlib.sha256(canonical_json(listing).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
