"""What jobs made, found again by the hash of what made it: ``<root>/<stage>/<hash>/``.

A stage's key is plain data: the part of the config that matters to it, the code that does the work, and the hashes of
what it stands on. Batch sizes and paths are no part of a key. Every file is written under a temporary name and
renamed, so a killed job leaves nothing half-written, and a lock per folder makes two workers do the work once. What is
read back is held against its checksum; a damaged file is set aside and made again.
"""

import contextlib
import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.files import set_aside, write_atomically
from diffusion.finite import require_finite_numbers
from diffusion.leases import holding

log = logging.getLogger(__name__)

SCHEMA_VERSION = 3
"""Part of every hash: raise it when the same config would no longer give the same artefacts."""

LOCK = ".lease"
"""The file that the process that works in a folder holds."""

RESULT = "result.json"
"""What a stage calls its result, which is written last."""


def content_hash(data: object) -> str:
    """16 hexadecimal digits of the SHA-256 of ``data`` as canonical JSON.

    >>> content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})
    True
    """
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()[:16]


def canonical_json(data: object) -> str:
    """``data`` as JSON with sorted keys and no white space.

    Raises:
        NotFiniteError: A number in it is infinite or NaN, which is no JSON.
    """
    require_finite_numbers(data, "A result")
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def write_json(path: Path, data: object) -> None:
    """Write ``data`` as indented JSON, atomically.

    Raises:
        NotFiniteError: A number in it is infinite or NaN, which is no JSON.
    """
    require_finite_numbers(data, f"{path.name}, which was to be written,")
    write_atomically(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: The file is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}).") from error


def checked(data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` as it comes back from a JSON file, with its checksum beside it."""
    plain = json.loads(json.dumps(data))
    return {**plain, "checksum": content_hash(plain)}


def unchecked(data: Any) -> dict[str, Any]:
    """What :func:`checked` was given.

    Raises:
        ValueError: ``data`` is something else, or its checksum does not fit.
    """
    if not isinstance(data, dict) or "checksum" not in data:
        raise ValueError("it has no checksum")
    plain = {key: value for key, value in data.items() if key != "checksum"}
    if content_hash(plain) != data["checksum"]:
        raise ValueError("its checksum does not fit its content")
    return plain


@dataclass(frozen=True)
class Stored:
    """The result of a stage.

    Attributes:
        value: JSON.
        origin: Who made it; see :meth:`Store.sign`.
    """

    value: Any
    origin: str


class Store:
    """A folder of artefacts.

    Args:
        root: Where they lie; made when missing.
        fresh: Whether everything is made anew: what was there before is taken for missing, once.

    Attributes:
        origin: The name of who makes what is made now; empty until :meth:`sign`.
        fresh: See above.
        used: Every folder that was asked for, as ``stage/hash``.

    Raises:
        OSError: ``root`` cannot be made or written to.
    """

    def __init__(self, root: Path, *, fresh: bool = False) -> None:
        self.root = root
        self.origin = ""
        self.fresh = fresh
        self.used: set[str] = set()
        self._renewed: set[Path] = set()
        probe = root / f".{secrets.token_hex(8)}.probe"
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            raise OSError(f"store is {root}; it must be a folder that can be written to ({error.strerror}).") from error
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def sign(self, origin: Mapping[str, object]) -> None:
        """Say who makes what is made from now on: revision, versions, machine. It is kept once for all artefacts."""
        self.origin = content_hash(origin)
        path = self._origin_file(self.origin)
        if self.origin_of(self.origin) != dict(origin):
            path.parent.mkdir(exist_ok=True)
            write_json(path, origin)

    def origin_of(self, name: str) -> dict[str, Any]:
        """What :meth:`sign` was told under this name; nothing where that is not known any more."""
        try:
            told = json.loads(self._origin_file(name).read_bytes())
        except (OSError, ValueError):
            return {}
        return told if isinstance(told, dict) and content_hash(told) == name else {}

    def _origin_file(self, name: str) -> Path:
        return self.root / "origins" / f"{name}.json"

    def folder(self, stage: str, key: Mapping[str, object]) -> Path:
        """The folder of one artefact, made when missing; its ``config.json`` is ``key``."""
        described = {"schema": SCHEMA_VERSION, "stage": stage, **key}
        folder = self.root / stage / content_hash(described)
        folder.mkdir(parents=True, exist_ok=True)
        self.used.add(f"{stage}/{folder.name}")
        path = folder / "config.json"
        if path.exists():
            try:
                if content_hash(read_json(path)) == folder.name:
                    return folder
            except ValueError:
                pass
            set_aside(path, "it is not what the folder is named after")
        write_json(path, described)
        return folder

    @contextmanager
    def locked(
        self, folder: Path, prepare: Callable[[], None] | None = None, *, pictures: Collection[str] | None = None
    ) -> Iterator[None]:
        """Hold ``folder`` alone among all machines; it is free soon after the process dies, see :func:`holding`.

        ``prepare`` is called before anyone works in it: it looks what is there. ``pictures`` are the names of those
        that are needed, None for all; a store that lies elsewhere need not fetch the others.
        """
        with holding(folder / LOCK):
            if prepare is not None:
                prepare()
            yield

    def renews(self, path: Path) -> bool:
        """Whether what lies at ``path`` is to be made anew; asked again, it says no."""
        if not self.fresh or path in self._renewed:
            return False
        self._renewed.add(path)
        return True

    def result(self, folder: Path) -> Stored | None:
        """The result of a stage; None if there is none yet, or a damaged one, which is set aside."""
        path = folder / RESULT
        if self.renews(path):
            path.unlink(missing_ok=True)
        if not path.exists():
            return None
        try:
            plain = unchecked(read_json(path))
            return Stored(plain["value"], plain["origin"])
        except (ValueError, KeyError) as error:
            set_aside(path, error)
            return None

    def write_result(self, folder: Path, value: object) -> Stored:
        """Write the result of a stage, and read it back.

        Raises:
            ValueError: It does not come back: the disk is broken.
        """
        # What is new is not to be taken for what was there before.
        self.renews(folder / RESULT)
        write_json(folder / RESULT, checked({"value": value, "origin": self.origin}))
        stored = self.result(folder)
        if stored is None:
            raise ValueError(f"{folder / RESULT} was damaged as soon as it was written; check the disk.")
        return stored

    def remembered(self, stage: str, key: Mapping[str, object], compute: Callable[[], Any]) -> Any:
        """The JSON value that ``compute`` returned the first time that ``stage`` met ``key``."""
        folder = self.folder(stage, key)
        with self.locked(folder):
            stored = self.result(folder)
            return (stored or self.write_result(folder, compute())).value
