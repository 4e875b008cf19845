"""Object storage that keeps a store: ``s3://bucket/prefix`` or any other address that fsspec knows.

An artefact ``stage/hash`` lies there as one object for each file, whose name says what the file is called and how its
content begins to hash, and as a manifest of the files, which is written last. So an artefact that was sent in part
does not count, and one that is sent again is at every moment the old one or the new one.

Jobs work in a folder of this machine, which holds what they made and what they fetched; see :class:`RemoteStore`.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from diffusion.files import in_short, replacing
from diffusion.leases import Busy
from diffusion.object_leases import holding_object
from experiments.job.store import LOCK, checked, content_hash, unchecked

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""What is written last, and lists the files of an artefact."""

_WHO_AND_WHERE = "; AWS_ACCESS_KEY_ID, AWS_PROFILE and AWS_ENDPOINT_URL say who asks and where"

_SMALL = 1 << 22
"""Files of so many bytes go several at a time, and larger ones one by one, in parts."""

_AT_ONCE = 64
"""Small files."""

_CHUNK = 1 << 20

EXTRAS = {"s3": "s3", "s3a": "s3"}
"""Extras of this project that bring what an address needs."""

_LOOKS = 3

Facts = dict[str, Any]
"""Size in bytes (``size``) and SHA-256 (``sha256``) of a file."""

Manifest = dict[str, Facts]
"""The files of an artefact by their paths in its folder."""


@dataclass(frozen=True)
class Remote:
    """A store's address.

    Attributes:
        url: Without a slash at its end.
    """

    url: str

    @classmethod
    def of(cls, told: str) -> "Remote":
        """The address ``told``; nothing is asked of the storage.

        Raises:
            ValueError: It is no address, or what it needs is not installed.
        """
        import fsspec  # noqa: PLC0415

        scheme, _, place = told.partition("://")
        known = fsspec.available_protocols()
        if scheme not in known:
            raise ValueError(
                f"{told} is on no storage that fsspec knows; write a folder, s3://BUCKET/PREFIX or another address."
            )
        if not place.strip("/"):
            raise ValueError(f"{told} names no place; write {scheme}://BUCKET/PREFIX.")
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            extra = EXTRAS.get(scheme)
            remedy = f"pip install 'robust-concept-erasing[{extra}]'" if extra else in_short(error)
            raise ValueError(f"{told} needs a package that is not installed: {remedy}.") from error
        return cls(told.rstrip("/"))

    @property
    def root(self) -> Path:
        """The folder of this machine that jobs work in."""
        import pooch  # noqa: PLC0415

        readable = "".join(letter if letter.isalnum() else "-" for letter in self.url.partition("://")[2])
        return Path(pooch.os_cache("robust-concept-erasing")) / "stores" / f"{readable[-40:]}-{content_hash(self.url)}"

    def check(self) -> None:
        """Write a small object and delete it.

        Raises:
            OSError: That is not possible; one sentence says why.
        """
        path = f"{self._base}/.{time.time_ns()}.probe"
        with self._asked("cannot be written to"):
            self._files.pipe_file(path, b"")
            self._files.rm_file(path)

    @contextmanager
    def held(self, artefact: str, *, wait: bool = True) -> Iterator[None]:
        """Hold an artefact alone among all machines; see :func:`holding_object`."""
        with ExitStack() as stack:
            with self._asked("cannot be written to"):
                stack.enter_context(holding_object(self._files, f"{self._base}/{artefact}/{LOCK}", wait=wait))
            yield

    def manifests(self, stage: str = "*") -> dict[str, tuple[Manifest, float]]:
        """The manifest of every artefact of a stage, or of all, by ``stage/hash``, and when it was written."""
        contents: dict[str, bytes] = {}
        with self._asked("cannot be read"):
            paths = self._files.glob(f"{self._base}/{stage}/*/{MANIFEST}")
            if not paths and self.url.partition(":")[0] in EXTRAS:
                # A bucket that is not there has no artefacts either.
                self._files.ls(self._base.partition("/")[0])
            for start in range(0, len(paths), _AT_ONCE):
                contents |= self._files.cat(paths[start : start + _AT_ONCE], on_error="omit")
        read = {"/".join(path.split("/")[-3:-1]): _read_manifest(content) for path, content in contents.items()}
        return {name: told for name, told in sorted(read.items()) if told is not None}

    def manifest(self, artefact: str) -> Manifest:
        """The files of one artefact; none where it has no manifest, or a damaged one."""
        content = self.get(f"{artefact}/{MANIFEST}")
        told = content and _read_manifest(content)
        return told[0] if told else {}

    def pull(self, artefact: str, wanted: Callable[[str], bool] = lambda _: True) -> Manifest:
        """Fetch those files of an artefact that are not here, or differ; returns those that are the same now.

        What this machine has of its own stays: files that the storage lacks, and lines after its last one of a journal.
        """
        told: Manifest = {}
        lost: set[tuple[str, str]] = set()
        # Who reads without the lock may find that a file was replaced meanwhile.
        for _ in range(_LOOKS):
            told = {name: facts for name, facts in self.manifest(artefact).items() if wanted(name)}
            lost = self.fetch({(artefact, name): facts for name, facts in told.items()})
            if not lost:
                break
        for _, name in sorted(lost):
            log.warning("%s/%s/%s is missing or damaged, and is made again", self.url, artefact, name)
            del told[name]
        return told

    def fetch(self, files: Mapping[tuple[str, str], Facts]) -> set[tuple[str, str]]:
        """Fetch files, told by artefact and name, that are not here, or differ; returns those that are not there."""
        missing = {key: facts for key, facts in files.items() if not _is_in(self.root.joinpath(*key), facts)}
        lost = set()
        small = [key for key, facts in missing.items() if facts["size"] <= _SMALL]
        with self._asked("cannot be read"):
            for start in range(0, len(small), _AT_ONCE):
                places = {self._object(*key, missing[key]): key for key in small[start : start + _AT_ONCE]}
                contents = self._files.cat(list(places), on_error="omit")
                for place, key in places.items():
                    if _facts(contents.get(place, b"")) != missing[key]:
                        lost.add(key)
                        continue
                    path = self.root.joinpath(*key)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(path, flush=False) as partial:
                        partial.write_bytes(contents[place])
            for key, facts in missing.items():
                if facts["size"] > _SMALL and not self._fetch_large(key, facts):
                    lost.add(key)
        return lost

    def push(self, artefact: str, before: Manifest) -> Manifest:
        """Send what is new in an artefact's folder, the manifest last; returns the files that are here and there.

        Args:
            artefact: ``stage/hash``, which this process holds.
            before: What the last :meth:`pull` or :meth:`push` returned: of these, files that are gone are forgotten.
        """
        known = self.manifest(artefact)
        with self._asked("cannot be written to"):
            here = self._send(artefact, known)
            told = {name: facts for name, facts in known.items() if name not in before} | here
            if told != known:
                content = json.dumps(checked({"files": told, "written": time.time()})).encode()
                self._files.pipe_file(f"{self._base}/{artefact}/{MANIFEST}", content)
            for name, facts in known.items():
                if told.get(name) != facts:
                    self._forget(self._object(artefact, name, facts))
        return here

    def delete(self, artefact: str) -> bool:
        """Delete an artefact; returns whether it was, which it is not while another machine works in it."""
        try:
            with self.held(artefact, wait=False), self._asked("cannot be written to"):
                self._forget(f"{self._base}/{artefact}/{MANIFEST}")
                # What was sent in part is in no manifest.
                for place in self._files.find(f"{self._base}/{artefact}"):
                    if f"/{artefact}/{LOCK}/" not in place:
                        self._forget(place)
        except Busy:
            return False
        return True

    def put(self, name: str, content: bytes) -> None:
        """Write one object that is no part of an artefact."""
        with self._asked("cannot be written to"):
            self._files.pipe_file(f"{self._base}/{name}", content)

    def get(self, name: str) -> bytes | None:
        """Read such an object; None if there is none."""
        with self._asked("cannot be read"):
            try:
                content: bytes = self._files.cat_file(f"{self._base}/{name}")
            except FileNotFoundError:
                return None
        return content

    def _send(self, artefact: str, known: Manifest) -> Manifest:
        """Send the files that ``known`` does not have; returns all."""
        folder = self.root / artefact
        here: Manifest = {}
        small: dict[str, bytes] = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if not path.is_file() or name.name.startswith(".") or ".damaged-" in name.name:
                continue
            # What is replaced meanwhile stays what it was for who has it open; a journal may grow.
            with suppress(FileNotFoundError), path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                content = file.read(size) if size <= _SMALL else None
                facts = _facts(content) if content is not None else _facts_of(path, file, size)
                here[name.as_posix()] = facts
                if known.get(name.as_posix()) == facts:
                    continue
                place = self._object(artefact, name.as_posix(), facts)
                if content is None:
                    file.seek(0)
                    with self._files.open(place, "wb") as target:
                        _copy(file, target, size)
                    continue
                small[place] = content
            if len(small) == _AT_ONCE:
                self._files.pipe(small)
                small = {}
        if small:
            self._files.pipe(small)
        return here

    def _fetch_large(self, key: tuple[str, str], facts: Facts) -> bool:
        path = self.root.joinpath(*key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), replacing(path, flush=False) as partial:
            self._files.get_file(self._object(*key, facts), str(partial))
            with partial.open("rb") as file:
                if _facts_of(partial, file, partial.stat().st_size) != facts:
                    raise FileNotFoundError(path)
            return True
        return False

    def _forget(self, place: str) -> None:
        with suppress(FileNotFoundError):
            self._files.rm_file(place)

    def _object(self, artefact: str, name: str, facts: Facts) -> str:
        return f"{self._base}/{artefact}/{name}.{facts['sha256'][:16]}"

    @cached_property
    def _files(self) -> Any:
        import fsspec  # noqa: PLC0415

        # Other machines write there too.
        return fsspec.core.url_to_fs(self.url, use_listings_cache=False)[0]

    @cached_property
    def _base(self) -> str:
        base: str = self._files._strip_protocol(self.url)
        return base

    @contextmanager
    def _asked(self, fault: str) -> Iterator[None]:
        """Let what the storage says be an OSError of one sentence."""
        try:
            yield
        except Busy:
            raise
        except Exception as error:
            hint = _WHO_AND_WHERE if self.url.partition(":")[0] in EXTRAS else ""
            raise OSError(f"The store {self.url} {fault}: {in_short(error) or type(error).__name__}{hint}.") from error


def place_of(told: str) -> Path | Remote:
    """What a command says of a store: a folder or an address.

    Raises:
        ValueError: It is no address.
    """
    if told.startswith("file://"):
        return Path(told.removeprefix("file://"))
    return Remote.of(told) if "://" in told else Path(told)


def _facts(content: bytes) -> Facts:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


_KNOWN: dict[tuple[str, int, int, int], Facts] = {}
"""Of large files that were read before, by path, inode, size and time of the last change."""


def _facts_of(path: Path, file: BinaryIO, size: int) -> Facts:
    """Those of the first ``size`` bytes of an open file."""
    state = os.fstat(file.fileno())
    key = (str(path), state.st_ino, size, state.st_mtime_ns)
    if key not in _KNOWN:
        digest = hashlib.sha256()
        for chunk in _chunks(file, size):
            digest.update(chunk)
        _KNOWN[key] = {"size": size, "sha256": digest.hexdigest()}
    return _KNOWN[key]


def _is_in(path: Path, facts: Facts) -> bool:
    """Whether a file is what ``facts`` say; a journal may have more lines."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            longer = path.suffix == ".jsonl" and size > facts["size"]
            return (size == facts["size"] or longer) and _facts_of(path, file, facts["size"]) == facts
    except FileNotFoundError:
        return False


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    for chunk in _chunks(source, size):
        target.write(chunk)


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    left = size
    while left and (chunk := file.read(min(_CHUNK, left))):
        left -= len(chunk)
        yield chunk


def _read_manifest(content: bytes) -> tuple[Manifest, float] | None:
    """The files and when they were written; None where it is damaged, or names a place outside of its artefact."""
    try:
        told = unchecked(json.loads(content))
        files: Manifest = told["files"]
    except (ValueError, KeyError):
        return None
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in files):
        return None
    return files, float(told["written"])
