"""What a stage cost: U-Net evaluations, seconds, memory."""

import re
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion.model import TextToImage

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
"""Linux's view of the process; 5 in the second file resets the peak in the first (proc_pid_clear_refs(5))."""

_RESIDENT_PEAK = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Cost:
    """Cost of a piece of work.

    Attributes:
        unet_evaluations: Samples through the U-Net.
        seconds: Wall-clock time.
        peak_memory_bytes: The process's largest resident set during the work; on a GPU the largest allocation there.
        unet_gradients: Samples whose gradient went back through the U-Net: work beside the evaluations, about two of
            them each. As they were done: unlike the evaluations, an attack's are not those of its cases alone.
        text_encodings: Texts through the text encoder, as they were done.
    """

    unet_evaluations: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    unet_gradients: int = 0
    text_encodings: int = 0

    @classmethod
    def total(cls, costs: Iterable["Cost"]) -> "Cost":
        """Counts and seconds added, the largest of the peaks."""
        costs = list(costs)
        return cls(
            sum(cost.unet_evaluations for cost in costs),
            sum(cost.seconds for cost in costs),
            max((cost.peak_memory_bytes for cost in costs), default=0),
            sum(cost.unet_gradients for cost in costs),
            sum(cost.text_encodings for cost in costs),
        )

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Cost":
        """Read back what :meth:`as_dict` gave; other keys are ignored, and older costs have no more than three."""
        needed = (data[name] for name in ("unet_evaluations", "seconds", "peak_memory_bytes"))
        return cls(*needed, *(data.get(name, 0) for name in ("unet_gradients", "text_encodings")))

    def as_dict(self) -> dict[str, float]:
        """Fields by name, for JSON."""
        return asdict(self)

    def shared(self, count: int) -> "Cost":
        """The part of one of ``count`` equal pieces."""
        return Cost(
            self.unet_evaluations // count,
            self.seconds / count,
            self.peak_memory_bytes,
            self.unet_gradients // count,
            self.text_encodings // count,
        )


class Meter:
    """Measures the work on models from now on; one at a time, as the peak of memory starts anew with each.

    Args:
        models: Whose counts are added.
    """

    def __init__(self, *models: TextToImage) -> None:
        self._models = models
        self._begin()

    def _counts(self) -> tuple[int, int, int]:
        return (
            sum(model.unet_evaluations for model in self._models),
            sum(model.unet_gradients for model in self._models),
            sum(model.text_encodings for model in self._models),
        )

    def _begin(self) -> None:
        self._before = self._counts()
        self._started = time.perf_counter()
        reset_peak_memory()

    def read(self) -> Cost:
        """The cost since the last reading."""
        seconds = time.perf_counter() - self._started
        evaluations, gradients, texts = (now - was for now, was in zip(self._counts(), self._before, strict=True))
        cost = Cost(evaluations, seconds, peak_memory_bytes(), gradients, texts)
        self._begin()
        return cost


def peak_memory_bytes() -> int:
    """Largest GPU allocation of the process if it uses a GPU, else its largest resident set, since the last reset."""
    if _uses_gpu():
        return torch.cuda.max_memory_allocated()
    if found := _RESIDENT_PEAK.search(_STATUS.read_text() if _STATUS.exists() else ""):
        return 1024 * int(found[1])
    # macOS counts in bytes, and knows no reset.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> None:
    """Let the peak of memory start from what is in use now, where the system can."""
    if _uses_gpu():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")


def _uses_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
