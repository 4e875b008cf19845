"""How far latents lie from where noise lies: on the Gaussian shell, where the squared norm is near their size."""

import math

import torch
from torch import Tensor

ENERGY = "energy"
"""Name of the distance among what a check has measured."""

RESIDUAL = "residual"
"""Name of what is left of an inversion's equation among what a check has measured."""

TOLERANCE = 0.11
"""TINA+'s tau of 10 standard deviations lets the energy of Stable Diffusion's latents fall so far below that of noise,
as a share of it (arXiv 2608.17747)."""


def energy_distance(latents: Tensor, pictures: Tensor | None = None, level: float = 0.0) -> Tensor:
    """The latents' energy in standard deviations from that of a noised picture, float64 [n].

    r = (S - m) / sqrt(v), S = || z ||^2, with D numbers in z and abar the noise's level:
        m = abar || z_0 ||^2 + (1 - abar) D,   v = 2 (1 - abar)^2 D + 4 abar (1 - abar) || z_0 ||^2
    Below 0 a picture may hide in latents that are too small to be noise; above 0 they are driven too far.

    Args:
        latents: float [n, c, h, w], z.
        pictures: float [n, c, h, w], z_0; they do not matter at level 0.
        level: abar, 0 for pure noise.
    """
    energy = latents.double().square().flatten(1).sum(dim=1)
    of_pictures = torch.zeros_like(energy) if pictures is None else pictures.double().square().flatten(1).sum(dim=1)
    size = latents[0].numel()
    mean = level * of_pictures + (1 - level) * size
    variance = 2 * (1 - level) ** 2 * size + 4 * level * (1 - level) * of_pictures
    return (energy - mean) / variance.sqrt()


def most_distance(size: int, tolerance: float = TOLERANCE) -> float:
    """The largest energy distance, either way, that still counts as noise: tolerance sqrt(D / 2).

    One standard deviation of the energy of D numbers is sqrt(2 / D) of it, so the same share of it is more standard
    deviations of large latents than of small ones.

    >>> most_distance(8192, 0.11), most_distance(512, 0.11)
    (7.04, 1.76)
    """
    return tolerance * math.sqrt(size / 2)
