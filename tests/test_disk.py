"""Full disks, limits and read-only folders: an error that names the file, and nothing half-written."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from diffusion.disk import room_left, writing
from diffusion.files import replacing, write_atomically
from diffusion.sources import CANVAS_FOLDER
from diffusion.training import save_atomically
from experiments.command.errors import explain
from experiments.instruments import canvas_card

LIMIT = 4096
NOISE = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)


def picture(path: Path) -> None:
    Image.fromarray(NOISE).save(path)


def figure(path: Path) -> None:
    drawn = Figure()
    drawn.subplots().imshow(NOISE)
    drawn.savefig(path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text.txt": lambda path: path.write_text("a" * 20_000),
    "bytes.bin": lambda path: path.write_bytes(bytes(20_000)),
    "tensors.pt": lambda path: torch.save(torch.zeros(5_000), path),
    "edit.safetensors": lambda path: save_file({"weight": torch.zeros(5_000)}, path),
    "picture.png": picture,
    "figure.png": figure,
}


@contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond :data:`LIMIT` bytes, as with ``ulimit -f 4``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_beyond_the_limit_is_named_and_the_old_one_stays(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("as it was")
    with pytest.raises(OSError) as raised, small_files(), replacing(path) as partial:
        WRITERS[name](partial)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert path.read_text() == "as it was"


@pytest.mark.parametrize("name", ["text.txt", "tensors.pt", "picture.png"])
def test_a_full_disk_is_told_by_path_and_free_space(name: str, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    full = tmp_path / name
    full.symlink_to("/dev/full")
    with pytest.raises(OSError) as raised, writing(tmp_path / f"whole-{name}", full):
        WRITERS[name](full)
    assert raised.value.errno == errno.ENOSPC
    assert explain(raised.value) == (
        f"{tmp_path / f'whole-{name}'} cannot be written: No space left on device ({room_left(tmp_path)}); make room, "
        "and the same command continues where it stopped."
    )


def test_a_library_that_does_not_name_its_file_is_looked_at(tmp_path: Path) -> None:
    with small_files(), pytest.raises(OSError) as raised, (tmp_path / "hydra.yaml").open("w") as file:
        file.write("a" * 20_000)
        file.flush()
    assert raised.value.filename is None
    assert str(explain(raised.value)).startswith(f"{tmp_path / 'hydra.yaml'} cannot be written: File too large (")


def test_the_limit_of_a_file_is_told(tmp_path: Path) -> None:
    with small_files(), pytest.raises(OSError) as raised:
        save_atomically({"weight": torch.zeros(5_000)}, tmp_path / "work.checkpoint")
    with small_files():
        assert explain(raised.value) == (
            f"{tmp_path / 'work.checkpoint'} cannot be written: File too large (files may have at most 4 kB (ulimit "
            "-f)); make room, and the same command continues where it stopped."
        )


def test_a_folder_that_cannot_be_written_to_is_told_by_the_files_own_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError) as raised:
        write_atomically(tmp_path / "file" / "summary.json", "{}")
    assert explain(raised.value) == f"{tmp_path / 'file' / 'summary.json'} cannot be used: Not a directory."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError) as raised:
            write_atomically(tmp_path / "summary.json", "{}")
    finally:
        tmp_path.chmod(0o700)
    assert explain(raised.value) == f"{tmp_path / 'summary.json'} cannot be used: Permission denied."


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as raised, replacing(tmp_path / "new"):
        path.read_text()
    assert raised.value.filename == str(path)
    for error in (RuntimeError("a bug"), ValueError("wrong"), ConnectionError("no network")):
        with pytest.raises(type(error)) as same, replacing(tmp_path / "new"):
            raise error
        assert same.value is error


def test_too_little_memory_is_one_sentence() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 58, dtype=torch.uint8)
    for error in (raised.value, MemoryError("Unable to allocate 3 TiB"), torch.OutOfMemoryError("CUDA out of memory")):
        assert str(explain(error)).startswith("There is not enough memory (")
    assert explain(RuntimeError("sizes do not match")) is None


@pytest.mark.parametrize(
    ("arguments", "output"),
    [([], "build/canvas_card"), (["--folder", "mine"], "mine"), (["--folder", "mine", "--output", "there"], "there")],
)
def test_the_card_of_the_shipped_canvas_is_written_beside_it_only_when_it_is_named(
    arguments: list[str], output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["canvas_card", *arguments])
    monkeypatch.setattr(canvas_card, "render", lambda metrics: "a card")

    def measure(folder: Path, output: Path, **_: object) -> dict[str, int]:
        asked.append(folder)
        output.mkdir(parents=True)
        return {}

    monkeypatch.setattr(canvas_card, "measure", measure)
    canvas_card.main()
    assert asked == [Path("mine") if arguments else CANVAS_FOLDER]
    assert (tmp_path / output / "model_card.md").read_text() == "a card"
