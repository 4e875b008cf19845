"""What every name means: the canvas's settings as they were, the papers' on Stable Diffusion, old names as before."""

import json
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from experiments.command.composing import plain_job
from experiments.command.shorthands import spell_out
from experiments.fit import fitted
from tests.tiny_job import CONFIG_FOLDER

DATA = Path(__file__).with_name("data")
CANVAS: dict[str, dict[str, Any]] = json.loads((DATA / "canvas_settings.json").read_text())
"""By choice and kind what the canvas's settings were before one name meant a method on every model; any: of any kind."""

PUBLISHED: dict[str, dict[str, Any]] = json.loads((DATA / "published_settings.json").read_text())
"""The same of the names with _sd14 and _paper, on any model."""

CONCEPTS = {
    "canvas": {"style": "van_gogh", "object": "church", "unsafe": "fire"},
    "sd14": {"style": "artist/van_gogh", "object": "object/church", "unsafe": "nudity"},
}
NEEDED = {"eraser=imported": ["eraser.path=x"], "attack=transfer": ["attack.found=x"]}


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIG_FOLDER.parent)


def composed(*command: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config, _ = plain_job(compose("config", spell_out(command), return_hydra_config=True))
    return fitted(config)


def missing_or_other(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``wanted``, however deep, that ``found`` has otherwise."""
    others = {}
    for name, value in wanted.items():
        own = found.get(name)
        if isinstance(value, dict) and isinstance(own, dict):
            others |= {f"{name}.{key}": pair for key, pair in missing_or_other(own, value).items()}
        elif own != value:
            others[name] = (own, value)
    return others


def together(choices: Iterable[str]) -> list[list[str]]:
    """The choices in groups of one eraser, one pruning and one attack, which compose at once."""
    by_group: dict[str, list[str]] = {}
    for choice in choices:
        by_group.setdefault(choice.partition("=")[0], []).append(choice)
    return [[choice for choice in row if choice] for row in zip_longest(*by_group.values())]


def check(choices: list[str], settings: dict[str, dict[str, Any]], model: str, kind: str) -> None:
    family = "canvas" if settings is CANVAS else "sd14"
    needed = [override for choice in choices for override in NEEDED.get(choice, [])]

    found = composed(f"model={model}", f"concept={CONCEPTS[family][kind]}", *choices, *needed)

    for choice in choices:
        wanted = settings[choice].get(kind) or settings[choice]["any"]
        assert missing_or_other(found[choice.partition("=")[0]], wanted) == {}, choice


@pytest.mark.parametrize("kind", ["style", "object", "unsafe"])
@pytest.mark.parametrize("choices", together(CANVAS), ids=" ".join)
def test_the_canvas_has_the_settings_that_it_had(choices: list[str], kind: str) -> None:
    check(choices, CANVAS, "canvas", kind)


@pytest.mark.parametrize(("number", "choices"), enumerate(together(PUBLISHED)), ids=lambda value: str(value))
def test_old_names_mean_what_they_meant_on_any_model(number: int, choices: list[str]) -> None:
    model, kind = ("sd14", "canvas")[number % 2], ("style", "object", "unsafe")[number % 3]
    check(choices, PUBLISHED, model, kind)
