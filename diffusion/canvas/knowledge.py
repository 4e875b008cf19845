"""What a U-Net of the canvas knows, and where the one of this knowledge and training lies."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from diffusion.sources import CANVAS_FOLDER

Knowledge = Literal["all", "never_van_gogh", "never_church", "never_fire", "never"]
"""What a model was shown in its training: everything, or everything but a concept, or but all three."""

FORGOTTEN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "all": (),
        "never_van_gogh": ("van_gogh",),
        "never_church": ("church",),
        "never_fire": ("fire",),
        "never": ("van_gogh", "church", "fire"),
    }
)
"""The concepts that the training pictures of a model with this knowledge lack."""

TWINS_FOLDER = Path(__file__).parent / "twins"
"""Where the shipped ones lie, each in a folder of its name."""

BUILD_FOLDER = Path("build/canvas_twins")
"""Where ``make canvas-twins`` trains them."""


@dataclass(frozen=True)
class Twin:
    """A U-Net of the canvas: what it knows and the seed of its training.

    Raises:
        ValueError: There is no such knowledge, or the seed is negative.
    """

    knows: str = "all"
    training_seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.knows not in FORGOTTEN:
            raise ValueError(f"knows is {self.knows!r}; it must be one of {', '.join(get_args(Knowledge))}.")
        if self.training_seed < 0:
            raise ValueError(f"training_seed is {self.training_seed}; it must be 0 or more.")

    @property
    def name(self) -> str:
        """Name of its folder, such as ``never_fire_0``."""
        return f"{self.knows}_{self.training_seed}"

    @property
    def forgotten(self) -> tuple[str, ...]:
        """The concepts that it was never shown."""
        return FORGOTTEN[self.knows]

    @classmethod
    def named(cls, name: str) -> "Twin":
        """The twin of this ``name``.

        Raises:
            ValueError: No twin has such a name.
        """
        knows, _, seed = name.rpartition("_")
        if not seed.isdecimal():
            raise ValueError(f"There is no twin {name!r}; names are like never_fire_0 (all but fire, training seed 0).")
        return cls(knows, int(seed))

    def unet_folder(self, build: Path = BUILD_FOLDER, base: Path = CANVAS_FOLDER) -> Path:
        """Where its U-Net lies: with the canvas, or finished in the folder ``build``.

        Args:
            build: Where twins are trained.
            base: The folder of the model whose twin it is; only the canvas's are shipped.

        Raises:
            FileNotFoundError: It is neither shipped nor trained.
            ValueError: ``base`` is no model that the canvas's recipe made.
        """
        recipe = base / "recipe.json"
        if not recipe.exists():
            raise ValueError(f"{base} has no twin that knows {self.knows}: only the canvas (model=canvas) has twins.")
        folders = [base / "unet"] if self == Twin() else []
        if base == CANVAS_FOLDER:
            folders.append(TWINS_FOLDER / self.name)
        made = build / self.name
        if (made / "recipe.json").exists() and (made / "recipe.json").read_text() == recipe.read_text():
            folders.append(made / "unet")
        for folder in folders:
            if (folder / "config.json").exists():
                return folder
        raise FileNotFoundError(
            f"The canvas that knows {self.knows} with training seed {self.training_seed} is neither shipped nor in "
            f"{build}; train it with `{self.command(build)}`, which takes about 40 minutes of one core."
        )

    def command(self, build: Path) -> str:
        """What trains it."""
        return f"python -m diffusion.canvas.retraining {self.name} --build {build}"
