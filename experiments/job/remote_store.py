"""A store that lies on object storage, and this machine's copy of it."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from diffusion.files import write_atomically
from diffusion.leases import Busy, holding
from experiments.job.remote import Manifest, Remote
from experiments.job.result import RUNS
from experiments.job.store import LOCK, Store, canonical_json

log = logging.getLogger(__name__)

ADDRESS = "store.url"
"""The file in a machine's own folder that says what it is a copy of."""

SECONDS_BETWEEN_PUSHES = 15.0
"""What was made since the last one is lost with a machine."""

_SUMMARY = "summary.json"


class RemoteStore(Store):
    """A store of artefacts on object storage, which jobs work on in a folder of this machine.

    What an artefact has is fetched before a job works in it, and what is new is sent meanwhile and at the end.

    Args:
        remote: Where it lies.
        fresh: See :class:`Store`.

    Raises:
        OSError: It cannot be written to.
    """

    def __init__(self, remote: Remote, *, fresh: bool = False) -> None:
        remote.check()
        super().__init__(local_copy(remote), fresh=fresh)
        self._remote = remote

    def sign(self, origin: Mapping[str, object]) -> None:
        """See :meth:`Store.sign`."""
        super().sign(origin)
        self._remote.put(f"origins/{self.origin}.json", canonical_json(origin).encode())

    def origin_of(self, name: str) -> dict[str, Any]:
        """See :meth:`Store.origin_of`."""
        told = super().origin_of(name)
        if told or (content := self._remote.get(f"origins/{name}.json")) is None:
            return told
        path = self._origin_file(name)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, content)
        return super().origin_of(name)

    @contextmanager
    def locked(
        self, folder: Path, prepare: Callable[[], None] | None = None, *, pictures: Collection[str] | None = None
    ) -> Iterator[None]:
        """See :meth:`Store.locked`."""
        artefact = folder.relative_to(self.root).as_posix()

        def wanted(name: str) -> bool:
            return pictures is None or not name.endswith(".png") or name in pictures

        with super().locked(folder), self._remote.held(artefact):
            sending = _Sending(self._remote, artefact, self._remote.pull(artefact, wanted))
            with sending.meanwhile():
                if prepare is not None:
                    prepare()
                yield


class _Sending:
    """Keeps what object storage has of an artefact up to date while this process works in it."""

    def __init__(self, remote: Remote, artefact: str, there: Manifest) -> None:
        self._remote, self._artefact, self._there = remote, artefact, there
        self._ended = Event()

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Send what the block makes, every few seconds and at its end, however it ends."""
        sender = Thread(target=self._keep_sending, daemon=True)
        sender.start()
        try:
            yield
        except BaseException:
            self._stop(sender)
            self._try_to_send()
            raise
        self._stop(sender)
        self._send()

    def _stop(self, sender: Thread) -> None:
        self._ended.set()
        sender.join()

    def _keep_sending(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_PUSHES):
            self._try_to_send()

    def _try_to_send(self) -> None:
        try:
            self._send()
        except OSError as error:
            log.warning("what was made is on this machine alone for now: %s", error)

    def _send(self) -> None:
        self._there = self._remote.push(self._artefact, self._there)


def open_store(place: Path | Remote, *, fresh: bool = False) -> Store:
    """The store at a folder or an address; also that of which a folder is this machine's copy.

    Raises:
        OSError: It cannot be written to.
    """
    remote = place if isinstance(place, Remote) else remote_of(place)
    return Store(place, fresh=fresh) if remote is None else RemoteStore(remote, fresh=fresh)  # type: ignore[arg-type]


def local_copy(place: Path | Remote) -> Path:
    """A store's folder, or this machine's copy of what lies on object storage, which begins empty."""
    if isinstance(place, Path):
        return place
    root = place.root
    if remote_of(root) != place:
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / ADDRESS, place.url)
    return root


def remote_of(root: Path) -> Remote | None:
    """What a folder is this machine's copy of; None of a store of its own."""
    try:
        return Remote((root / ADDRESS).read_text())
    except OSError:
        return None


def address_of(root: Path) -> str:
    """The store that a folder is, or is a copy of, as a command says it."""
    remote = remote_of(root)
    return str(root) if remote is None else remote.url


def on_this_machine(config: Any, remote: Remote) -> Any:
    """``config`` with places in a store, as ``s3://bucket/prefix/runs/NAME``, as those in this machine's copy.

    The artefacts that lie there are fetched.
    """
    if isinstance(config, Mapping):
        return {name: on_this_machine(value, remote) for name, value in config.items()}
    if isinstance(config, list):
        return [on_this_machine(value, remote) for value in config]
    if not (isinstance(config, str) and config.startswith(f"{remote.url}/")):
        return config
    stage, *rest = config.removeprefix(f"{remote.url}/").split("/")
    root = local_copy(remote)
    if rest:
        fetch(root / stage / rest[0])
    return str(root.joinpath(stage, *rest))


def fetch(folder: Path, *names: str) -> None:
    """Fetch an artefact, or some of its files, into its folder in this machine's copy of a store; else do nothing."""
    remote = remote_of(folder.parents[1])
    if remote is None:
        return
    artefact = f"{folder.parent.name}/{folder.name}"
    if remote.manifest(artefact):
        folder.mkdir(parents=True, exist_ok=True)
        # A process of this machine that works in it has fetched it before.
        with suppress(Busy), holding(folder / LOCK, wait=False):
            remote.pull(artefact, lambda name: not names or name in names)


def fetch_pictures(root: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Fetch the pictures of rows of a run's list; see :mod:`experiments.job.picture_list`."""
    names: dict[Path, set[str]] = {}
    for row in rows:
        for place in row["pictures"].values():
            names.setdefault((root / place).parent, set()).add(Path(place).name)
    for folder, wanted in names.items():
        fetch(folder, *wanted)


def fetch_summaries(root: Path) -> None:
    """Fetch the summaries of all runs into this machine's copy of a store, and forget what is there no more."""
    remote = remote_of(root)
    if remote is None:
        return
    there = {name: files[_SUMMARY] for name, (files, _) in remote.manifests(RUNS).items() if _SUMMARY in files}
    idle = {name: facts for name, facts in there.items() if not (root / name / LOCK).exists()}
    remote.fetch({(name, _SUMMARY): facts for name, facts in idle.items()})
    for path in (root / RUNS).glob(f"*/{_SUMMARY}"):
        if f"{RUNS}/{path.parent.name}" not in there and not (path.parent / LOCK).exists():
            path.unlink(missing_ok=True)
