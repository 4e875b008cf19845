"""TINA's inversion a second time, slowly: one picture, the relation as the paper prints it, solved to the end."""

import math

import torch
from torch import Tensor

from diffusion.model import TextToImage
from tests.oracles.noise import levels, predictor


@torch.no_grad()
def invert(model: TextToImage, start: Tensor, timesteps: list[int], skipped: int) -> Tensor:
    """z_T [c, h, w] of ``start``, which stands after the first ``skipped`` steps back; ``timesteps`` from noise on."""
    predict = predictor(model, "", 1)
    # From the noisiest on, the last one the picture's.
    abar = levels(model, timesteps)
    z = start
    for number in range(len(timesteps) - 1 - skipped, -1, -1):
        noisy, clean = abar[number], abar[number + 1]
        c1 = math.sqrt(noisy / clean)
        c2 = math.sqrt(1 - noisy) - math.sqrt(noisy * (1 - clean) / clean)
        before, found = z, z
        for _ in range(15):
            found = c1 * before + c2 * predict(found, timesteps[number])
        z = found
    return z


def energy_distance(z: Tensor, z0: Tensor, abar: float) -> float:
    """(S - m) / sqrt(v) of TINA+."""
    size, picture = z.numel(), float((z0**2).sum())
    mean = abar * picture + (1 - abar) * size
    variance = 2 * (1 - abar) ** 2 * size + 4 * abar * (1 - abar) * picture
    return (float((z**2).sum()) - mean) / math.sqrt(variance)
