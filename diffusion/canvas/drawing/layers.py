"""The layers that a style turns into one picture."""

from dataclasses import dataclass

import numpy as np

from diffusion.canvas.drawing.pixels import Floats, blend, contrast


@dataclass(frozen=True)
class Layers:
    """The parts of a scene before styling; colours [edge, edge, 3] and masks [edge, edge], all within 0 and 1."""

    background: Floats
    subject: Floats
    subject_mask: Floats
    flames: Floats
    flame_mask: Floats
    body: Floats

    def without_flames(self) -> Floats:
        """Return the subject on the background, [edge, edge, 3]."""
        return blend(self.background, self.subject, self.subject_mask)

    def flattened(self) -> Floats:
        """Return all layers on top of each other, [edge, edge, 3]."""
        return blend(self.without_flames(), self.flames, self.flame_mask)

    def subject_lines(self) -> Floats:
        """Return the outline and the inner contours of the subject as line opacity, [edge, edge]."""
        painted = (self.subject[..., channel] * self.subject_mask for channel in range(3))
        lines: Floats = np.clip((contrast(*painted, self.subject_mask) - 0.15) * 4, 0, 1)
        return lines

    def flame_lines(self) -> Floats:
        """Return the outline of the flames as line opacity, [edge, edge]."""
        lines: Floats = np.clip(contrast(self.flame_mask) * 2, 0, 1)
        return lines
