"""The artefact store: hashes, atomic writes, locks, a journal that survives kills, pictures."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from diffusion.files import replacing
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from evaluation.prompt_sets import PromptRow
from experiments.job.pictures import make_pictures, read_picture, write_picture
from experiments.job.settings import TRAINING_SPEED_ONLY, matters
from experiments.job.store import Journal, Store, content_hash, read_json, write_json


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


def test_a_damaged_json_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"is damaged .* delete its folder"):
        read_json(tmp_path / "result.json")


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


def test_a_journal_of_a_torn_line_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "outcomes.jsonl").write_text('{"id"')
    assert Journal(tmp_path / "outcomes.jsonl").read() == []


def test_picture_comes_back_bit_for_bit_with_its_facts(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_picture(tmp_path / "a.png", image, {"prompt": "a ü church", "seconds": 0.25})
    read, facts = read_picture(tmp_path / "a.png")
    assert torch.equal(read, image)
    assert facts == {"prompt": "a ü church", "seconds": 0.25}


def test_a_damaged_picture_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"a\.png is damaged .* delete it"):
        read_picture(tmp_path / "a.png")


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
