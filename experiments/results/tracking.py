"""Weights & Biases: a job's config, curves, numbers and pictures; it never stops a job."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from attacks.cases import Outcome
from diffusion.checked import checked
from experiments.job.recording import Recorder
from experiments.job.result import CurvePoint, Summary
from experiments.job.settings import Job

log = logging.getLogger(__name__)

_HOST = "api.wandb.ai"
_START_SECONDS = 20.0
"""How long an unreachable server may hold up a job."""


@checked
class WandbTracker:
    """Weights & Biases.

    Attributes:
        mode: ``auto`` is online where a key is set (WANDB_API_KEY or netrc) and offline elsewhere; offline runs lie in
            the run's folder until ``wandb sync`` sends them.
        project: Project of the runs.
        entity: Team or user; the key's own if None.
    """

    mode: Literal["auto", "online", "offline"] = "auto"
    project: str = "robust-concept-erasing"
    entity: str | None = None

    @contextmanager
    def start(self, job: Job, folder: Path) -> Iterator[Recorder]:
        """Open a run for the length of the job; whatever fails costs one line of warning."""
        recorder = WandbRecorder()
        recorder.attempt(lambda: recorder.open(self, job, folder))
        exit_code = 1
        try:
            yield recorder
            exit_code = 0
        finally:
            recorder.attempt(lambda: recorder.close(exit_code))

    def resolved_mode(self) -> Literal["online", "offline"]:
        """What ``auto`` comes to on this machine."""
        if self.mode != "auto":
            return self.mode
        return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether the environment or netrc holds a W&B key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc().authenticators(_HOST) is not None
    except (OSError, NetrcParseError):
        return False


class WandbRecorder:
    """A W&B run; after its first failure it warns once and records nothing more."""

    def __init__(self) -> None:
        self._wandb: Any = None
        self._run: Any = None
        self._failed = False

    def attempt(self, action: Callable[[], None]) -> None:
        """Do ``action``; a failure of any kind is a warning, never an error."""
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # third-party code, the network and the disk may fail in any way
            self._failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("W&B stopped recording, the job goes on: %s", reason)

    def open(self, tracker: WandbTracker, job: Job, folder: Path) -> None:
        """Start the run."""
        import wandb  # noqa: PLC0415 - slow to import, and a job goes on without it

        self._wandb = wandb
        choices = {group: job.choices[group] for group in ("eraser", "pruning", "attack") if group in job.choices}
        options: dict[str, Any] = {
            "project": tracker.project,
            "entity": tracker.entity,
            "dir": str(folder),
            "config": job.config,
            "name": "-".join([job.concept.name, *choices.values(), f"s{job.settings.seed}"]),
            "group": job.concept.name,
            "tags": [f"{group}={choice}" for group, choice in choices.items()],
            "settings": wandb.Settings(silent=True, console="off", init_timeout=_START_SECONDS),
            "reinit": "finish_previous",
        }
        mode = tracker.resolved_mode()
        try:
            self._run = wandb.init(mode=mode, **options)
        except Exception as error:  # an unreachable server, a wrong key, ...
            if mode == "offline":
                raise
            log.warning("W&B cannot go online, recording offline: %s", " ".join(str(error).split()))
            self._run = wandb.init(mode="offline", **options)

    def close(self, exit_code: int) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish(exit_code=exit_code)

    def log_losses(self, losses: Sequence[float]) -> None:
        """The eraser's loss at every step, with its own axis."""
        self.attempt(lambda: self._log_losses(losses))

    def log_curve(self, curve: Sequence[CurvePoint]) -> None:
        """Attack success rate over attempts and U-Net evaluations."""
        self.attempt(lambda: self._log_curve(curve))

    def log_results(
        self, summary: Summary, grid: Path, base: Tensor, erased: Tensor, outcomes: Sequence[Outcome]
    ) -> None:
        """The summary, the picture grid and the table of prompts."""
        self.attempt(lambda: self._log_results(summary, grid, base, erased, outcomes))

    def _log_losses(self, losses: Sequence[float]) -> None:
        self._run.define_metric("eraser/loss", step_metric="eraser/step")
        for step, loss in enumerate(losses):
            self._run.log({"eraser/step": step, "eraser/loss": loss})

    def _log_curve(self, curve: Sequence[CurvePoint]) -> None:
        self._run.define_metric("attack/success_rate", step_metric="attack/attempts")
        self._run.define_metric("attack/unet_evaluations", step_metric="attack/attempts")
        for point in curve:
            self._run.log(
                {
                    "attack/attempts": point.attempts,
                    "attack/success_rate": point.rate,
                    "attack/unet_evaluations": point.unet_evaluations,
                }
            )

    def _log_results(
        self, summary: Summary, grid: Path, base: Tensor, erased: Tensor, outcomes: Sequence[Outcome]
    ) -> None:
        wandb, numbers = self._wandb, summary.as_dict()
        self._run.summary.update(
            {
                name: numbers[name]
                for name in (
                    "run",
                    "n",
                    "seed",
                    "rates",
                    "measures",
                    "costs",
                    "edit",
                    "threat_model",
                    "unpruned",
                    "protocol",
                )
            }
        )
        columns = ["prompt", "adversarial prompt", "base", "erased", "attacked", "picture base", "picture erased"]
        table = wandb.Table(columns=[*columns, "picture attacked"])
        for case, outcome, *images in zip(summary.cases, outcomes, base, erased, strict=True):
            pictures = [wandb.Image(image.permute(1, 2, 0).numpy()) for image in (*images, outcome.image)]
            verdicts = (case.base, case.erased, case.attacked)
            table.add_data(case.prompt, case.adversarial_prompt, *verdicts, *pictures)
        self._run.log({"prompts": table, "pictures": wandb.Image(str(grid))})
