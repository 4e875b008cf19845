"""A store on object storage: what one machine makes another finds, whatever was killed in between."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import fsspec
import pytest

from diffusion.leases import Busy
from diffusion.model import TextToImage
from diffusion.object_leases import holding_object, this_machine
from experiments.command.errors import CommandError
from experiments.job import remote_store
from experiments.job.journal import Journal
from experiments.job.remote import MANIFEST, Remote, place_of
from experiments.job.remote_store import RemoteStore, address_of, fetch, fetch_summaries, local_copy, open_store
from experiments.job.store import Store, read_json
from tests.tiny_job import make_job, overrides, run

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 0.6
ADDRESS = "memory://bucket/store"


@pytest.fixture
def address() -> Iterator[str]:
    """A store in this process's memory, which ends with the test."""
    empty()
    yield ADDRESS
    empty()


def empty() -> None:
    with suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


class Machine:
    """Which of several machines, with a cache each, this process is."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch = folder, patch
        self.become("first")

    def become(self, name: str) -> Path:
        """Have that machine's cache, which is returned, and its name."""
        self._patch.setenv("XDG_CACHE_HOME", str(self._folder / name))
        self._patch.setattr("socket.gethostname", lambda: name)
        return self._folder / name


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "machines", monkeypatch)


@dataclass(frozen=True)
class Made:
    """What a machine that is gone made of :func:`small`, there and in a folder."""

    objects: dict[str, bytes]
    summary: dict[str, Any]
    plain: dict[str, Any]


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    files = fsspec.filesystem("memory")
    empty()
    with pytest.MonkeyPatch.context() as patch:
        Machine(folder / "machines", patch).become("gone")
        summary = run(small(world, ADDRESS), folder / "there")
        plain = run(small(world, folder / "store"), folder / "here")
    kept = {path: files.cat_file(path) for path in files.find("/bucket")}
    empty()
    return Made(kept, summary, plain)


@pytest.fixture
def run_there(made: Made, address: str) -> dict[str, Any]:
    """The summary of a run that the storage has from a machine that is gone."""
    fsspec.filesystem("memory").pipe(made.objects)
    return made.summary


def objects(address: str) -> list[str]:
    """What the storage holds, without the store's own name."""
    files = fsspec.filesystem("memory")
    return sorted(path.partition("/store/")[2] for path in files.find("/bucket"))


def small(world: Path, store: object) -> list[str]:
    """A job without training."""
    base = [part for part in overrides(world, Path("store")) if not part.startswith(("attack.", "eraser.", "store="))]
    return [*base, f"store={store}", "eraser=none", "prompts=3", "retained=2", "attack=seed_search", "attack.tries=2"]


def test_what_one_machine_made_another_finds(
    run_there: dict[str, Any],
    made: Made,
    address: str,
    machine: Machine,
    world: Path,
    model: TextToImage,
    tmp_path: Path,
) -> None:
    found = run(small(world, address), tmp_path / "b")
    assert model.unet_evaluations == 0
    assert {key: found[key] for key in ("run", "cases", "costs", "origins", "config")} == {
        key: run_there[key] for key in ("run", "cases", "costs", "origins", "config")
    }
    assert found["config"]["store"] == address
    assert made.plain["run"] == found["run"]
    assert made.plain["cases"] == found["cases"]
    assert not [path for path in objects(address) if ".lease" in path]


def test_only_needed_pictures_are_fetched(
    run_there: dict[str, Any], address: str, machine: Machine, world: Path, model: TextToImage, tmp_path: Path
) -> None:
    alone = [part for part in small(world, address) if not part.startswith("attack")]
    run([*alone, "attack=none", "prompts=1"], tmp_path / "b")
    root = local_copy(Remote(address))
    assert root.is_relative_to(tmp_path / "machines" / "first")
    fetched = len(list((root / "pictures").rglob("*.png")))
    there = sum(path.startswith("pictures/") and ".png." in path for path in objects(address))
    assert 0 < fetched < there
    # Those that were left alone are there still.
    before = model.unet_evaluations
    run(small(world, address), tmp_path / "c")
    assert model.unet_evaluations == before


def artefact(store: Store, stage: str = "stage", **key: int) -> Path:
    return store.folder(stage, key)


def test_what_was_sent_in_part_does_not_count(address: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RemoteStore(Remote(address))
    folder = artefact(store)
    files = fsspec.filesystem("memory")
    pipe_file = type(files).pipe_file

    def no_manifest(self: Any, path: str, value: bytes, **named: Any) -> None:
        if path.endswith(MANIFEST):
            raise OSError("the machine is gone")
        pipe_file(self, path, value, **named)

    with monkeypatch.context() as patch:
        patch.setattr(type(files), "pipe_file", no_manifest)
        with (
            pytest.raises(OSError, match=r"memory://bucket/store cannot be written to: the machine is gone"),
            store.locked(folder),
        ):
            store.write_result(folder, 1)
    assert any("result.json" in path for path in objects(address))
    machine.become("second")
    other = RemoteStore(Remote(address))
    calls: list[int] = []
    assert other.remembered("stage", {}, lambda: calls.append(1) or 2) == 2
    assert calls == [1]
    # Now that it is there, it is the one that counts, on the first machine too.
    machine.become("first")
    again = RemoteStore(Remote(address))
    assert again.remembered("stage", {}, lambda: calls.append(2)) == 2
    assert len([path for path in objects(address) if "result.json" in path]) == 2


def test_what_is_replaced_or_gone_is_forgotten(address: str, machine: Machine) -> None:
    store = RemoteStore(Remote(address))
    folder = artefact(store)
    with store.locked(folder):
        (folder / "work.checkpoint").write_bytes(b"1")
        (folder / "kept").write_bytes(b"1")
    with store.locked(folder):
        (folder / "work.checkpoint").unlink()
        (folder / "kept").write_bytes(b"2")
    names = [path.split("/")[-1].partition(".")[0] for path in objects(address)]
    assert sorted(names) == ["config", "kept", "manifest"]
    machine.become("second")
    other = RemoteStore(Remote(address))
    with other.locked(artefact(other)):
        assert (artefact(other) / "kept").read_bytes() == b"2"


@pytest.mark.parametrize("size", [10, 5 << 20])
def test_a_damaged_object_is_made_again(
    address: str, machine: Machine, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = RemoteStore(Remote(address))
    folder = artefact(store)
    with store.locked(folder):
        (folder / "weights").write_bytes(bytes(size))
    machine.become("second")
    other = RemoteStore(Remote(address))
    with other.locked(artefact(other)):
        assert (artefact(other) / "weights").read_bytes() == bytes(size)
    path = next(path for path in objects(address) if "weights" in path)
    fsspec.filesystem("memory").pipe_file(f"/bucket/store/{path}", b"x" * size)
    machine.become("third")
    other = RemoteStore(Remote(address))
    with other.locked(artefact(other)):
        assert not (artefact(other) / "weights").exists()
        (artefact(other) / "weights").write_bytes(b"new")
    assert "weights is missing or damaged, and is made again" in caplog.text
    machine.become("fourth")
    other = RemoteStore(Remote(address))
    with other.locked(artefact(other)):
        assert (artefact(other) / "weights").read_bytes() == b"new"


def test_a_journal_goes_on_where_it_was_sent_or_written(
    address: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_store, "SECONDS_BETWEEN_PUSHES", 0.05)
    store = RemoteStore(Remote(address))
    folder = artefact(store)

    class Killed(BaseException):
        pass

    with pytest.raises(Killed), store.locked(folder):
        journal = Journal(folder / "outcomes.jsonl")
        journal.append({"id": "a"})
        waiting_for(lambda: any("outcomes.jsonl" in path for path in objects(address)))
        # From here on this machine is cut off.
        monkeypatch.setattr(Remote, "push", lambda *_: {})
        journal.append({"id": "b"})
        raise Killed
    monkeypatch.undo()
    # What the machine had of its own is not lost on it.
    with store.locked(folder):
        assert [entry["id"] for entry in Journal(folder / "outcomes.jsonl").read()] == ["a", "b"]


def waiting_for(happened: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Gone(BaseException):
    """As when a machine loses its power: nothing more is sent."""


def test_a_killed_attack_goes_on_elsewhere(
    made: Made,
    address: str,
    machine: Machine,
    world: Path,
    model: TextToImage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = sum(cost["unet_evaluations"] for cost in made.plain["costs"].values())
    with monkeypatch.context() as patch:
        patch.setattr(remote_store, "SECONDS_BETWEEN_PUSHES", 0.05)
        append, push = Journal.append, Remote.push

        def deadly(self: Journal, entry: Any) -> None:
            append(self, entry)
            waiting_for(lambda: any("outcomes.jsonl" in path for path in objects(address)))
            patch.setattr(Remote, "push", lambda *_: {})
            raise Gone

        patch.setattr(Journal, "append", deadly)
        with pytest.raises(Gone):
            run(small(world, address), tmp_path / "b")
        patch.setattr(Remote, "push", push)
    before = model.unet_evaluations
    cache = machine.become("second")
    found = run(small(world, address), tmp_path / "c")
    assert found["cases"] == made.plain["cases"]
    assert 0 < model.unet_evaluations - before < alone / 2
    journal = next(cache.rglob("outcomes.jsonl"))
    assert len(Journal(journal).read()) == 3


def test_commands_read_it(
    run_there: dict[str, Any], address: str, machine: Machine, world: Path, tmp_path: Path
) -> None:
    from typer.testing import CliRunner  # noqa: PLC0415

    from experiments.command.console import app  # noqa: PLC0415

    made = run_there

    def typed(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments, "--store", address], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        return done.output

    assert made["run"][:8] in typed("runs")
    page = Path(typed("report", made["run"], "--folder", str(tmp_path / "report")).strip().splitlines()[-1])
    assert page.read_text().count("data:image/png") >= 3
    listed = typed("store", "ls")
    assert address in listed
    assert "attacks" in listed
    assert made["run"] in typed("store", "du")
    assert "none is damaged" in typed("store", "repair")
    assert "0 of " in typed("store", "gc")
    # A run that is deleted there is not shown from this machine's copy, and what it stood on can go.
    run_objects = [path for path in objects(address) if path.startswith("runs/")]
    for path in run_objects:
        fsspec.filesystem("memory").rm_file(f"/bucket/store/{path}")
    assert "0 of 0 runs" in typed("runs")
    assert "artefacts deleted" in typed("store", "gc", "--yes", "--spare", "0")
    assert not [path for path in objects(address) if path.startswith(("pictures/", "attacks/", "edits/"))]


def test_places_in_it_are_those_of_this_machine(
    run_there: dict[str, Any], address: str, machine: Machine, world: Path
) -> None:
    command = [part for part in small(world, address) if not part.startswith("attack")]
    job = make_job(*command, f"transfer={run_there['run']}")
    assert job.config["attack"]["found"] == f"{address}/runs/{run_there['run']}"
    found: Path = job.attack.found  # type: ignore[attr-defined]
    assert found.parent == local_copy(Remote(address)) / "runs" / run_there["run"]
    assert found.exists()


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (
            "nowhere://bucket/x",
            "nowhere://bucket/x is on no storage that fsspec knows; write a folder, s3://BUCKET/PREFIX",
        ),
        ("memory:///", "memory:/// names no place; write memory://BUCKET/PREFIX."),
    ],
)
def test_an_address_that_is_none_is_refused_first(told: str, sentence: str, world: Path) -> None:
    with pytest.raises(CommandError) as refused:
        make_job(*small(world, told))
    assert sentence in str(refused.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, world: Path) -> None:
    def missing(scheme: str) -> type:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(CommandError, match=r"needs a package that is not installed: pip install 'robust.*\[s3\]'"):
        make_job(*small(world, "s3://bucket/x"))


def test_storage_that_cannot_be_written_to_is_refused_first(
    address: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", refuse)
    with pytest.raises(OSError, match=r"^The store memory://bucket/store cannot be written to: Access Denied\.$"):
        open_store(Remote(address))


def test_a_folder_is_no_address(tmp_path: Path) -> None:
    assert place_of(f"file://{tmp_path}") == tmp_path
    assert address_of(tmp_path) == str(tmp_path)
    assert type(open_store(tmp_path)) is Store
    fetch(tmp_path / "runs" / "0")
    fetch_summaries(tmp_path)


def test_one_holds_an_object_and_nothing_is_left(address: str) -> None:
    files = fsspec.filesystem("memory")
    with (
        holding_object(files, "/bucket/lock"),
        pytest.raises(Busy, match="held by another process"),
        holding_object(files, "/bucket/lock", wait=False),
    ):
        pass
    with holding_object(files, "/bucket/lock", wait=False):
        pass
    assert not files.find("/bucket/lock")


def test_a_live_holder_keeps_it_longer_than_a_lease(address: str) -> None:
    files = fsspec.filesystem("memory")
    freed: list[float] = []
    held = Event()

    def hold() -> None:
        with holding_object(files, "/bucket/lock", seconds=SECONDS):
            held.set()
            time.sleep(2.5 * SECONDS)
            freed.append(time.monotonic())

    holder = Thread(target=hold)
    holder.start()
    held.wait(10)
    with holding_object(files, "/bucket/lock", seconds=SECONDS):
        taken = time.monotonic()
    holder.join()
    assert taken >= freed[0]


@pytest.mark.parametrize(("machine", "least", "most"), [("another", SECONDS, 20 * SECONDS), (None, 0.0, SECONDS / 2)])
def test_a_dead_holder_is_followed(machine: str | None, least: float, most: float, address: str) -> None:
    files = fsspec.filesystem("memory")
    for number in (1, 2):
        dead = {"machine": machine or this_machine(), "pid": 2**22 + 1, "holder": f"dead {number}", "beats": 3}
        files.pipe_file(f"/bucket/lock/{number}", json.dumps(dead).encode())
    started = time.monotonic()
    with holding_object(files, "/bucket/lock", seconds=SECONDS):
        waited = time.monotonic() - started
    assert least <= waited <= most
    assert not files.find("/bucket/lock")


def test_a_dead_holder_is_followed_by_one(address: str) -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file(
        "/bucket/lock/1", json.dumps({"machine": "another", "pid": 1, "holder": "dead", "beats": 0}).encode()
    )
    at_work: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        with holding_object(files, "/bucket/lock", seconds=SECONDS):
            at_work.append(number)
            most.append(len(at_work))
            time.sleep(0.05)
            at_work.remove(number)

    workers = [Thread(target=work, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1] * 6
    assert not files.find("/bucket/lock")


def test_a_lost_lock_is_told(address: str, caplog: pytest.LogCaptureFixture) -> None:
    files = fsspec.filesystem("memory")
    with holding_object(files, "/bucket/lock", seconds=SECONDS):
        files.pipe_file("/bucket/lock/2", b'{"machine": "another", "pid": 1, "holder": "other", "beats": 0}')
        waiting_for(lambda: "was lost: another process may do this work too" in caplog.text)
    assert files.find("/bucket/lock") == ["/bucket/lock/2"]


def test_a_pruned_job_is_compared_with_the_unpruned_one_of_another_machine(
    run_there: dict[str, Any], address: str, machine: Machine, world: Path, model: TextToImage, tmp_path: Path
) -> None:
    pruned = run([*small(world, address), "pruning=magnitude"], tmp_path)
    assert pruned["unpruned"]["run"] == run_there["run"]


def count_made(log: Path) -> None:
    """Write down, by its place in the store, all that this process makes and not what it fetches."""
    from experiments.job import outcomes, pictures  # noqa: PLC0415
    from experiments.job.pictures import write_picture  # noqa: PLC0415

    write_result, append = Store.write_result, Journal.append

    def note(path: Path) -> None:
        with log.open("a") as file:
            file.write(f"{'/'.join(path.parts[-3:])}\n")

    def noted_result(self: Store, folder: Path, value: object) -> Any:
        note(folder / "result.json")
        return write_result(self, folder, value)

    def noted_picture(path: Path, *told: Any) -> None:
        note(path)
        write_picture(path, *told)

    def noted_line(self: Journal, entry: Any) -> None:
        note(self.path.with_name(f"{self.path.name}:{entry['id']}"))
        append(self, entry)

    Store.write_result, Journal.append = noted_result, noted_line  # type: ignore[method-assign]
    outcomes.write_picture = pictures.write_picture = noted_picture  # type: ignore[assignment]


def work_as(machine: str, world: Path, shared: Path, address: str, every: int) -> None:
    """Do each ``every``-th of sixteen jobs under the name of a machine."""
    import socket  # noqa: PLC0415

    from tests.test_shared_store import jobs  # noqa: PLC0415

    socket.gethostname = lambda: machine
    count_made(shared / f"{machine}.log")
    (shared / f"{machine}.ready").touch()
    waiting_for(lambda: len(list(shared.glob("*.ready"))) == 2, 600)
    for number, job in enumerate(jobs(world, address)[::every]):
        run(job, shared / machine / str(number))


def die_as(machine: str, world: Path, shared: Path, address: str, _: int) -> None:
    """Do one job under the name of a machine, and be killed once its second outcome was sent."""
    import os  # noqa: PLC0415
    import signal  # noqa: PLC0415
    import socket  # noqa: PLC0415

    socket.gethostname = lambda: machine
    remote_store.SECONDS_BETWEEN_PUSHES = 0.2
    append = Journal.append

    def deadly(self: Journal, entry: Any) -> None:
        append(self, entry)
        if len(self.read()) == 2:
            time.sleep(5)
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.append = deadly  # type: ignore[method-assign]
    run(small(world, address), shared / machine)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store on a server of moto's, which answers as S3 does."""
    server_of = pytest.importorskip("moto.server", reason="moto is not installed; pip install 'moto[s3,server]'.")
    pytest.importorskip("s3fs", reason="s3fs is not installed; pip install '.[s3]'.")
    server = server_of.ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.makedirs("bucket", exist_ok=True)
    yield f"s3://bucket/{secrets.token_hex(4)}"
    server.stop()


def start(
    function: str, machine: str, world: Path, shared: Path, address: str, every: int = 1
) -> subprocess.Popen[bytes]:
    """One of this file's functions in a process of its own, as on a machine of its own."""
    caches = {name: str(shared / machine / name) for name in ("XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME")}
    arguments = f"{machine!r}, *map(Path, {[str(world), str(shared)]!r}), {address!r}, {every}"
    program = f"from pathlib import Path\nfrom tests.test_remote_store import {function}\n{function}({arguments})"
    environment = {**os.environ, **caches, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("every", [4, 1])
def test_two_machines_make_each_artefact_on_s3_once(every: int, s3: str, world: Path, tmp_path: Path) -> None:
    processes = [start("work_as", machine, world, tmp_path, s3, every) for machine in ("first", "second")]
    assert [process.wait(timeout=1800) for process in processes] == [0, 0]
    made = [(tmp_path / f"{machine}.log").read_text().splitlines() for machine in ("first", "second")]
    counted = Counter(line for lines in made for line in lines)
    assert not {line: times for line, times in counted.items() if times > 1}
    assert every > 1 or min(map(len, made)) > 0
    print(f"{len(counted)} results, pictures and outcomes of {16 // every} jobs, made by the two: {[*map(len, made)]}")
    for number in range(16 // every):
        one, other = (read_json(tmp_path / machine / str(number) / "summary.json") for machine in ("first", "second"))
        assert one["run"] == other["run"]
        assert one["cases"] == other["cases"]
    manifests = Remote(s3).manifests()
    kept = {f"{name}/{file}" for name, (files, _) in manifests.items() for file in files}
    assert {line for line in counted if ":" not in line} <= kept
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    assert not [path for path in files.find(s3) if "/.lease/" in path]


@pytest.mark.slow
def test_a_machine_that_was_killed_on_s3_is_followed(s3: str, world: Path, tmp_path: Path) -> None:
    whole = run(small(world, tmp_path / "plain"), tmp_path / "whole")
    assert start("die_as", "first", world, tmp_path, s3).wait(timeout=600) == -9
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "second")
    count_made(tmp_path / "second.log")
    found = run(small(world, s3), tmp_path / "second")
    assert found["cases"] == whole["cases"]
    again = [line for line in (tmp_path / "second.log").read_text().splitlines() if "outcomes.jsonl:" in line]
    assert len(again) == 1


@pytest.mark.slow
def test_s3_that_cannot_be_used_is_told_in_a_sentence(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Remote(s3).check()
    with pytest.raises(OSError, match=r"^The store s3://nowhere/x cannot be written to: .*bucket does not exist.*AWS_"):
        Remote("s3://nowhere/x").check()
    with pytest.raises(OSError, match=r"^The store s3://nowhere/x cannot be read: .*bucket does not exist.*AWS_"):
        Remote("s3://nowhere/x").manifests()
    assert Remote(s3).manifests() == {}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(OSError, match=r"cannot be written to: Unable to locate credentials; AWS_ACCESS_KEY_ID"):
        Remote(s3).check()
