"""Every method with the settings of the canvas's transformer on a tiny one: it works, or says what it needs."""

from pathlib import Path

import pytest
from hydra.utils import instantiate
from safetensors.torch import save_file

from attacks.protocols import is_given_original
from diffusion.canvas.source import CanvasSource
from diffusion.model import TextToImage
from diffusion.needs import needs_of
from diffusion.sampling import Sampling
from erasure.pruning.off import Off
from experiments.command.architecture import LACKING
from tests.attack_cases import make_cases
from tests.erasures import assert_comes_back_from_its_file
from tests.judges import one_in
from tests.test_sdxl import CONCEPT, choices, composed, in_the_repository  # noqa: F401

pytestmark = pytest.mark.usefixtures("in_the_repository")

PROMPTS = ["a church", "a red fish", ""]
FITTED = "model=canvas_mmdit"


@pytest.fixture
def model(mmdit_canvas: Path) -> TextToImage:
    return CanvasSource.as_measured(str(mmdit_canvas), device="cpu").load()


@pytest.mark.parametrize("choice", choices("eraser", "retrained", "uce_debias"))
def test_every_eraser_works_or_says_what_it_needs(choice: str, model: TextToImage, tmp_path: Path) -> None:
    overrides = [FITTED, f"store={tmp_path}"]
    if choice == "imported":
        name, weight = next(iter(model.network.named_parameters()))
        save_file({f"transformer.{name}": weight.detach() * 1.01}, tmp_path / "erased.safetensors")
        overrides.append(f"eraser.path={tmp_path / 'erased.safetensors'}")
    eraser, concept = composed("eraser", choice, *overrides), instantiate(CONCEPT, _convert_="all")
    if needs_of(eraser) & LACKING["sd3"]:
        with pytest.raises(ValueError, match=r"cross-attention|one text encoder|scope"):
            eraser.erase(model, concept, Off(), seed=0)
        return
    before = model.fingerprint()
    edit = eraser.erase(model, concept, Off(), seed=0).edit
    assert bool(edit) == (choice != "none")
    assert_comes_back_from_its_file(edit, model, PROMPTS, tmp_path)
    assert model.fingerprint() == before


@pytest.mark.parametrize("choice", choices("pruning"))
def test_every_pruning_works(choice: str, model: TextToImage) -> None:
    concept, pruning = instantiate(CONCEPT, _convert_="all"), composed("pruning", choice, FITTED)
    erasure = composed("eraser", "esd", FITTED).erase(model, concept, pruning, seed=0)
    assert len(erasure.losses) >= 2
    assert erasure.edit or pruning.needs_objective


@pytest.mark.parametrize("choice", choices("attack"))
def test_every_attack_works(choice: str, model: TextToImage, tmp_path: Path) -> None:
    overrides = [FITTED]
    if choice == "transfer":
        (tmp_path / "found.csv").write_text("case_number,prompt,adversarial_prompt\n10,a church,a chapel\n")
        overrides.append(f"attack.found={tmp_path / 'found.csv'}")
    attack = composed("attack", choice, *overrides)
    options = {"original": model} if is_given_original(attack) else {}
    sampling = Sampling(steps=2, batch_size=2)
    outcomes = list(attack.run(model, make_cases(model, ["a church"]), one_in(10**9), sampling=sampling, **options))
    assert [outcome.case_number for outcome in outcomes] == [10]
    assert outcomes[0].image.shape == (3, 32, 32)
