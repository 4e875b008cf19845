"""What a stage cost: U-Net evaluations, seconds, memory."""

import resource
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from diffusion.model import TextToImage


@dataclass(frozen=True)
class Cost:
    """Cost of a piece of work.

    Attributes:
        unet_evaluations: Samples through the U-Net.
        seconds: Wall-clock time.
        peak_memory_bytes: The process's largest resident set up to the end of the work; on a GPU the largest
            allocation there.
    """

    unet_evaluations: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    @classmethod
    def total(cls, costs: Iterable["Cost"]) -> "Cost":
        """Evaluations and seconds added, the largest of the peaks."""
        costs = list(costs)
        return cls(
            sum(cost.unet_evaluations for cost in costs),
            sum(cost.seconds for cost in costs),
            max((cost.peak_memory_bytes for cost in costs), default=0),
        )

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Cost":
        """Read back what :meth:`as_dict` gave; other keys are ignored."""
        return cls(data["unet_evaluations"], data["seconds"], data["peak_memory_bytes"])

    def as_dict(self) -> dict[str, float]:
        """Fields by name, for JSON."""
        return asdict(self)

    def shared(self, count: int) -> "Cost":
        """The part of one of ``count`` equal pieces."""
        return Cost(self.unet_evaluations // count, self.seconds / count, self.peak_memory_bytes)


class Meter:
    """Measures the work on ``model`` from now on."""

    def __init__(self, model: TextToImage) -> None:
        self._model = model
        self._evaluations = model.unet_evaluations
        self._started = time.perf_counter()

    def read(self) -> Cost:
        """The cost since the last reading."""
        evaluations, now = self._model.unet_evaluations, time.perf_counter()
        cost = Cost(evaluations - self._evaluations, now - self._started, peak_memory_bytes())
        self._evaluations, self._started = evaluations, now
        return cost


def peak_memory_bytes() -> int:
    """Largest GPU allocation of the process if it uses a GPU, else its largest resident set."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Linux counts in kibibytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
