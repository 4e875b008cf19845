"""The network behind the canvas judge: one convolutional trunk, a head for style, subject and fire each."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion.canvas.world import STYLES, SUBJECTS

HEADS: dict[str, tuple[str, ...]] = {
    "style": STYLES,
    "subject": SUBJECTS,
    "burning": ("no", "yes"),
}
"""The labels of each head, in the order of its logits."""


class CanvasClassifier(nn.Module):
    """Reads style, subject and fire off a picture.

    Args:
        width: Channels of the first stage; the two after it have twice and four times as many.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.width = width
        stages: list[nn.Module] = [_convolution(3, width, stride=1)]
        for channels in (width, 2 * width):
            stages += [_Residual(channels), _convolution(channels, 2 * channels, stride=2)]
        stages += [_Residual(4 * width), _Residual(4 * width)]
        self.trunk = nn.Sequential(*stages)
        self.heads = nn.ModuleDict({head: nn.Linear(8 * width, len(labels)) for head, labels in HEADS.items()})

    @property
    def feature_width(self) -> int:
        """Width of :meth:`features`."""
        return 8 * self.width

    def features(self, images: Tensor) -> Tensor:
        """Mean and maximum of the last feature map: float [n, feature_width] from uint8 ``images`` [n, 3, H, W]."""
        maps = self.trunk(images.to(self.dtype) / 127.5 - 1)
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of every head, float [n, labels], from uint8 ``images`` [n, 3, H, W]."""
        features = self.features(images)
        return {head: layer(features) for head, layer in self.heads.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return next(self.parameters()).dtype

    def save_pretrained(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"width": self.width, "heads": HEADS}, indent=2) + "\n")
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path) -> "CanvasClassifier":
        """Read what :meth:`save_pretrained` wrote; float32, in evaluation mode.

        Raises:
            FileNotFoundError: ``folder`` holds no classifier.
            ValueError: The labels in ``folder`` are not this world's.
        """
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"{folder} holds no canvas classifier (config.json, model.safetensors).")
        config = json.loads((folder / "config.json").read_text())
        if {head: tuple(labels) for head, labels in config["heads"].items()} != HEADS:
            raise ValueError(f"The classifier in {folder} was trained for other labels: {config['heads']}.")
        network = cls(width=config["width"])
        network.load_state_dict(load_file(folder / "model.safetensors"))
        return network.float().eval().requires_grad_(requires_grad=False)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            _convolution(channels, channels, stride=1), _convolution(channels, channels, stride=1)
        )

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.inner(maps)  # type: ignore[no-any-return]


def _convolution(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
    )
