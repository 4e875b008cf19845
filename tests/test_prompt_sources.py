"""Prompt sets by file, by URL with a checksum, and from the Hub: what is read, fetched and refused."""

import csv
import hashlib
import io
import json
import logging
import random
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from pydantic import ValidationError

from evaluation.prompt_sets import PromptRow
from evaluation.prompt_sources import Columns, Condition, Download, HubDataset, PromptFile, PromptSet
from tests.tiny_job import CONFIG_FOLDER, make_job

I2P_COLUMNS = (
    *("Unnamed: 0", "prompt", "categories", "hard", "inappropriate_percentage", "nudity_percentage", "q16_percentage"),
    *("sd_safety_percentage", "prompt_toxicity", "lexica_url", "evaluation_seed", "evaluation_guidance"),
    *("sd_image_width", "sd_image_height", "sd_model", "case_number"),
)
CATEGORIES = ("violence", "sexual", "shocking", "self-harm", "illegal activity", "hate", "harassment")


def i2p_row(number: int, generator: random.Random) -> dict[str, str]:
    categories = generator.sample(CATEGORIES, generator.randint(1, 3))
    return {
        "Unnamed: 0": str(number),
        "prompt": f'a "quoted", long\nscene of two lines, number {number}' if number % 9 == 4 else f"scene {number}",
        "categories": ", ".join(categories),
        "hard": str(generator.randint(0, 1)),
        "inappropriate_percentage": f"{generator.randrange(0, 101, 10)}.0",
        "nudity_percentage": f"{generator.randrange(0, 101, 10)}.0",
        "q16_percentage": f"{generator.randrange(0, 101, 10)}.0",
        "sd_safety_percentage": f"{generator.randrange(0, 101, 10)}.0",
        "prompt_toxicity": f"{generator.random():.6f}",
        "lexica_url": f"https://lexica.art/prompt/{number}",
        "evaluation_seed": str(generator.randrange(2**32)),
        "evaluation_guidance": generator.choice(["7", "7.5", "12"]),
        "sd_image_width": "512",
        "sd_image_height": "512",
        "sd_model": "stable-diffusion-v1-4",
        "case_number": str(10 * number),
    }


def published(rows: int = 142, seed: int = 0) -> list[dict[str, str]]:
    """A set in the published format: I2P's columns in another order, prompts with quotes and line breaks."""
    generator = random.Random(seed)
    columns = list(I2P_COLUMNS)
    generator.shuffle(columns)
    made = [i2p_row(number, generator) for number in range(rows)]
    if rows > 5:
        made[5]["prompt"] = "NA"
    return [{column: row[column] for column in columns} for row in made]


def as_csv(rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@pytest.fixture
def broken(tmp_path: Path) -> tuple[Path, list[dict[str, str]], dict[int, str]]:
    """142 published rows of which three are broken: the file, its rows, and by row the lines that it lies in."""
    rows = published()
    rows[20]["prompt"] = "  "
    rows[40] |= {"prompt": "two\nlines", "evaluation_seed": "n/a"}
    rows[99]["case_number"] = rows[7]["case_number"]
    path = tmp_path / "published.csv"
    path.write_text(as_csv(rows), encoding="utf-8")
    lines, line = {}, 2
    for number, row in enumerate(rows):
        last = line + row["prompt"].count("\n")
        lines[number] = f"line {line}" if line == last else f"lines {line}-{last}"
        line = last + 1
    return path, rows, lines


def faults(lines: dict[int, str]) -> str:
    return (
        f"{lines[20]}: the prompt is empty; {lines[40]}: evaluation_seed is 'n/a', not a whole number from 0; "
        f"{lines[99]}: case_number 70 is that of {lines[7]} too"
    )


def test_a_published_file_with_three_broken_rows_is_refused_by_line(broken):
    path, _, lines = broken
    with pytest.raises(ValueError, match="broken rows") as error:
        PromptSet(PromptFile(path)).read()
    assert str(error.value) == f"{path} has broken rows; correct {faults(lines)}."


def test_skipping_broken_rows_reads_the_other_139_and_says_which_are_left_out(broken, caplog):
    path, rows, lines = broken
    with caplog.at_level(logging.WARNING):
        read = PromptSet(PromptFile(path), broken_rows="skip").read()

    assert caplog.messages == [f"{path}: 3 of 142 rows are broken and left out: {faults(lines)}."]
    kept = [row for number, row in enumerate(rows) if number not in {20, 40, 99}]
    known = {"case_number", "prompt", "evaluation_seed", "evaluation_guidance", "sd_image_width", "sd_image_height"}
    assert read == [
        PromptRow(
            int(row["case_number"]),
            row["prompt"],
            int(row["evaluation_seed"]),
            float(row["evaluation_guidance"]),
            {column: text for column, text in row.items() if column not in known},
            width=512,
            height=512,
        )
        for row in kept
    ]
    assert len(read) == 139
    assert read[5].prompt == "NA"


def test_a_job_takes_what_is_left_of_a_published_file(broken, monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    path, _, _ = broken
    job = make_job(f"concept.prompts={path}", "prompt_set.broken_rows=skip", "prompts=142", "tracker=off")
    assert len(job.prompts) == 139
    with pytest.raises(ValueError, match="broken rows"):
        make_job(f"concept.prompts={path}", "tracker=off")


def test_all_rows_broken_is_an_error_even_where_they_are_skipped(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("case_number,prompt\n1,\n2,\n")
    with pytest.raises(ValueError, match="has no prompts, but broken rows"):
        PromptSet(PromptFile(path), broken_rows="skip").read()


def test_a_stray_quote_refuses_the_file_and_says_where_reading_stopped(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text('case_number,prompt\n1,a church\n2,"a "red" fish"\n')
    with pytest.raises(ValueError, match=r"not a CSV file in UTF-8 \(read up to line 3\)"):
        PromptSet(PromptFile(path), broken_rows="skip").read()


def test_a_text_file_has_one_prompt_a_line_numbered_by_its_place(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text('a church, "at night"\n\n  two fish \nNA\n', encoding="utf-8-sig")
    assert PromptSet(PromptFile(path), columns=Columns(case_number=None), seed=3, guidance=5).read() == [
        PromptRow(0, 'a church, "at night"', 3, 5.0, {}),
        PromptRow(1, "two fish", 3, 5.0, {}),
        PromptRow(2, "NA", 3, 5.0, {}),
    ]
    with pytest.raises(ValueError, match="lacks the columns case_number; those that it has are 'prompt'"):
        PromptSet(PromptFile(path)).read()


def test_columns_of_other_names_are_read_and_the_settings_of_a_source_can_be_left_aside(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text("image_id,text,prompt,evaluation_seed\n7,a church,ignored,12\n7,a fish,ignored,13\n")
    columns = Columns(case_number=None, prompt="text", evaluation_seed=None)
    assert PromptSet(PromptFile(path), columns=columns).read() == [
        PromptRow(0, "a church", 0, 7.5, {"image_id": "7"}),
        PromptRow(1, "a fish", 0, 7.5, {"image_id": "7"}),
    ]
    with pytest.raises(ValueError, match="case_number 7 is that of line 2 too"):
        PromptSet(PromptFile(path), columns=Columns(case_number="image_id")).read()
    with pytest.raises(ValueError, match="lacks the columns sd_seed; those that it has are 'image_id', 'text'"):
        PromptSet(PromptFile(path), columns=Columns(case_number="image_id", evaluation_seed="sd_seed")).read()


def test_a_phrase_stands_in_the_place_that_templates_leave_for_it(tmp_path):
    path = tmp_path / "object.csv"
    path.write_text("case_number,template\n1,{} at night\n2,a fish\n")
    assert [row.prompt for row in PromptSet(PromptFile(path), phrase="a church").read()] == [
        "a church at night",
        "a fish",
    ]
    with pytest.raises(ValueError, match="lacks the columns prompt; those that it has are 'case_number', 'template'"):
        PromptSet(PromptFile(path)).read()


def test_braces_in_a_prompt_are_a_text_like_any_other(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("case_number,prompt,template\n1,{} at night,{}\n")
    (row,) = PromptSet(PromptFile(path), phrase="a church").read()
    assert (row.prompt, row.labels["template"]) == ("{} at night", "{}")


def in_group(name: str, *overrides: str) -> PromptSet:
    """The choice of a prompt set, as a job would make it, with nothing fetched."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = compose("config", [name, *overrides])
    return instantiate(config[name.partition("=")[0]], _convert_="all")


RULES = {
    "i2p_sexual": lambda frame: frame.categories.str.contains("sexual"),
    "i2p_violence": lambda frame: frame.categories.str.contains("violence"),
    "i2p_illegal": lambda frame: frame.categories.str.contains("illegal activity"),
    "ringabell_nudity": lambda frame: frame.nudity_percentage > 50,
    "ringabell_violence": lambda frame: (
        frame.categories.str.split(",").apply(lambda items: "violence" in items)
        & (frame.nudity_percentage < 50)
        & (frame.inappropriate_percentage > 50)
        & (frame.hard == 1)
    ),
}


@pytest.mark.parametrize("choice", RULES)
def test_shipped_conditions_choose_what_the_papers_rules_choose_by_pandas(choice, tmp_path):
    rows = published(2000, seed=3)
    path = tmp_path / "i2p.csv"
    path.write_text(as_csv(rows))
    frame = pd.read_csv(path, keep_default_na=False)
    wanted = frame[RULES[choice](frame)]

    read = PromptSet(PromptFile(path), where=in_group(f"prompt_set={choice}").where).read()

    assert 9 < len(wanted) < 1500
    assert [row.case_number for row in read] == wanted.case_number.tolist()


def test_rows_that_no_condition_takes_are_not_checked_and_the_limit_counts_those_taken(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("case_number,prompt,hard\n1,,0\n2,a church,1\n3,a fish,1\n")
    conditions = (Condition("hard", "equals", 1),)
    assert [row.case_number for row in PromptSet(PromptFile(path), where=conditions).read()] == [2, 3]
    assert [row.case_number for row in PromptSet(PromptFile(path), where=conditions, limit=1).read()] == [2]
    with pytest.raises(ValueError, match="has no prompts that could be taken"):
        PromptSet(PromptFile(path), where=(Condition("hard", "above", 1),)).read()


def test_a_cell_that_cannot_be_compared_is_a_broken_row_and_a_missing_column_an_error(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("case_number,prompt,hard\n1,a fish,yes\n2,a church,1\n")
    with pytest.raises(ValueError, match="line 2: hard is 'yes', not a number"):
        PromptSet(PromptFile(path), where=(Condition("hard", "above", 0),)).read()
    with pytest.raises(ValueError, match="lacks the columns harm"):
        PromptSet(PromptFile(path), where=(Condition("harm", "above", 0),)).read()


@pytest.mark.parametrize(("test", "value"), [("above", "50"), ("below", "x"), ("contains", 3), ("has_item", 1.5)])
def test_conditions_compare_like_with_like(test, value):
    with pytest.raises(ValidationError, match=f"value is .*; for {test} it must be a"):
        Condition("hard", test, value)


Answer = tuple[int, bytes, dict[str, str]]
"""Status, body and headers."""


class Server:
    """A local server of what ``answer`` gives for a path, which keeps what it was asked for."""

    def __init__(self, answer: Callable[[str], Answer]) -> None:
        self.asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.asked.append(handler.path)
                status, body, headers = answer(handler.path.partition("?")[0])
                handler.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    handler.send_header(name, value)
                handler.end_headers()
                if handler.command == "GET":
                    handler.wfile.write(body)

            do_HEAD = do_GET

            def log_message(handler, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


CHURCHES = b"case_number,prompt,evaluation_seed\n4,a church,11\n5,a chapel,12\n"
CHURCHES_SHA = hashlib.sha256(CHURCHES).hexdigest()


@pytest.fixture
def server() -> Iterator[Server]:
    files = {"/sets/church.csv": CHURCHES, "/sets/list.txt": b"a church\na chapel\n"}
    running = Server(lambda path: (200, files[path], {}) if path in files else (404, b"", {}))
    yield running
    running.stop()


def test_a_url_is_fetched_once_and_read_from_the_cache_without_network_after_that(server, tmp_path, capfd):
    source = Download(f"{server.url}/sets/church.csv", CHURCHES_SHA, tmp_path / "cache")
    first = PromptSet(source).read()
    server.stop()

    assert first == PromptSet(source).read() == [PromptRow(4, "a church", 11), PromptRow(5, "a chapel", 12)]
    assert server.asked == ["/sets/church.csv"]
    assert capfd.readouterr() == ("", "")


def test_a_list_behind_a_url_is_read_line_by_line(server, tmp_path):
    sha = hashlib.sha256(b"a church\na chapel\n").hexdigest()
    source = Download(f"{server.url}/sets/list.txt", sha, tmp_path)
    assert [row.prompt for row in PromptSet(source, columns=Columns(case_number=None)).read()] == [
        "a church",
        "a chapel",
    ]


def test_what_cannot_be_fetched_is_one_sentence_and_the_file_put_there_by_hand_is_read(server, tmp_path):
    source = Download(f"{server.url}/sets/church.csv", CHURCHES_SHA, tmp_path / "cache")
    server.stop()
    with pytest.raises(FileNotFoundError) as error:
        PromptSet(source).read()
    assert str(error.value) == (
        f"{source.url} cannot be used: the server cannot be reached; download it where that works and put it at "
        f"{source.place} (SHA-256 {CHURCHES_SHA})."
    )

    source.place.write_bytes(b"something else")
    with pytest.raises(FileNotFoundError, match="reached, and what lies in its place has another SHA-256"):
        PromptSet(source).read()
    assert source.place.read_bytes() == b"something else"

    source.place.write_bytes(CHURCHES)
    assert len(PromptSet(source).read()) == 2


def test_another_checksum_and_a_missing_file_are_told_and_nothing_is_kept(server, tmp_path):
    other = Download(f"{server.url}/sets/church.csv", "0" * 64, tmp_path)
    with pytest.raises(FileNotFoundError, match="what the server sends has another SHA-256; download it where"):
        PromptSet(other).read()
    with pytest.raises(FileNotFoundError, match="the server answers 404 Not Found"):
        PromptSet(Download(f"{server.url}/nothing.csv", CHURCHES_SHA, tmp_path)).read()
    with pytest.raises(FileNotFoundError, match=r"x\.csv cannot be used: Invalid URL"):
        PromptSet(Download("sets/x.csv", CHURCHES_SHA, tmp_path)).read()
    assert list(tmp_path.iterdir()) == []


def test_a_checksum_that_is_none_is_refused():
    with pytest.raises(ValidationError, match="sha256"):
        Download(url="https://localhost/x.csv", sha256="abc")


@pytest.mark.parametrize("choice", ["prompt_set", "retained_set"])
def test_a_job_fetches_its_sets_when_it_is_built_and_not_when_it_is_composed(choice, server, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIG_FOLDER.parent)
    name = {"prompt_set": "unlearndiffatk", "retained_set": "coco_30k"}[choice]
    overrides = [
        f"{choice}.source.url={server.url}/sets/church.csv",
        f"{choice}.source.sha256={CHURCHES_SHA}",
        f"{choice}.source.cache={tmp_path}",
    ]
    made = in_group(f"{choice}={name}", *overrides)
    assert server.asked == []

    job = make_job(f"{choice}={name}", *overrides, "tracker=off")
    rows = {"prompt_set": job.prompts, "retained_set": job.retained}[choice]
    assert server.asked == ["/sets/church.csv"]
    assert [(row.prompt, row.seed) for row in rows] == [("a church", 11), ("a chapel", 12)]
    assert made.read() == rows


I2P_HUB = (
    "prompt,categories,hard,nudity_percentage,sd_seed,sd_guidance_scale\n"
    '"a church, at night","violence, hate",1,10.0,4261564198,7\nNA,hate,0,,5,12\n'
)


@pytest.fixture
def hub_copy(tmp_path: Path) -> Path:
    """A folder as ``hf download`` leaves it."""
    folder = tmp_path / "i2p"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    (folder / "i2p_benchmark.csv").write_text(I2P_HUB)
    return folder


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def test_a_local_copy_of_a_hub_data_set_is_read_as_the_shipped_choice_reads_the_hub(hub_copy):
    labels = [
        {"categories": "violence, hate", "hard": "1", "nudity_percentage": "10"},
        {"categories": "hate", "hard": "0", "nudity_percentage": ""},
    ]
    for copy in (hub_copy, hub_copy / "i2p_benchmark.csv"):
        read = in_group("prompt_set=i2p", f"prompt_set.source.copy={copy}").read()
        assert [(row.case_number, row.prompt, row.seed, row.guidance) for row in read] == [
            (0, "a church, at night", 4261564198, 7.0),
            (1, "NA", 5, 12.0),
        ]
        assert [{**row.labels, "nudity_percentage": row.labels["nudity_percentage"][:2]} for row in read] == labels


def test_a_parquet_copy_is_read_by_its_types_without_its_pictures(tmp_path):
    from datasets import Dataset, Image  # noqa: PLC0415
    from PIL import Image as Picture  # noqa: PLC0415

    table = {
        "adv_prompt": ["a church", None],
        "score": [0.5, 2.0],
        "seed": [3.0, None],
        "picture": [Picture.new("RGB", (2, 2))] * 2,
    }
    path = tmp_path / "mma.parquet"
    Dataset.from_dict(table).cast_column("picture", Image()).to_parquet(path)
    source = HubDataset("own/mma", copy=path)
    columns = Columns(case_number=None, prompt="adv_prompt", evaluation_seed="seed")

    with pytest.raises(ValueError, match=r"mma\.parquet has broken rows; correct row 1: the prompt is empty"):
        PromptSet(source, columns=columns).read()
    assert PromptSet(source, columns=columns, broken_rows="skip").read() == [
        PromptRow(0, "a church", 3, 7.5, {"score": "0.5"})
    ]


def test_a_copy_that_is_not_there_or_none_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"copy is .*nowhere, which is neither a folder nor a file"):
        PromptSet(HubDataset("own/set", copy=tmp_path / "nowhere")).read()
    (tmp_path / "set.zip").write_bytes(b"zip")
    with pytest.raises(ValueError, match=r"a file must end in \.csv, \.json, \.jsonl, \.parquet"):
        PromptSet(HubDataset("own/set", copy=tmp_path / "set.zip")).read()
    (tmp_path / "set.csv").write_text("prompt\na church\n")
    with pytest.raises(ValueError, match="is no data set with a split 'test'"):
        PromptSet(HubDataset("own/set", split="test", copy=tmp_path / "set.csv")).read()


def test_a_hub_out_of_reach_is_one_sentence_that_says_what_to_download(monkeypatch):
    monkeypatch.setattr("evaluation.prompt_sources.hub_answers", lambda: False)
    with pytest.raises(FileNotFoundError) as error:
        in_group("prompt_set=i2p").read()
    assert str(error.value) == (
        "The data set 'AIML-TUDA/i2p' cannot be had from the Hub or its cache: https://huggingface.co cannot be "
        "reached; download it where that works (`hf download --repo-type dataset AIML-TUDA/i2p --local-dir FOLDER`, "
        "after `hf auth login` if it is gated) and set prompt_set.source.copy=FOLDER."
    )


def hub_of(content: bytes) -> Server:
    """As much of the Hub's protocol as a public data set of one CSV file needs."""
    commit, listing = "a" * 40, [{"type": "file", "path": "set.csv", "size": len(content), "oid": "b" * 40}]
    facts = {"id": "own/set", "sha": commit, "siblings": [{"rfilename": "set.csv"}], "private": False, "tags": []}

    def answer(path: str) -> Answer:
        if path.startswith("/api/datasets/own/set"):
            told = json.dumps(listing if "/tree/" in path else facts)
            return 200, told.encode(), {"Content-Type": "application/json"}
        if path.startswith("/datasets/own/set/resolve/") and path.endswith("/set.csv"):
            return 200, content, {"ETag": f'"{"b" * 40}"', "X-Repo-Commit": commit}
        return 404, b"{}", {"X-Error-Code": "EntryNotFound"}

    return Server(answer)


def test_the_hub_is_asked_and_its_cache_read_without_network_after_that(tmp_path, monkeypatch):
    hub = hub_of(b"prompt,hard\na church,1\nNA,0\n")
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    source = PromptSet(HubDataset("own/set", options={"keep_default_na": False}), columns=Columns(case_number=None))

    first = source.read()
    hub.stop()

    assert first == [PromptRow(0, "a church", labels={"hard": "1"}), PromptRow(1, "NA", labels={"hard": "0"})]
    assert source.read() == first
    with pytest.raises(FileNotFoundError, match=f"'own/other' cannot be had .* {hub.url} cannot be reached"):
        PromptSet(HubDataset("own/other")).read()


UNLEARNDIFFATK = {
    "nudity": "nudity",
    "violence": "violence",
    "illegal": "illegal",
    "artist/van_gogh": "vangogh",
    "object/church": "church",
    "object/garbage_truck": "garbage_truck",
    "object/parachute": "parachute",
    "object/tench": "tench",
}
ANY_JUDGE = ("judge=canvas", "judge.head=style", "judge.label=van_gogh")
CHOICES = [
    (g, path.stem) for g in ("prompt_set", "retained_set") for path in sorted((CONFIG_FOLDER / g).glob("*.yaml"))
]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_is_made_without_fetching_and_says_every_field(group, choice, monkeypatch):
    monkeypatch.setattr("pooch.retrieve", lambda *_, **__: pytest.fail("something was fetched"))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("something was fetched"))
    needed = ["prompt_set.source.path=my.txt"] if choice == "list" else []
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = compose("config", [f"{group}={choice}", *needed])[group]
    made = instantiate(config, _convert_="all")

    for node, thing in ((config, made), (config.source, made.source), (config.columns, made.columns)):
        assert set(node) - {"_target_"} == set(type(thing).__dataclass_fields__)
    if isinstance(made.source, Download):
        assert made.source.url.startswith("https://raw.githubusercontent.com/")
        assert len(made.source.url.split("/")[5]) == 40
    if not isinstance(made.source, Download):
        assert made.source.setting.split(".")[0] in {group, "concept"}


def test_unlearndiffatk_has_a_file_of_its_own_for_every_concept():
    sources = {
        name: in_group("prompt_set=unlearndiffatk", f"concept={concept}", *ANY_JUDGE).source
        for concept, name in UNLEARNDIFFATK.items()
    }
    assert all(source.url.endswith(f"/prompts/{name}.csv") for name, source in sources.items())
    assert len({source.sha256 for source in sources.values()}) == len(UNLEARNDIFFATK)


def test_settings_under_other_names_stand_for_those_of_the_field(tmp_path: Path):
    path = tmp_path / "prompts.csv"
    path.write_text("case_number,prompt,sd_seed,sd_guidance_scale\n1,a church,11,3\n2,a tench,12,1.5\n")

    def read(**columns: str | None) -> list[tuple[int, float]]:
        rows = PromptSet(PromptFile(path), columns=Columns(**columns), seed=4, guidance=9).read()
        return [(row.seed, row.guidance) for row in rows]

    assert read() == [(11, 3), (12, 1.5)]
    assert read(evaluation_seed=None) == [(4, 3), (4, 1.5)]
    assert read(evaluation_guidance=None) == [(11, 9), (12, 9)]


def test_a_column_that_is_named_or_a_condition_must_not_be_there_twice(tmp_path: Path):
    path = tmp_path / "prompts.csv"
    path.write_text("case_number,prompt,kind,kind,text,text\n1,a church,a,b,x,y\n")
    assert PromptSet(PromptFile(path)).read() == [PromptRow(1, "a church")]
    with pytest.raises(ValueError, match=r"prompts\.csv has several columns called text"):
        PromptSet(PromptFile(path), columns=Columns(prompt="text")).read()
    with pytest.raises(ValueError, match="several columns called kind"):
        PromptSet(PromptFile(path), where=(Condition("kind", "equals", "a"),)).read()
