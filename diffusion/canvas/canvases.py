"""The canvases: models of one drawn world that the project makes, each with an architecture and twins of its own.

What stands here is all that tells them apart: whoever loads, erases, compares or trains one reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from diffusion.canvas.knowledge import Twin
from diffusion.sources import CANVAS, CANVAS_FOLDER

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
"""What diffusers calls a network's weights."""


@dataclass(frozen=True)
class Canvas:
    """A canvas.

    Attributes:
        name: What ``model=`` and ``model.source`` call it.
        weights: Where the shipped one lies.
        twins: Where its shipped twins lie, each in a folder of its name.
        build: Where its other twins are trained, unless another folder is named.
        part: The network that every twin has of its own, and its folder.
        scheduler: The sampler that it is measured with.
        made_by: The command that makes it.
        twin_minutes: How long one core trains a twin.
    """

    name: str
    weights: Path
    twins: Path
    build: Path
    part: Literal["unet", "transformer"]
    scheduler: Literal["ddim", "flow_euler"]
    made_by: str
    twin_minutes: int


UNET = Canvas(
    name=CANVAS,
    weights=CANVAS_FOLDER,
    twins=CANVAS_FOLDER.parent / "twins",
    build=Path("build/canvas_twins"),
    part="unet",
    scheduler="ddim",
    made_by="make canvas",
    twin_minutes=40,
)
"""Stable Diffusion 1's architecture."""

MMDIT = Canvas(
    name="canvas_mmdit",
    weights=CANVAS_FOLDER.parent / "weights_mmdit",
    twins=CANVAS_FOLDER.parent / "twins_mmdit",
    build=Path("build/canvas_mmdit_twins"),
    part="transformer",
    scheduler="flow_euler",
    made_by="make canvas-mmdit",
    twin_minutes=45,
)
"""Stable Diffusion 3's."""

CANVASES: Mapping[str, Canvas] = MappingProxyType({canvas.name: canvas for canvas in (UNET, MMDIT)})
"""All of them by name."""


def canvas_folder(source: str) -> Path:
    """The folder that a canvas's ``source`` names.

    Args:
        source: Its name, or a folder that a recipe shipped to.

    Raises:
        FileNotFoundError: It is the name of a canvas that is not there.
    """
    canvas = CANVASES.get(source)
    if canvas is None:
        return Path(source).expanduser()
    if not canvas.weights.is_dir():
        raise FileNotFoundError(
            f"The weights of {source} are not in {canvas.weights}; make them with `{canvas.made_by}`."
        )
    return canvas.weights


def canvas_of(source: str) -> Canvas:
    """Which canvas a ``source`` is: by its name, or by the network that a recipe has shipped to the folder.

    Raises:
        ValueError: No recipe of a canvas made it.
    """
    if source in CANVASES:
        return CANVASES[source]
    folder = Path(source).expanduser()
    for canvas in CANVASES.values():
        if (folder / "recipe.json").exists() and (folder / canvas.part).exists():
            return canvas
    names = ", ".join(f"model={name}" for name in CANVASES)
    raise ValueError(f"{source} was made by no recipe of a canvas, and only the canvases have twins ({names}).")


def network_folder(source: str, twin: Twin, build: str | None = None) -> Path:
    """Where the network of a canvas's ``twin`` lies: with the canvas, or finished in the folder ``build``.

    Args:
        source: The canvas; see :func:`canvas_folder`.
        twin: Which one.
        build: Where twins are trained; None for the canvas's own folder.

    Raises:
        FileNotFoundError: It is neither shipped nor trained.
        ValueError: ``source`` is no canvas.
    """
    canvas, base = canvas_of(source), canvas_folder(source)
    built = Path(build).expanduser() if build else canvas.build
    folders = [base / canvas.part] if twin == Twin() else []
    if base == canvas.weights:
        folders.append(canvas.twins / twin.name)
    made, recipe = built / twin.name, base / "recipe.json"
    if (made / "recipe.json").exists() and (made / "recipe.json").read_text() == recipe.read_text():
        folders.append(made / canvas.part)
    for folder in folders:
        if (folder / "config.json").exists():
            return folder
    raise FileNotFoundError(
        f"The {canvas.name} that knows {twin.knows} with training seed {twin.training_seed} is neither shipped nor in "
        f"{built}; train it with `{training_command(source, twin, built)}`, which takes about {canvas.twin_minutes} "
        "minutes of one core."
    )


def training_command(source: str, twin: Twin, build: Path) -> str:
    """What trains ``twin`` of a canvas in the folder ``build``."""
    base = "" if source == UNET.name else f" --base {source}"
    return f"python -m diffusion.canvas.retraining {twin.name} --build {build}{base}"
