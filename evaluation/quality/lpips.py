"""LPIPS: how far pictures have moved from the base model's, to the eye (Zhang et al. 2018, 1801.03924)."""

from functools import lru_cache
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _NoTrainLpips
from torchvision.models import AlexNet_Weights, alexnet

from diffusion.checked import checked
from evaluation.judges.pretrained import TorchDevice, batches, pick_device
from evaluation.quality.collected import Collected
from evaluation.quality.weights import load_parameters, weights_file
from evaluation.statistics import Mean


@checked
class Lpips:
    """The mean over retained prompts of LPIPS between the two models' pictures; 0 where an edit changes none.

    AlexNet's with the published linear heads, through torchmetrics.

    Attributes:
        weights: AlexNet's; null for what torchvision downloads, where torch's hub keeps it.
        device: ``auto`` takes a GPU if there is one.
        batch_size: Pictures at a time; no effect on results.

    Raises:
        ValueError: The file is not there.
    """

    weights: Annotated[Path, weights_file(AlexNet_Weights.DEFAULT.url)]
    device: TorchDevice = "auto"
    batch_size: Annotated[int, Field(ge=1)] = 16

    @torch.no_grad()
    def distances(self, images: Tensor, reference_images: Tensor) -> Tensor:
        """LPIPS of each pair of uint8 pictures [n, 3, H, W], float [n]; pictures need an edge of 63 or more."""
        device = pick_device(self.device)
        network = load_network(self.weights, device)
        pairs = zip(batches(images, self.batch_size), batches(reference_images, self.batch_size), strict=True)
        parts = [network(_scaled(one, device), _scaled(other, device)).flatten().cpu() for one, other in pairs]
        return torch.cat([torch.empty(0), *parts])

    def start(self) -> Collected:
        """Measure ``lpips``, a :class:`evaluation.statistics.Mean` as a dict."""
        return Collected(lambda images, others, _: {"lpips": self.distances(images, others).tolist()}, Mean.of)


@lru_cache(maxsize=2)
def load_network(weights: Path, device: torch.device) -> nn.Module:
    """LPIPS's network with AlexNet's ``weights``, read once per process.

    Raises:
        ValueError: The file is damaged, or holds another network's.
    """
    trunk = alexnet()
    load_parameters(trunk, weights, "AlexNet")
    network = _NoTrainLpips(net="alex", pnet_rand=True)
    for part in (network.net.slice1, network.net.slice2, network.net.slice3, network.net.slice4, network.net.slice5):
        for position, layer in part.named_children():
            layer.load_state_dict(trunk.features[int(position)].state_dict())
    placed: nn.Module = network.to(device)
    return placed


def _scaled(images: Tensor, device: torch.device) -> Tensor:
    """Pixels from -1 to 1, as the network takes them."""
    return images.to(device).float() / 127.5 - 1
