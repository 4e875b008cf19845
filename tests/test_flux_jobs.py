"""Whole jobs on a tiny FLUX.1 folder, and which methods say that they do not go with it."""

from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from safetensors.torch import save_file

from diffusion.model import TextToImage
from diffusion.needs import NO_T5, needs_of
from erasure.edit import Edit
from erasure.pruning.off import Off
from experiments.command.architecture import LACKING, has_t5
from experiments.command.errors import CommandError
from experiments.fit import family_at
from tests.erasures import assert_comes_back_from_its_file
from tests.test_sd3_jobs import ESD, UNLEARNDIFF, command
from tests.test_sdxl import CONCEPT, choices, composed, in_the_repository  # noqa: F401
from tests.tiny_flux import make_tiny_flux
from tests.tiny_job import make_job, run, write_world
from tests.tiny_sd3 import T5_TOKENS

SIZE = (16, 16)


@pytest.fixture(scope="module")
def flux_world(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    make_tiny_flux(tokenizer_folder, guided=True).save_pretrained(folder / "model")
    write_world(folder)
    return folder


@pytest.fixture
def model(tokenizer_folder: Path) -> TextToImage:
    pipeline = make_tiny_flux(tokenizer_folder, guided=True)
    return TextToImage(pipeline, name="tiny-flux", scheduler=None, resolution=SIZE, t5_tokens=T5_TOKENS)


@pytest.mark.parametrize(
    "more",
    [
        UNLEARNDIFF,
        (*UNLEARNDIFF, "attack.tables=t5"),
        ("pruning=on", "pruning.steps=2", "pruning.learning_rate=2", "attack=none"),
    ],
    ids=["text", "t5", "on"],
)
def test_a_job_erases_attacks_and_judges(flux_world: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    typed = command(flux_world, tmp_path / "store", "model.resolution=[16,16]", *ESD, *more)
    summary: dict[str, Any] = run(typed, tmp_path / "run")
    edit = Edit.load(Path(summary["artefacts"]["edit"]) / "edit.safetensors")
    assert edit.entries
    assert all(".attn." in name or "ff" in name or ".proj_mlp." in name for name in edit.entries)
    # Guidance is embedded: a step of a picture is one evaluation.
    assert summary["costs"]["base"]["unet_evaluations"] == (3 + 2) * 2
    assert len(summary["cases"]) == 3
    if "attack=none" not in more:
        assert {"base", "edit", "erased", "attack"} <= summary["costs"].keys()
        read = "read_back_t5" if "attack.tables=t5" in more else "read_back_clip"
        searched = [case for case in summary["cases"] if case["adversarial_prompt"] != case["prompt"]]
        assert searched
        assert all(set(case["measured"]) == {read} for case in searched)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        *((f"eraser={name}", "needs cross-attention") for name in ("mace", "fmn", "receler")),
        *((f"eraser={name}", "needs one text encoder") for name in ("safree", "advunlearn")),
        ("eraser=stereo", "needs text encoders that read embeddings of CLIP's tokens, and T5 reads none"),
    ],
)
def test_methods_that_cannot_work_refuse_when_the_config_is_composed(
    flux_world: Path, tmp_path: Path, choice: str, reason: str
) -> None:
    with pytest.raises(CommandError, match=rf"^{choice} {reason}.*family flux\); choose eraser=esd, ac, salun"):
        make_job(*command(flux_world, tmp_path, choice))


@pytest.mark.usefixtures("in_the_repository")
@pytest.mark.parametrize("choice", choices("eraser", "retrained", "uce_debias"))
def test_every_eraser_works_or_says_what_it_needs(choice: str, model: TextToImage, tmp_path: Path) -> None:
    overrides = ["model.family=flux", f"store={tmp_path}"]
    if choice == "imported":
        name, weight = next(iter(model.network.named_parameters()))
        save_file({f"transformer.{name}": weight.detach() * 1.01}, tmp_path / "erased.safetensors")
        overrides.append(f"eraser.path={tmp_path / 'erased.safetensors'}")
    eraser, concept = composed("eraser", choice, *overrides), instantiate(CONCEPT, _convert_="all")
    if needs_of(eraser) & (LACKING["flux"] | NO_T5):
        # The same, by those who do not compose a config.
        with pytest.raises(ValueError, match=r"cross-attention|one text encoder|scope|no text for the model's T5"):
            eraser.erase(model, concept, Off(), seed=0)
        return
    edit = eraser.erase(model, concept, Off(), seed=0).edit
    assert bool(edit) == (choice != "none")
    assert_comes_back_from_its_file(edit, model, ["a church", "a red fish", ""], tmp_path)


def test_whether_a_t5_reads_prompts_is_known_when_the_config_is_composed(flux_world: Path, tmp_path: Path) -> None:
    assert has_t5({"source": str(flux_world / "model")})
    with pytest.raises(CommandError, match=r"^attack=unlearndiff needs a T5, and this model is without one.*tables=te"):
        make_job("model=sd3_medium", "judge=canvas", "evaluator=none", "attack.tables=t5")
    job = make_job("model=sd3_medium", "model.t5=true", "judge=canvas", "evaluator=none", "attack.tables=t5")
    assert job.attack.tables == "t5"
    with pytest.raises(CommandError, match=r"^eraser=mace needs cross-attention, .*family sd3"):
        make_job("model=sd3_medium", "judge=canvas", "evaluator=none", "eraser=mace")
    with pytest.raises(CommandError, match=r"^eraser=stereo needs text encoders that read.*\(model\.t5=false\)\.$"):
        make_job("model=sd3_medium", "model.t5=true", "judge=canvas", "evaluator=none", "eraser=stereo")


def test_a_folder_tells_whether_it_is_distilled(tokenizer_folder: Path, flux_world: Path, tmp_path: Path) -> None:
    make_tiny_flux(tokenizer_folder, guided=False).save_pretrained(tmp_path)
    assert [family_at(str(folder)) for folder in (flux_world / "model", tmp_path)] == ["flux", "schnell"]
    with pytest.raises(CommandError, match=r"^eraser=mace needs cross-attention.*family schnell"):
        make_job(*command(flux_world, tmp_path, "eraser=mace", f"model.source={tmp_path}"))
