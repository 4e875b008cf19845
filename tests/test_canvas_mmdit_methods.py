"""Every method with the settings of the canvas's transformer on a tiny one: it works, or says what it needs."""

from pathlib import Path

import pytest

from diffusion.canvas.source import CanvasSource
from diffusion.model import TextToImage
from tests.sd3_methods import assert_attack_works, assert_eraser_works_or_says_what_it_needs, assert_pruning_works
from tests.test_sdxl import choices, in_the_repository  # noqa: F401

pytestmark = pytest.mark.usefixtures("in_the_repository")

FITTED = "model=canvas_mmdit"


@pytest.fixture
def model(mmdit_canvas: Path) -> TextToImage:
    return CanvasSource.as_measured(str(mmdit_canvas), device="cpu").load()


@pytest.mark.parametrize("choice", choices("eraser", "retrained", "uce_debias"))
def test_every_eraser_works_or_says_what_it_needs(choice: str, model: TextToImage, tmp_path: Path) -> None:
    assert_eraser_works_or_says_what_it_needs(choice, model, FITTED, tmp_path)


@pytest.mark.parametrize("choice", choices("pruning"))
def test_every_pruning_works(choice: str, model: TextToImage) -> None:
    assert_pruning_works(choice, model, FITTED)


@pytest.mark.parametrize("choice", choices("attack"))
def test_every_attack_works(choice: str, model: TextToImage, tmp_path: Path) -> None:
    assert_attack_works(choice, model, [FITTED], tmp_path, edge=32)
