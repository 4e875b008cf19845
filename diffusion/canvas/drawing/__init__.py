"""Drawing of scenes: from the properties of a :class:`~diffusion.canvas.world.Scene` to a small RGB picture.

A scene is first laid out as separate layers (background, subject, flames) at four times the final resolution.
A style then turns the layers into one picture, so that it can treat them apart: an outline follows the subject,
and flames keep their warm colours whatever the style does to the rest. Averaging 4x4 blocks gives the final size.
"""

from diffusion.canvas.drawing.scene import draw

__all__ = ["draw"]
