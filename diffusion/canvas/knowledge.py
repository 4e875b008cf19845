"""What a model of the canvas's world knows: which of its concepts it was shown in its training."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

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


@dataclass(frozen=True)
class Twin:
    """A network of a canvas: what it knows and the seed of its training.

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
