"""Who hears of a job while it runs, such as Weights & Biases."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from attacks.cases import Outcome
from diffusion.checked import checked
from experiments.job.result import CurvePoint, Summary


class Recorder(Protocol):
    """Takes what a job has to show while it runs."""

    def hear_loss(self, training: str, steps: int, loss: float) -> None:
        """The loss of the last of ``steps`` steps of a training that is under way."""

    def hear_attack(self, label: str, prompts: int, rate: float) -> None:
        """The share of the first ``prompts`` prompts that an attack under way has brought back; ``label`` is whose."""

    def log_losses(self, losses: Sequence[float]) -> None:
        """The eraser's loss at every step."""

    def log_curve(self, curve: Sequence[CurvePoint]) -> None:
        """Attack success rate over attempts and U-Net evaluations."""

    def log_results(
        self, summary: Summary, grid: Path, base: Tensor, erased: Tensor, outcomes: Sequence[Outcome]
    ) -> None:
        """The summary, the picture grid and the table of prompts; pictures uint8 [n, 3, H, W]."""


class Silent:
    """Records nothing."""

    def hear_loss(self, training: str, steps: int, loss: float) -> None:
        """Do nothing."""

    def hear_attack(self, label: str, prompts: int, rate: float) -> None:
        """Do nothing."""

    def log_losses(self, losses: Sequence[float]) -> None:
        """Do nothing."""

    def log_curve(self, curve: Sequence[CurvePoint]) -> None:
        """Do nothing."""

    def log_results(
        self, summary: Summary, grid: Path, base: Tensor, erased: Tensor, outcomes: Sequence[Outcome]
    ) -> None:
        """Do nothing."""


@checked
class Off:
    """No tracking."""

    @contextmanager
    def start(self, job: object, folder: Path) -> Iterator[Recorder]:
        """Record nothing."""
        yield Silent()
