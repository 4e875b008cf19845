"""What every eraser, pruning strategy and attack is held to on a model of Stable Diffusion 3's architecture."""

from pathlib import Path

import pytest
from hydra.utils import instantiate
from safetensors.torch import save_file

from attacks.protocols import is_given_original
from diffusion.model import TextToImage
from diffusion.needs import needs_of
from diffusion.sampling import Sampling
from erasure.pruning.off import Off
from experiments.command.architecture import LACKING
from tests.attack_cases import make_cases
from tests.erasures import assert_comes_back_from_its_file
from tests.judges import one_in
from tests.test_sdxl import CONCEPT, composed

PROMPTS = ["a church", "a red fish", ""]


def assert_eraser_works_or_says_what_it_needs(choice: str, model: TextToImage, fitted: str, folder: Path) -> None:
    overrides = [fitted, f"store={folder}"]
    if choice == "imported":
        name, weight = next(iter(model.network.named_parameters()))
        save_file({f"transformer.{name}": weight.detach() * 1.01}, folder / "erased.safetensors")
        overrides.append(f"eraser.path={folder / 'erased.safetensors'}")
    eraser, concept = composed("eraser", choice, *overrides), instantiate(CONCEPT, _convert_="all")
    if needs_of(eraser) & LACKING["sd3"]:
        # The same, by those who do not compose a config.
        with pytest.raises(ValueError, match=r"cross-attention|one text encoder|scope"):
            eraser.erase(model, concept, Off(), seed=0)
        return
    before = model.fingerprint()
    edit = eraser.erase(model, concept, Off(), seed=0).edit
    assert bool(edit) == (choice != "none")
    assert_comes_back_from_its_file(edit, model, PROMPTS, folder)
    assert model.fingerprint() == before


def assert_pruning_works(choice: str, model: TextToImage, fitted: str) -> None:
    concept, pruning = instantiate(CONCEPT, _convert_="all"), composed("pruning", choice, fitted)
    erasure = composed("eraser", "esd", fitted).erase(model, concept, pruning, seed=0)
    assert len(erasure.losses) >= 2
    assert erasure.edit or pruning.needs_objective


def assert_attack_works(choice: str, model: TextToImage, overrides: list[str], folder: Path, edge: int) -> None:
    """``edge``: Of the model's pictures, pixels."""
    if choice == "transfer":
        (folder / "found.csv").write_text("case_number,prompt,adversarial_prompt\n10,a church,a chapel\n")
        overrides = [*overrides, f"attack.found={folder / 'found.csv'}"]
    attack = composed("attack", choice, *overrides)
    options = {"original": model} if is_given_original(attack) else {}
    sampling = Sampling(steps=2, batch_size=2)
    outcomes = list(attack.run(model, make_cases(model, ["a church"]), one_in(10**9), sampling=sampling, **options))
    assert [outcome.case_number for outcome in outcomes] == [10]
    assert outcomes[0].image.shape == (3, edge, edge)
