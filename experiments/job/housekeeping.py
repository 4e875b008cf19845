"""What a store holds, what no run needs, and what is damaged."""

import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusion.files import set_aside
from diffusion.leases import Busy, holding
from diffusion.progress import track
from experiments.job.journal import Journal
from experiments.job.made import read_edit
from experiments.job.outcomes import look_at_outcomes, read_entries
from experiments.job.pictures import read_picture
from experiments.job.remote import Manifest
from experiments.job.remote_store import fetch_summaries, remote_of
from experiments.job.result import RUNS
from experiments.job.store import LOCK, RESULT, Store, content_hash, read_json, unchecked

MADE_BY_JOBS = ("edits", "pictures", "attacks", "verdicts", "measures")
"""Stages whose artefacts runs stand on, and make again where they are missing."""

SUMMARY = "summary.json"

_CONFIG = "config.json"
_HOUR = 3600.0


@dataclass(frozen=True)
class Artefact:
    """A folder of a store.

    Attributes:
        stage: Which stage made it.
        folder: Where it lies.
        remote: Its files and when they were written, where it lies on object storage; None where the folder tells.
    """

    stage: str
    folder: Path
    remote: tuple[Manifest, float] | None = None

    @property
    def name(self) -> str:
        """As summaries name it."""
        return f"{self.stage}/{self.folder.name}"

    @cached_property
    def files(self) -> list[Path]:
        """Every file in it."""
        if self.remote is not None:
            return [self.folder / name for name in self.remote[0]]
        return [path for path in self.folder.rglob("*") if path.is_file()]

    @cached_property
    def size(self) -> int:
        """Bytes of its files."""
        if self.remote is not None:
            return sum(facts["size"] for facts in self.remote[0].values())
        return sum(path.stat().st_size for path in self.files)

    @property
    def hours(self) -> float:
        """Since it was last written to."""
        if self.remote is not None:
            times = [self.remote[1]]
        else:
            times = [self.folder.stat().st_mtime, *(path.stat().st_mtime for path in self.files)]
        return (time.time() - max(times)) / _HOUR


def artefacts(store: Path) -> list[Artefact]:
    """Every artefact of a store, stage by stage.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is no store.
    """
    if not store.is_dir():
        raise FileNotFoundError(f"store is {store}, which is no folder; name the folder of the runs with --store.")
    if (remote := remote_of(store)) is not None:
        told = {name: manifest for name, manifest in remote.manifests().items() if _CONFIG in manifest[0]}
        return [Artefact(Path(name).parent.name, store / name, manifest) for name, manifest in told.items()]
    stages = sorted(path for path in store.iterdir() if path.is_dir())
    found = [
        Artefact(stage.name, folder)
        for stage in stages
        for folder in sorted(stage.iterdir())
        if folder.is_dir() and (folder / _CONFIG).exists()
    ]
    if not found and any(store.iterdir()):
        raise ValueError(f"{store} holds no artefacts; name the folder of the runs with --store.")
    return found


def needs(store: Path) -> dict[str, frozenset[str]]:
    """Of every run which artefacts it stands on, itself included, by their names.

    Raises:
        ValueError: A summary does not say, or is damaged.
    """
    fetch_summaries(store)
    found = {}
    for path in sorted((store / RUNS).glob(f"*/{SUMMARY}")):
        try:
            summary = unchecked(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); `eraselab store repair` sets it aside.") from error
        if not summary.get("uses"):
            raise ValueError(
                f"The run {path.parent.name} does not say what it stands on, as its summary is of an older version; "
                "run its command again, which takes seconds, or delete its folder."
            )
        found[path.parent.name] = frozenset([*summary["uses"], f"{RUNS}/{path.parent.name}"])
    return found


def unneeded(found: Collection[Artefact], needed: Collection[str], hours: float) -> list[Artefact]:
    """Those that runs could stand on and none does.

    Args:
        found: All artefacts.
        needed: Names of those that are needed.
        hours: What was written to in so many last hours is spared: it may be of a job that has no summary yet.
    """
    return [
        artefact
        for artefact in found
        if artefact.stage in MADE_BY_JOBS and artefact.name not in needed and artefact.hours >= hours
    ]


def delete(artefact: Artefact) -> bool:
    """Delete a folder; returns whether it was, which it is not while a process works in it."""
    if artefact.remote is not None and (remote := remote_of(artefact.folder.parents[1])) is not None:
        if not remote.delete(artefact.name):
            return False
        artefact.folder.mkdir(parents=True, exist_ok=True)
    try:
        with holding(artefact.folder / LOCK, wait=False):
            # Where machines share a folder, an open file such as the lock keeps its folder from being removed.
            for path in artefact.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
    except Busy:
        return False
    # Another process may have come for the empty folder.
    with suppress(OSError):
        artefact.folder.rmdir()
    return True


def set_damaged_aside(store: Store) -> Iterator[tuple[Artefact, list[str]]]:
    """Read every artefact to its last byte; what is damaged is renamed, and its job makes it again.

    Yields:
        Each artefact with the names of the files that were set aside now.
    """
    readers: dict[str, Callable[[Store, Path], None]] = {
        "edits": _read_edit,
        "pictures": _read_pictures,
        "attacks": _read_outcomes,
        RUNS: _read_summary,
    }
    found = artefacts(store.root)
    for artefact in track(found, "artefacts", len(found)):
        with store.locked(artefact.folder):
            before = set(_aside(artefact.folder))
            _read_config(artefact.folder)
            readers.get(artefact.stage, _read_result)(store, artefact.folder)
            yield artefact, sorted(set(_aside(artefact.folder)) - before)


def _aside(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.damaged-*")]


def _read_config(folder: Path) -> None:
    path = folder / _CONFIG
    try:
        told: Any = read_json(path)
    except ValueError as error:
        set_aside(path, error)
        return
    if content_hash(told) != folder.name:
        set_aside(path, "it is not what the folder is named after")


def _read_edit(store: Store, folder: Path) -> None:
    read_edit(store, folder)


def _read_result(store: Store, folder: Path) -> None:
    if (folder / RESULT).exists():
        store.result(folder)


def _read_pictures(_: Store, folder: Path) -> None:
    for path in folder.glob("*.png"):
        _read_one(path)


def _read_outcomes(store: Store, folder: Path) -> None:
    for path in sorted(folder.glob("outcomes*.jsonl")):
        Journal(path).mend()
    for path in folder.glob("*.png"):
        _read_one(path)
    look_at_outcomes(store, folder, list(read_entries(folder)))


def _read_one(path: Path) -> None:
    try:
        read_picture(path)
    except ValueError as error:
        # Most of the damages are set aside where they are found.
        if path.exists():
            set_aside(path, error)


def _read_summary(_: Store, folder: Path) -> None:
    path = folder / SUMMARY
    if not path.exists():
        return
    try:
        unchecked(read_json(path))
    except ValueError as error:
        set_aside(path, error)
