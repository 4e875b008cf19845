"""The artefact store: hashes, atomic writes, locks, a journal that survives kills, pictures."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin

from diffusion.files import replacing
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from evaluation.prompt_sets import PromptRow
from experiments.job.journal import Journal
from experiments.job.pictures import make_pictures, read_picture, write_picture
from experiments.job.settings import TRAINING_SPEED_ONLY, matters
from experiments.job.store import Store, content_hash, read_json, write_json


def test_hash_depends_on_content_and_not_on_order() -> None:
    assert content_hash({"a": 1, "b": {"c": [1, 2], "d": None}}) == content_hash(
        {"b": {"d": None, "c": [1, 2]}, "a": 1}
    )
    hashes = {content_hash(data) for data in ({"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": [1]}, {"b": 1}, {"a": None})}
    assert len(hashes) == 6
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in hashes)


def test_fields_that_change_speed_alone_are_no_part_of_a_key() -> None:
    config = {"batch_size": 8, "steps": 3, "inner": {"device": "cpu", "list": [{"sampling_batch_size": 4, "k": 1}]}}
    assert matters(config) == {"steps": 3, "inner": {"list": [{"k": 1}]}}
    assert matters(config, TRAINING_SPEED_ONLY)["batch_size"] == 8


def test_folder_says_what_made_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    folder = store.folder("edits", {"seed": 3})
    assert folder.parent == tmp_path / "store" / "edits"
    assert read_json(folder / "config.json")["seed"] == 3
    assert store.folder("edits", {"seed": 3}) == folder
    assert store.folder("edits", {"seed": 4}) != folder
    assert store.folder("attacks", {"seed": 3}).name != folder.name


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, [1])
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("[2")
        raise RuntimeError("disk full")
    assert read_json(path) == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_a_store_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="must be a folder that can be written to"):
        Store(tmp_path / "file" / "store")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: '{"value": 5}',
        lambda text: text.replace("17", "18"),
        lambda text: text.replace("checksum", "checksun"),
        lambda text: text.replace('"origin"', '"origins"'),
        lambda text: "\udcff",
    ],
)
def test_a_damaged_result_is_set_aside_and_made_again_once(
    damage: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    computed: list[int] = []

    def compute() -> list[int]:
        computed.append(1)
        return [17]

    store = Store(tmp_path)
    assert store.remembered("s", {"k": 1}, compute) == [17]
    path = store.folder("s", {"k": 1}) / "result.json"
    damaged = damage(path.read_text()).encode(errors="surrogateescape")
    path.write_bytes(damaged)
    for _ in range(2):
        assert store.remembered("s", {"k": 1}, compute) == [17]
    assert len(computed) == 2
    assert path.with_name("result.json.damaged-1").read_bytes() == damaged
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(path) in line
    assert "made again" in line


def test_a_damaged_description_of_a_folder_is_written_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.folder("s", {"k": 1}) / "config.json"
    sound = path.read_text()
    for damage in ("", "[]", sound.replace("1", "2")):
        path.write_text(damage)
        assert store.folder("s", {"k": 1}) == path.parent
        assert path.read_text() == sound


def test_a_fresh_store_makes_everything_anew_once(tmp_path: Path) -> None:
    made: list[int] = []

    def compute() -> int:
        made.append(len(made))
        return made[-1]

    assert Store(tmp_path).remembered("s", {}, compute) == 0
    fresh = Store(tmp_path, fresh=True)
    assert [fresh.remembered("s", {}, compute) for _ in range(3)] == [1, 1, 1]
    assert Store(tmp_path).remembered("s", {}, compute) == 1


def test_who_made_something_is_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.sign({"git": "abc", "threads": 1})
    store.remembered("s", {}, lambda: 1)
    other = Store(tmp_path)
    other.sign({"git": "def", "threads": 2})
    stored = other.result(other.folder("s", {}))
    assert stored is not None
    assert other.origin_of(stored.origin) == {"git": "abc", "threads": 1}
    (tmp_path / "origins" / f"{stored.origin}.json").write_text('{"git": "xyz"}')
    assert other.origin_of(stored.origin) == {}


def test_two_workers_do_the_work_once(tmp_path: Path) -> None:
    computed: list[int] = []

    def work() -> int:
        computed.append(1)
        time.sleep(0.1)
        return len(computed)

    results: list[int] = []
    store = Store(tmp_path)
    workers = [threading.Thread(target=lambda: results.append(store.remembered("s", {"k": 1}, work))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (computed, results) == ([1], [1, 1, 1, 1])


def test_work_that_fails_is_not_remembered(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def failing() -> int:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        store.remembered("s", {}, failing)
    assert store.remembered("s", {}, lambda: 5) == 5


def test_journal_keeps_whole_lines_and_drops_a_torn_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "outcomes.jsonl")
    journal.append({"id": "a", "score": 0.1 + 0.2, "text": "line\nbreak ü"})
    journal.append({"id": "b"})
    with journal.path.open("a") as file:
        file.write('{"id": "c", "sco')
    reopened = Journal(journal.path)
    assert reopened.read() == [{"id": "a", "score": 0.1 + 0.2, "text": "line\nbreak ü"}, {"id": "b"}]
    reopened.append({"id": "c"})
    assert [json.loads(line)["id"] for line in journal.path.read_text().splitlines()] == ["a", "b", "c"]


@pytest.mark.parametrize("damage", [b"{", b"[]", b"5", b"{}", b'{"id": "b", "score": 3}', b"\xff\xfe", b""])
def test_a_bad_line_of_a_journal_is_dropped_alone(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "outcomes.jsonl")
    for name in "abc":
        journal.append({"id": name, "score": 1})
    lines = journal.path.read_bytes().splitlines()
    journal.path.write_bytes(b"\n".join([lines[0], damage, lines[2]]) + b"\n")
    damaged = journal.path.read_bytes()
    assert [entry["id"] for entry in journal.read()] == ["a", "c"]
    journal.mend()
    assert journal.path.read_bytes() == b"\n".join([lines[0], lines[2]]) + b"\n"
    assert (tmp_path / "outcomes.jsonl.damaged-1").read_bytes() == damaged
    journal.mend()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "line 2" in line


def test_a_journal_of_a_torn_line_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "outcomes.jsonl").write_text('{"id"')
    assert Journal(tmp_path / "outcomes.jsonl").read() == []


def test_picture_comes_back_bit_for_bit_with_its_facts(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_picture(tmp_path / "a.png", image, {"prompt": "a ü church", "seconds": 0.25})
    read, facts = read_picture(tmp_path / "a.png")
    assert torch.equal(read, image)
    assert {name: facts[name] for name in ("prompt", "seconds")} == {"prompt": "a ü church", "seconds": 0.25}


def test_a_picture_damaged_while_it_is_in_use_is_set_aside_and_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"a\.png was damaged .*; run the same command again"):
        read_picture(tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png.damaged-1"]


def _other_pixels(path: Path) -> None:
    _, facts = read_picture(path)
    image = torch.zeros((3, 16, 16), dtype=torch.uint8)
    text = PngImagePlugin.PngInfo()
    text.add_text("made from", json.dumps(facts))
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, pnginfo=text)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)


PICTURE_DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "without its end": lambda path: path.write_bytes(path.read_bytes()[:-12]),
    "empty": lambda path: path.write_bytes(b""),
    "a flipped bit": _flip,
    "no PNG": lambda path: path.write_text("<html>"),
    "without facts": lambda path: Image.new("RGB", (16, 16)).save(path),
    "another prompt's": lambda path: path.write_bytes(next(path.parent.glob("*.png.other")).read_bytes()),
}


@pytest.mark.parametrize("damage", PICTURE_DAMAGES)
def test_a_damaged_picture_is_made_again_alone(
    damage: str, tiny_model: TextToImage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [PromptRow(number, f"a church {number}", number, 3.0) for number in range(3)]
    store, sampling = Store(tmp_path), Sampling(steps=2, batch_size=2)
    first = make_pictures(store, {}, tiny_model, rows, sampling, "pictures")
    images, spent = first.images, tiny_model.unet_evaluations
    (first.folder / "x.png.other").write_bytes(first.paths[0].read_bytes())
    PICTURE_DAMAGES[damage](first.paths[1])
    again = make_pictures(store, {}, tiny_model, rows, sampling, "pictures")
    assert tiny_model.unet_evaluations == spent + 2 * 2
    assert torch.equal(again.images, images)
    assert again.key == first.key
    assert first.paths[1].with_name(f"{first.paths[1].name}.damaged-1").exists()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(first.paths[1]) in line


def test_pixels_that_were_not_written_are_not_used(tiny_model: TextToImage, tmp_path: Path) -> None:
    rows = [PromptRow(0, "a church", 0, 3.0)]
    store, sampling = Store(tmp_path), Sampling(steps=1, batch_size=2)
    first = make_pictures(store, {}, tiny_model, rows, sampling, "pictures")
    images = first.images
    _other_pixels(first.paths[0])
    second = make_pictures(store, {}, tiny_model, rows, sampling, "pictures")
    with pytest.raises(ValueError, match="not those that were written"):
        _ = second.images
    third = make_pictures(store, {}, tiny_model, rows, sampling, "pictures")
    assert torch.equal(third.images, images)


def test_only_missing_pictures_are_made_and_costs_stay_those_of_the_making(
    tiny_model: TextToImage, tmp_path: Path
) -> None:
    rows = [PromptRow(number, f"a church {number}", number, 3.0) for number in range(5)]
    store, sampling = Store(tmp_path), Sampling(steps=2, batch_size=2)
    first = make_pictures(store, {"model": "m"}, tiny_model, rows[:3], sampling, "pictures")
    assert first.cost.unet_evaluations == tiny_model.unet_evaluations == 3 * 2 * 2
    every = make_pictures(store, {"model": "m"}, tiny_model, rows, sampling, "pictures")
    assert every.cost.unet_evaluations == tiny_model.unet_evaluations == 5 * 2 * 2
    again = make_pictures(store, {"model": "m"}, tiny_model, rows, sampling, "pictures")
    assert tiny_model.unet_evaluations == 5 * 2 * 2
    assert again.cost == every.cost
    assert torch.equal(again.images, every.images)
    assert torch.equal(every.images[:3], first.images)
    assert again.key == every.key != first.key


def test_order_of_pictures_is_that_of_the_prompts(tiny_model: TextToImage, tmp_path: Path) -> None:
    rows = [PromptRow(number, f"a church {number}", number, 3.0) for number in range(3)]
    store, sampling = Store(tmp_path), Sampling(steps=1, batch_size=8)
    forward = make_pictures(store, {}, tiny_model, rows, sampling, "pictures")
    backward = make_pictures(store, {}, tiny_model, rows[::-1], sampling, "pictures")
    assert torch.equal(forward.images.flip(0), backward.images)
