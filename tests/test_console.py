"""The console command on the tiny world: what runs leave behind is drawn, exported, listed, cleaned and audited."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from huggingface_hub import parse_eval_result_entries
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class
from PIL import Image
from safetensors.torch import load_file

from diffusion.parameters import named_parameters
from diffusion.sampling import Sampling
from erasure.concept import Concept
from erasure.edit import Edit
from erasure.erasers.imported import Imported
from erasure.pruning.off import Off
from experiments.command import audit as auditing
from experiments.command import console
from experiments.command.explaining import choices, explain_choice
from experiments.command.stored_runs import load_run
from experiments.job.drawing import draw_pictures
from experiments.job.summary import read_summaries
from experiments.results.requirements import Requirement
from tests import tiny_job
from tests.conftest import make_tiny_pipeline
from tests.test_addition import Guarding, Shift

PROMPT = "a photo of a church"


def command(world: Path, store: Path) -> list[str]:
    """The command line of a job without an attack."""
    kept = [each for each in tiny_job.overrides(world, store) if not each.startswith(("attack.", "eraser."))]
    return [*kept, "attack=none", "prompts=3", "retained=2"]


def small_esd() -> list[str]:
    return ["eraser.steps=4", "eraser.batch_size=2", "eraser.sampling_steps=2", "eraser.trajectories=20"]


@pytest.fixture(scope="module")
def world(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run of ESD and one of random pruning, ``esd`` and ``random``."""
    folder = tmp_path_factory.mktemp("console")
    make_tiny_pipeline(tokenizer_folder).save_pretrained(folder / "model")
    tiny_job.write_world(folder)
    tiny_job.run([*command(folder, folder / "store"), *small_esd()], folder / "esd")
    tiny_job.run([*command(folder, folder / "store"), "eraser=none", "pruning=random"], folder / "random")
    return folder


@pytest.fixture(scope="module")
def summaries(world: Path) -> dict[str, dict[str, Any]]:
    found = {str(summary["choices"]["pruning"]): summary for summary in read_summaries(world / "store")}
    return {"esd": found["off"], "random": found["random"]}


@pytest.fixture
def store(world: Path, tmp_path: Path) -> Path:
    """A copy of the store that a test may change."""
    return Path(shutil.copytree(world / "store", tmp_path / "store"))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Type a command; returns its exit status (or sentence), standard output and standard error."""

    def type_in(*arguments: object) -> tuple[Any, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["eraselab", *map(str, arguments)])
        status: Any = 0
        try:
            console.main()
        except SystemExit as exit_:
            status = exit_.code or 0
        return status, *capsys.readouterr()

    return type_in


def in_a_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tiny_job.CONFIG_FOLDER.parent)}
    line = [sys.executable, *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False, env=environment)


def test_help_names_every_command_and_imports_nothing_heavy(tmp_path: Path) -> None:
    shown = in_a_process(tmp_path, "-X", "importtime", "-m", "experiments.command.console", "--help")
    assert shown.returncode == 0
    for name in (
        "run",
        "runs",
        "draw",
        "export",
        "audit",
        "judge",
        "store",
        "explain",
        "tables",
        "calibrate",
        "dashboard",
    ):
        assert f" {name} " in shown.stdout
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert not imported & {"torch", "diffusers", "transformers", "pandas", "wandb"}


def test_run_takes_hydras_grammar_and_finds_configs_and_prompts_from_any_folder(
    typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    flags = ("-m", "concept=church,fire", "dry_run=true", "tracker=off", "attack=[paraphrase,ringabell]")
    status, out, err = typed("run", *flags, "hydra/hydra_logging=none")
    assert status == 0, err
    assert "2 jobs, none of which was run" in out
    GlobalHydra.instance().clear()
    sentence, _, _ = typed("run", "eraser=esdd")
    assert sentence.startswith("eraser=esdd is unknown; it must be one of")
    assert len(sentence.splitlines()) == 1


def test_the_exported_folder_draws_in_plain_diffusers_what_draw_draws_from_the_run(
    world: Path, summaries, typed, tmp_path: Path
) -> None:
    run = summaries["esd"]["run"]
    status, out, _ = typed("export", tmp_path / "model", "--run", run[:6], "--store", world / "store")
    assert (status, out.splitlines()[0]) == (0, str(tmp_path / "model"))
    sheet = tmp_path / "sheet.png"
    options = ("--seeds", "7", "--guidance", 3, "--steps", 2, "--store", world / "store", "--sheet", sheet)
    assert typed("draw", PROMPT, "--run", run, *options)[0] == 0

    loaded = load_run(run, world / "store")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT,
        latents=loaded.model.initial_latents([7]),
        num_inference_steps=2,
        guidance_scale=3.0,
        height=16,
        width=16,
        output_type="np",
    ).images[0]
    shown = np.asarray(Image.open(sheet))
    # Rows of 144 pixels with a margin of 12, below two lines of text and the seeds.
    base, erased = (shown[top : top + 144 : 9, 150 : 150 + 144 : 9].astype(int) for top in (78, 78 + 156))
    assert np.abs(erased - np.round(theirs * 255)).max() <= 1
    assert (erased != base).any()


def test_an_exported_file_is_read_back_as_the_runs_edit(world: Path, summaries, typed, tmp_path: Path) -> None:
    run = summaries["random"]["run"]
    file = tmp_path / "pruned.safetensors"
    assert typed("export", file, "--run", run, "--store", world / "store")[0] == 0
    loaded = load_run(run, world / "store")
    with loaded.edit.applied(loaded.model):
        wanted = {name: value.clone() for name, value in loaded.model.network.state_dict().items()}
    found = load_file(file)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert typed("export", file, "--run", run, "--store", world / "store")[0].endswith(
        "choose another place to export to."
    )


def test_one_file_in_compvis_names_is_the_erased_model_and_can_be_audited(
    world: Path, summaries, typed, tmp_path: Path
) -> None:
    summary, file = summaries["random"], tmp_path / "webui.safetensors"
    asked = ("export", file, "--run", summary["run"], "--store", world / "store")
    assert typed(*asked, "--names", "compviz")[0] == "names is 'compviz'; it must be diffusers or compvis."
    assert "would be a folder" in typed("export", tmp_path / "x", *asked[2:], "--names", "compvis")[0]
    assert typed(*asked, "--names", "compvis")[0] == 0
    loaded = load_run(summary["run"], world / "store")
    again = StableDiffusionPipeline.from_single_file(file, config=str(world / "model"), torch_dtype=torch.float64)
    taken = Imported(file).erase(loaded.model, Concept("van_gogh", "style", ("van gogh",)), Off(), seed=0).edit
    with loaded.edit.applied(loaded.model):
        wanted = {name: value.clone() for name, value in named_parameters(loaded.model).items()}
        assert again.unet.state_dict().keys() == loaded.model.network.state_dict().keys()
        assert all(torch.equal(value, wanted[name]) for name, value in again.unet.state_dict().items())
    with taken.applied(loaded.model):
        assert all(torch.equal(value, wanted[name]) for name, value in named_parameters(loaded.model).items())
    assert "CompVis" in file.with_suffix(".md").read_text()


def test_the_card_says_what_was_done_and_what_came_of_it(world: Path, summaries, typed, tmp_path: Path) -> None:
    summary = summaries["random"]
    typed("export", tmp_path / "model", "--run", summary["run"], "--store", world / "store")
    card = (tmp_path / "model" / "README.md").read_text()
    record = json.loads((tmp_path / "model" / "eraselab.json").read_text())
    masks = load_run(summary["run"], world / "store").edit.masks()
    pruned = sum(int((~kept).sum()) for kept in masks.values())
    rate = summary["rates"]["erased"]
    for told in (
        "eraser=none, pruning=random",
        "van_gogh (style): a van gogh painting",
        f"{pruned:,} (",
        f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]",
        "not attacked",
        "no floor measured",
        "The judge of all pictures is",
        "## Licence",
        record["hash"],
        record["base"],
    ):
        assert told in card
    (measured,) = parse_eval_result_entries(
        yaml.safe_load((tmp_path / "model" / ".eval_results" / "plain_prompts.yaml").read_text())
    )
    assert (measured.value, measured.task_id) == (round(100 * rate["rate"], 2), "plain_prompts")
    assert summary["run"] in measured.notes and measured.dataset_id == "robust-concept-erasing/van_gogh"
    assert record["run"] == summary["run"]
    assert set(record["files"]) == {
        f"{part}.safetensors"
        for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
    }


def test_a_guard_is_refused_by_name_and_drawn_in_a_row_of_its_own(tiny_model, tmp_path: Path, summaries) -> None:
    class Guards(Guarding):
        is_guard = True

    guarded = Edit({}, {}, (Shift(torch.linspace(-1, 1, 16)), Guards(torch.zeros(16))))
    drawn = draw_pictures(tiny_model, guarded, PROMPT, [1, 2], 3.0, Sampling(2, 2))
    assert list(drawn) == ["base", "erased", "with its guard"]
    assert not torch.equal(drawn["base"], drawn["erased"])
    only = draw_pictures(tiny_model, Edit({}, {}, (Guards(torch.zeros(16)),)), PROMPT, [1], 3.0, Sampling(2, 2))
    assert list(only) == ["base", "with its guard"]

    from experiments.results.export import export_run  # noqa: PLC0415

    for place, reason in (
        ("guarded", "adds tests.test_.* which is of a plugin"),
        ("one.safetensors", "no plain pipeline"),
    ):
        with pytest.raises(ValueError, match=reason):
            export_run(tiny_model, guarded, summaries["esd"], [], tmp_path / place)
        assert not (tmp_path / place).exists()


def test_an_unknown_run_is_one_sentence_with_the_nearest(world: Path, summaries, typed) -> None:
    run = summaries["esd"]["run"]
    wrong = ("g" if run[-1] != "g" else "h").join([run[:-1], ""])
    sentence, out, _ = typed("draw", PROMPT, "--run", wrong, "--store", world / "store")
    assert out == ""
    assert sentence.startswith(f"run is {wrong}, which the store") and f"did you mean {run}?" in sentence
    assert "is no folder" in typed("draw", PROMPT, "--run", run, "--store", world / "nowhere")[0]
    assert "write whole numbers" in typed("draw", PROMPT, "--run", run, "--seeds", "1;2", "--store", world / "store")[0]


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ((), {"esd", "random"}),
        (("eraser=esd", "concept=van_gogh"), {"esd"}),
        (("eraser=esd,none",), {"esd", "random"}),
        (("pruning=random",), {"random"}),
        (("eraser.steps=4",), {"esd"}),
        (("concept=church",), set()),
    ],
)
def test_runs_are_filtered_by_choices_and_fields(world: Path, summaries, typed, filters, found) -> None:
    status, out, _ = typed("runs", *filters, "--store", world / "store")
    assert status == 0
    assert {name for name, summary in summaries.items() if summary["run"] in out} == found
    assert f"{len(found)} of 2 runs" in out


def test_a_filter_that_no_run_knows_is_one_sentence(world: Path, typed) -> None:
    assert typed("runs", "erasre=esd", "--store", world / "store")[0].startswith("erasre is no field of any run")
    assert typed("runs", "esd", "--store", world / "store")[0].startswith("'esd' is no filter; write field=value")


def test_runs_are_sorted_and_two_are_compared_prompt_by_prompt(world: Path, summaries, typed) -> None:
    _, newest_first, _ = typed("runs", "--store", world / "store", "--limit", 1)
    created = {summary["run"]: summary["created"] for summary in summaries.values()}
    shown = [run for run in created if run in newest_first]
    assert len(shown) == 1 and created[shown[0]] == max(created.values())

    runs = [summaries[name]["run"] for name in ("esd", "random")]
    status, out, _ = typed("runs", "--compare", *runs, "--store", world / "store")
    assert status == 0
    assert "erasure.erasers.esd.ESD" in out and "erasure.pruning.random" in out.replace("\n", "")
    erased = [[case["erased"] for case in summaries[name]["cases"]] for name in ("esd", "random")]
    difference = 100 * (np.mean(erased[0]) - np.mean(erased[1]))
    assert f"erased, prompt by prompt: {runs[0]} minus {runs[1]} {difference:+.1f}" in out


def test_gc_keeps_what_runs_need(world: Path, store: Path, summaries, typed) -> None:
    kept, gone = summaries["esd"], summaries["random"]
    assert typed("store", "gc", "--store", store, "--spare", 0)[1].startswith("0 of ")
    shutil.rmtree(store / "runs" / gone["run"])
    alone = set(gone["uses"]) - set(kept["uses"])
    assert {name.partition("/")[0] for name in alone} >= {"edits", "pictures", "attacks"}

    assert typed("store", "gc", "--store", store)[1].startswith("0 of ")  # all of it is new
    _, listed, _ = typed("store", "gc", "--store", store, "--spare", 0)
    assert {name for name in gone["uses"] if str(store / name) in listed} == alone
    assert all((store / name).is_dir() for name in alone)

    _, out, _ = typed("store", "gc", "--store", store, "--spare", 0, "--yes")
    assert f"{len(alone)} artefacts deleted" in out
    assert not any((store / name).exists() for name in alone)
    before = {path for path in store.rglob("*") if path.is_file()}
    again = tiny_job.run([*command(world, store), *small_esd()], store.parent / "again")
    assert (again["run"], again["rates"]) == (kept["run"], kept["rates"])
    assert {path for path in store.rglob("*") if path.is_file()} == before


def test_gc_refuses_where_a_run_does_not_say_what_it_needs(store: Path, summaries, typed) -> None:
    path = store / "runs" / summaries["esd"]["run"] / "summary.json"
    path.write_text(path.read_text().replace('"esd"', '"edited"'))
    assert "eraselab store repair` sets it aside" in typed("store", "gc", "--store", store, "--yes")[0]


def test_repair_sets_damaged_artefacts_aside_and_the_job_makes_them_again(
    world: Path, store: Path, summaries, typed
) -> None:
    assert "none is damaged" in typed("store", "repair", "--store", store)[1]
    uses = summaries["esd"]["uses"]
    edit = store / next(name for name in uses if name.startswith("edits/")) / "edit.safetensors"
    content = bytearray(edit.read_bytes())
    content[-1] ^= 1
    edit.write_bytes(content)
    pictures = [store / name for name in uses if name.startswith("pictures/")]
    picture = min(pictures[0].glob("*.png"))
    picture.write_bytes(picture.read_bytes()[:-40])
    verdict = store / next(name for name in uses if name.startswith("verdicts/")) / "result.json"
    verdict.write_text(verdict.read_text().replace("false", "true"))

    _, out, _ = typed("store", "repair", "--store", store)
    for path in (edit, picture, verdict):
        assert f"{path}.damaged-1" in out
        assert not path.exists()
    assert "artefacts were damaged" in out
    again = tiny_job.run([*command(world, store), *small_esd()], store.parent / "again")
    assert again["rates"] == summaries["esd"]["rates"]
    assert edit.exists() and picture.exists() and verdict.exists()
    assert "none is damaged" in typed("store", "repair", "--store", store)[1]


def test_the_store_is_listed_with_counts_and_sizes(world: Path, summaries, typed) -> None:
    store = world / "store"
    _, out, _ = typed("store", "ls", "--store", store)
    count = sum(1 for path in (store / "pictures").iterdir())
    files = sum(1 for path in (store / "pictures").rglob("*") if path.is_file())
    row = next(line for line in out.splitlines() if "pictures" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")][:3] == ["pictures", str(count), str(files)]
    _, out, _ = typed("store", "ls", "edits", "--store", store)
    assert all(path.name in out for path in (store / "edits").iterdir())
    assert typed("store", "ls", "edit", "--store", store)[0].endswith("(did you mean edits?).")
    _, out, _ = typed("store", "du", "--store", store)
    assert all(summary["run"] in out for summary in summaries.values())


def test_pictures_made_elsewhere_are_judged_as_ours(world: Path, summaries, typed, tmp_path: Path) -> None:
    summary = summaries["esd"]
    folder = world / "store" / "pictures" / Path(summary["artefacts"]["erased"]).name
    rows = []
    for path in sorted(folder.glob("*.png")):
        told = json.loads(Image.open(path).info["made from"])
        shutil.copy(path, tmp_path / path.name)
        rows.append({"file": path.name, "prompt": told["prompt"], "seed": told["seed"]})
    table = tmp_path / "pictures.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    judge = ("~judge", "+judge._target_=tests.tiny_job.ErraticJudge")
    status, out, _ = typed("judge", table, *judge, "--folder", tmp_path / "results")
    assert status == 0, out
    written = pd.read_csv(tmp_path / "results" / "judged_ErraticJudge_van_gogh_pictures.csv")
    verdicts = {row.prompt: bool(row.present) for row in written.itertuples()}
    assert [verdicts[case["prompt"]] for case in summary["cases"]] == [case["erased"] for case in summary["cases"]]
    assert written["seed"].tolist() == [row["seed"] for row in rows]
    assert typed("judge", tmp_path / "nothing")[0].startswith("There is nothing at ")
    sentence = typed("judge", table, *judge, "--reference", folder.parent, "--folder", tmp_path / "results")[0]
    assert sentence.startswith(f"There are {len(rows)} pictures and ")


def hand_made(attack: str, high: float) -> dict[str, Any]:
    rate = {"successes": 1, "n": 10, "rate": high / 2, "low": 0.0, "high": high}
    return {
        "run": attack,
        "seed": 0,
        "concept": "church",
        "choices": {"eraser": "imported", "pruning": "off", "attack": attack},
        "rates": {"base": rate, "erased": rate, "attacked": rate},
        "measures": {"accuracy_style": {"rate": 0.95, "low": 0.9, "high": 0.99}, "fid": 30.0},
        "identity": {"pruning": "off", "edit": attack},
    }


@pytest.mark.parametrize(
    ("require", "status"),
    [
        (["attacked.high<0.7"], 0),
        (["attacked.high<0.6"], 1),
        (["attacked<31%", "attacked.high <= 0.6", "retained.accuracy_style.low>0.8", "retained.fid<40"], 0),
        (["attacked.high<0.7", "retained.accuracy_style>=0.96"], 1),
    ],
)
def test_require_sets_the_exit_status(monkeypatch, typed, tmp_path: Path, require, status) -> None:
    found = [hand_made("random", 0.3), hand_made("p4d", 0.6)]
    monkeypatch.setattr(auditing, "run_audit", lambda *_, **__: found)
    options = [part for each in require for part in ("--require", each)]
    ended, out, err = typed("audit", tmp_path, "--concept", "church", *options)
    assert ended == status
    assert "p4d" in out
    if status:
        assert err.startswith(f"{require[-1]} does not hold: ")
        assert ("p4d has 0.6" in err) == (require[-1] == "attacked.high<0.6")


@pytest.mark.parametrize("text", ["attacked.high", "atacked<0.2", "attacked.hihg<0.2", "retained>0.9", "attacked<two"])
def test_a_requirement_that_says_nothing_is_told_before_anything_runs(typed, tmp_path: Path, text: str) -> None:
    sentence, out, _ = typed("audit", tmp_path, "--concept", "church", "--require", text)
    assert sentence.startswith(f"require is {text!r}; ") and out == ""
    with pytest.raises(ValueError, match="has no nothing there, but accuracy_style, fid"):
        Requirement.parse("retained.nothing>1").failures([hand_made("random", 0.3)])


def test_an_exported_model_is_audited(world: Path, summaries, typed, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed("export", "model.safetensors", "--run", summaries["random"]["run"], "--store", world / "store")[0] == 0
    job = [
        each for each in command(world, tmp_path / "store") if not each.startswith(("attack=", "store=", "tracker="))
    ]
    status, out, err = typed(
        *("audit", "model.safetensors", *job, "--concept", "van_gogh", "--attacks", "none,random", "--store", "store"),
        *("--require", "erased.n>=3"),
    )
    assert status == 0, err
    audited = {summary["choices"]["attack"]: summary for summary in read_summaries(tmp_path / "store")}
    assert audited.keys() == {"none", "random"}
    for summary in audited.values():
        assert [case["erased"] for case in summary["cases"]] == [c["erased"] for c in summaries["random"]["cases"]]
    assert "Every attack keeps erased.n>=3." in out
    (page,) = (tmp_path / "outputs" / "audit").glob("report_2_runs_*.html")
    assert all(summary["run"] in page.read_text() for summary in audited.values())
    sentence = typed("audit", "model.safetensors", "--concept", "van_gogh", "--attacks", "none,randm")[0]
    assert sentence.startswith("attack randm: attack=randm is unknown") and "--attacks=... leaves it out" in sentence


@pytest.mark.parametrize("choice", ["eraser=esd", "pruning=finetuned", "attack=unlearndiff", "judge=nudenet_exposed"])
def test_explain_names_every_field_with_its_meaning(choice: str) -> None:
    explained = explain_choice(choice)
    fields = {field.name: field for field in explained.fields}
    wanted = {field.name for field in dataclasses.fields(get_class(explained.target))}
    assert wanted <= fields.keys()
    for name in wanted:
        assert fields[name].meaning and fields[name].allowed and fields[name].default


def test_explain_reads_defaults_bounds_and_comments(typed) -> None:
    fields = {field.name: field for field in explain_choice("eraser=esd").fields}
    assert fields["steps"].default == "1000 (diffusers: 200, sd3: 1400, flux: 1400, canvas: 250)"
    assert fields["steps"].allowed == "a whole number, 1 or more"
    assert fields["reference"].allowed == "one of unconditional, anchor"
    assert fields["retain_weight"].source == "keeps other subjects; the paper has no retain term"
    assert fields["scope"].source.startswith("ESD-x for styles")
    assert fields["preset"].allowed.startswith("null, paper, compvis, diffusers")
    sentence, _, _ = typed("explain", "eraser=esdd")
    assert sentence.startswith("eraser=esdd is unknown") and "did you mean esd?" in sentence
    assert "did you mean eraser?" in typed("explain", "erasre=esd")[0]
    assert choices("eraser")["esd"].startswith("ESD (Gandikota et al., ICCV 2023).")
