"""What every name means: the canvas's settings as they were, the papers' on Stable Diffusion, old names as before."""

import json
import re
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from experiments.command.composing import plain_job
from experiments.command.errors import CommandError
from experiments.command.shorthands import spell_out
from experiments.fit import FAMILIES, FITTED, KINDS, family_at, fitted
from experiments.job.settings import SPEED_ONLY, TRAINING_SPEED_ONLY, matters
from tests.night import nightly
from tests.tiny_job import CONFIG_FOLDER

DATA = Path(__file__).with_name("data")
CANVAS: dict[str, dict[str, Any]] = json.loads((DATA / "canvas_settings.json").read_text())
"""By choice and kind what the canvas's settings were before one name meant a method on every model; any: of all."""

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
        group = choice.partition("=")[0]
        # How many prompts an attack takes at a time changes its speed alone.
        numbers = matters(wanted, SPEED_ONLY if group == "attack" else TRAINING_SPEED_ONLY)
        assert missing_or_other(found[group], numbers) == {}, choice


BY_KIND = [
    # By day each choice meets one kind, and every kind is met.
    ((choices, kind) if place == number % 3 else nightly(choices, kind))
    for number, choices in enumerate(together(CANVAS))
    for place, kind in enumerate(CONCEPTS["canvas"])
]


@pytest.mark.parametrize(
    ("choices", "kind"), BY_KIND, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_the_canvas_has_the_settings_that_it_had(choices: list[str], kind: str) -> None:
    check(choices, CANVAS, "canvas", kind)


@pytest.mark.parametrize(("number", "choices"), enumerate(together(PUBLISHED)), ids=str)
def test_old_names_mean_what_they_meant_on_any_model(number: int, choices: list[str]) -> None:
    model, kind = ("sd14", "canvas")[number % 2], ("style", "object", "unsafe")[number % 3]
    check(choices, PUBLISHED, model, kind)


def test_a_plain_command_on_stable_diffusion_has_the_papers_settings() -> None:
    found = composed("model=sd14", "concept=nudity", "eraser=esd", "pruning=on", "attack=unlearndiff")

    esd = {"scope": "noxattn", "eta": 1.0, "steps": 1000, "learning_rate": 1e-5, "trajectory": "current"}
    attack = {"tokens": 5, "insertion": "prefix_k", "timesteps": 50, "steps_per_timestep": 40, "learning_rate": 0.01}
    assert missing_or_other(found["eraser"], esd | {"retain_weight": 0.0, "reference": "unconditional"}) == {}
    assert missing_or_other(found["attack"], attack) == {}
    assert (found["pruning"]["steps"], found["pruning"]["budget"]) == (1000, 0.05)
    assert found["sampling"]["steps"] == 50
    assert "accuracy" not in found["evaluator"], "the canvas's classifier"
    assert found["taken"]["eraser"] == "the paper's settings, for a concept of kind unsafe"
    assert found["taken"]["pruning"].startswith("a reasoned choice, as the paper published no settings")
    assert not {"preset", "presets", "family"} & {key for part in ("eraser", "model") for key in found[part]}


@pytest.mark.parametrize(
    ("command", "targets"),
    [
        (["model=sd14"], ["Van Gogh"]),
        (["model=sd15", "concept=van_gogh"], ["Van Gogh"]),
        (["model=sd14", "concept=church"], ["church"]),
        (["model=canvas", "concept=church"], "a church"),
        (["concept=object/church"], ["church"]),
    ],
)
def test_a_concept_is_the_one_of_the_models_family(command: list[str], targets: Any) -> None:
    found = composed(*command)["concept"]["targets"]

    assert targets in (found, found[0])


def test_what_is_typed_wins_over_what_fits() -> None:
    found = composed("eraser.steps=7", "eraser.preset=diffusers", "attack.tokens=4", "sampling.steps=3")

    assert (found["eraser"]["steps"], found["eraser"]["learning_rate"]) == (7, 5e-5)
    assert (found["attack"]["tokens"], found["attack"]["timesteps"]) == (4, 10)
    assert found["sampling"]["steps"] == 3
    assert found["taken"]["eraser"] == "preset diffusers, for a concept of kind style"
    assert found["taken"]["attack"] == "the canvas's settings"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "eraser.preset=compviz",
            "eraser.preset is 'compviz'; it must be one of paper, style, object, unsafe, co",
        ),
        ("model.family=sdx", "model.family is 'sdx'; it must be one of canvas, sd, sdxl, sd3, flux"),
    ],
)
def test_an_unknown_preset_or_family_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        composed(override)


def test_one_name_for_two_concepts_is_refused() -> None:
    with pytest.raises(CommandError, match="concept=church is one concept on the canvas and another, object/church"):
        spell_out(["model=canvas,sd14", "concept=church"])


def test_a_union_hands_its_preset_to_its_members() -> None:
    members = composed("attack=[unlearndiff,p4d]", "+attack.preset=paper")["attack"]["members"]

    assert (members["unlearndiff"]["timesteps"], members["p4d"]["checks"]) == (50, 60)
    assert not {"preset", "presets"} & members["p4d"].keys()


@pytest.mark.parametrize(
    ("files", "family"),
    [
        ({"model_index.json": '{"_class_name": "StableDiffusionXLPipeline"}'}, "sdxl"),
        ({"model_index.json": '{"_class_name": "StableDiffusion3Pipeline"}'}, "sd3"),
        ({"model_index.json": '{"_class_name": "FluxPipeline"}'}, "flux"),
        ({"unet/config.json": '{"sample_size": 8}'}, "canvas"),
        ({"unet/config.json": '{"sample_size": 64}'}, "sd"),
        ({"model_index.json": "{"}, "sd"),
        ({}, "sd"),
    ],
)
def test_a_folder_has_the_family_of_its_architecture(files: dict[str, str], family: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    assert family_at(str(tmp_path)) == family


def test_every_exception_names_words_that_can_hold() -> None:
    """A misspelt word in a YAML file would never hold, and its setting never be taken."""
    concepts = {path.stem for path in (CONFIG_FOLDER / "concept").rglob("*.yaml")}
    for group in FITTED:
        for path in (CONFIG_FOLDER / group).glob("*.yaml"):
            presets = set(yaml.safe_load(path.read_text(encoding="utf-8")).get("presets", {}))
            for exceptions in re.findall(r"\$\{fit:.*?,\{([^{}]*)\}\}", path.read_text(encoding="utf-8"), re.DOTALL):
                bare = re.sub(r"'[^']*'|\[[^\]]*\]", "", exceptions)
                words = {word for key in re.findall(r"([\w ]+):", bare) for word in key.split()}
                assert words <= {*FAMILIES, *KINDS, *presets, *concepts}, (path.name, words)
