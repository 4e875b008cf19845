"""Weights & Biases: a job's config, curves, numbers and pictures; it never stops a job, nor keeps it waiting."""

import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from attacks.cases import Outcome
from diffusion.checked import checked
from experiments.job.made import EDIT
from experiments.job.recording import Recorder
from experiments.job.result import RUNS, CurvePoint, Summary
from experiments.job.settings import Job, matters
from experiments.job.stages import ATTACK
from experiments.job.store import content_hash
from experiments.results import wandb_process
from experiments.results.floors import floor_numbers
from experiments.results.report.page import run_page, write_page
from experiments.results.screen import noise_numbers

log = logging.getLogger(__name__)

_ROOM_FOR_A_RECORD = 2**20
"""Bytes; with less left on the disk, what wandb wrote may be cut."""

PAGE = "report.html"
"""The report of a run, in its own folder."""

_FLOORS = re.compile(r"^(floor|ceiling)(?=_(low|high|n|successes)$|$)")
"""Names of the attack's success on the models that it is measured against."""

_GROUPS = ("model", "eraser", "pruning", "attack", "judge", "protocol")
_NOT_OF_THE_RUN = {"store", "tracker", "dry_run", "fresh", "floor"}


@checked
class WandbTracker:
    """Weights & Biases.

    The environment's own settings (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR, WANDB_BASE_URL,
    WANDB_DISABLED) come before these, and before the name, group, tags and id that a run has otherwise (WANDB_NAME,
    WANDB_RUN_GROUP, WANDB_JOB_TYPE, WANDB_TAGS, WANDB_RUN_ID, WANDB_RESUME).

    Attributes:
        mode: ``auto`` is online where wandb finds a key and offline elsewhere; online, pictures and prompts are
            uploaded. Offline runs lie in the run's folder until ``wandb sync`` sends them.
        project: Project of the runs.
        entity: Team or user; the key's own if None.
        patience: Seconds that a job waits at its end for what has not been sent.
    """

    mode: Literal["auto", "online", "offline"] = "auto"
    project: str = "robust-concept-erasing"
    entity: str | None = None
    patience: Annotated[float, Field(gt=0)] = 60.0

    @contextmanager
    def start(self, job: Job, folder: Path) -> Iterator[Recorder]:
        """Open a run for the length of the job; whatever fails costs a line of warning."""
        courier = Courier(folder)
        recorder = WandbRecorder(courier, job, self, folder)
        exit_code = 1
        try:
            yield recorder
            exit_code = 0
        finally:
            courier.send("finish", exit_code)
            courier.end(self.patience)


class Courier:
    """Carries messages to the process that speaks with W&B, and its words back; sending never waits.

    Args:
        folder: The run's own, where what that process prints is kept too.
    """

    def __init__(self, folder: Path) -> None:
        self.said: dict[str, Any] = {}
        # wandb keeps what is to be uploaded in its data folder: it stays with the run.
        environment = {"WANDB_DATA_DIR": str(folder / "wandb"), **os.environ}
        self._process = subprocess.Popen(
            # -P: the modules beside that file are none that it may import.
            [sys.executable, "-P", wandb_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            # Ctrl-C is the job's to answer, and all that wandb starts can be ended together.
            start_new_session=True,
        )
        self._messages: Queue[tuple[str, Any] | None] = Queue()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._carry, self._listen)]
        for thread in self._threads:
            thread.start()

    def send(self, kind: str, payload: Any) -> None:
        """Hand over a message; see :class:`experiments.results.wandb_process.Run`."""
        self._messages.put((kind, payload))

    def end(self, seconds: float) -> None:
        """Wait so long for what is under way, end the process, and say where the record is."""
        self._messages.put(None)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.said["warning"] = f"W&B did not come to an end within {seconds:g} s and was left"
            log.warning("%s", self.said["warning"])
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._threads[1].join(seconds)
        self._tell()

    def _tell(self) -> None:
        folder = self.said.get("folder")
        if folder and Path(folder).exists() and shutil.disk_usage(folder).free < _ROOM_FOR_A_RECORD:
            log.warning("W&B: the disk of %s is full; what was recorded may be cut", folder)
        if self.said.get("mode") == "online" and self.said.get("ended"):
            log.info("W&B: %s", self.said["url"])
        elif folder and self.said.get("mode") != "disabled":
            log.info("W&B: recorded in %s; send it with `wandb sync %s`", folder, folder)
        elif not self.said:
            log.warning("W&B ended without a word; nothing is recorded there, the job goes on")

    def _carry(self) -> None:
        stream = self._process.stdin
        with suppress(OSError):
            while stream is not None and (message := self._messages.get()) is not None:
                pickle.dump(message, stream)
                stream.flush()
        with suppress(OSError):
            if stream is not None:
                stream.close()

    def _listen(self) -> None:
        for line in self._process.stdout or ():
            facts = json.loads(line)
            self.said |= facts
            if "warning" in facts:
                log.warning("%s", facts["warning"])
            if facts.get("mode") == "online":
                log.info("W&B: online, pictures and prompts are uploaded to %s", facts["url"])


class WandbRecorder:
    """What a job tells W&B."""

    def __init__(self, courier: Courier, job: Job, tracker: WandbTracker, folder: Path) -> None:
        self._courier = courier
        # Steps of the trainings before the one under way, and of this one, that were told while they ran.
        self._before, self._steps = 0, 0
        self._told: set[int] = set()
        choices = {group: job.choices[group] for group in _GROUPS if group in job.choices}
        own = {key: value for key, value in job.config.items() if key not in _NOT_OF_THE_RUN}
        method = {group: choices[group] for group in ("eraser", "pruning", "attack") if group in choices}
        options = {
            "mode": tracker.mode,
            "project": tracker.project,
            "entity": tracker.entity,
            "dir": str(folder),
            # A job that is run again goes on with its run.
            "id": content_hash(matters(own)),
            "resume": "allow",
            # Choices by name, so that numbers can be drawn over them; all fields below.
            "config": {
                **choices,
                "combination": " / ".join(method.values()),
                "concept": job.concept.name,
                "seed": job.settings.seed,
                "fields": own,
            },
            "name": "-".join([job.concept.name, *method.values(), f"s{job.settings.seed}"]),
            "group": job.concept.name,
            "job_type": method.get("attack", "none"),
            "tags": [f"{group}={choice}"[:64] for group, choice in choices.items()],
            "reinit": "finish_previous",
        }
        courier.send("open", options)
        courier.send(
            "metrics",
            {
                "eraser/loss": "eraser/step",
                "attack/so_far": "attack/prompts",
                "attack/success_rate": "attack/attempts",
                "attack/unet_evaluations": "attack/attempts",
            },
        )

    def hear_loss(self, training: str, steps: int, loss: float) -> None:
        """The loss of a training under way; an eraser may train several times, one after the other."""
        if steps <= self._steps:
            self._before += self._steps
        self._steps = steps
        self._log_loss(self._before + steps - 1, loss)

    def hear_attack(self, label: str, prompts: int, rate: float) -> None:
        """How the attack goes; trainings within it are told by the attack's own curve."""
        if label == ATTACK:
            self._courier.send("log", {"attack/prompts": prompts, "attack/so_far": rate})

    def log_losses(self, losses: Sequence[float]) -> None:
        """The eraser's loss at every step, with its own axis; only at those that were not told while it trained."""
        for step, loss in enumerate(losses):
            if step not in self._told:
                self._log_loss(step, loss)

    def _log_loss(self, step: int, loss: float) -> None:
        self._told.add(step)
        self._courier.send("log", {"eraser/step": step, "eraser/loss": loss})

    def log_curve(self, curve: Sequence[CurvePoint]) -> None:
        """Attack success rate over attempts and U-Net evaluations."""
        for point in curve:
            self._courier.send(
                "log",
                {
                    "attack/attempts": point.attempts,
                    "attack/success_rate": point.rate,
                    "attack/unet_evaluations": point.unet_evaluations,
                },
            )

    def log_results(
        self, summary: Summary, grid: Path, base: Tensor, erased: Tensor, outcomes: Sequence[Outcome]
    ) -> None:
        """The numbers, the picture grid, the table of prompts, and the files that they come from."""
        numbers = summary.as_dict()
        self._courier.send("summary", flat_numbers(numbers))
        columns = ["prompt", "adversarial prompt", "base", "erased", "attacked"]
        columns += [f"picture {name}" for name in ("base", "erased", "attacked")]
        rows = [
            [case.prompt, case.adversarial_prompt, case.base, case.erased, case.attacked]
            + [image.permute(1, 2, 0).numpy() for image in (*images, outcome.image)]
            for case, outcome, *images in zip(summary.cases, outcomes, base, erased, strict=True)
        ]
        self._courier.send("pictures", {"columns": columns, "rows": rows, "grid": str(grid)})
        made = [grid.with_name("summary.json")]
        if "edit" in summary.artefacts:
            folder = Path(summary.artefacts["edit"])
            stored = folder.parents[1] / RUNS / str(numbers["run"]) / "summary.json"
            made += [folder / EDIT, *self._page(numbers, stored, grid.parent)]
        files = [path for path in made if path.is_file()]
        if files:
            name = f"{numbers['concept']}-{numbers['run']}"
            self._courier.send("artifact", {"name": name, "type": "result", "files": [str(path) for path in files]})

    @staticmethod
    def _page(numbers: Mapping[str, Any], summary: Path, folder: Path) -> list[Path]:
        """The report of the run whose ``summary`` lies in the store, as a file in ``folder``; nothing if it fails."""
        try:
            return [write_page(run_page({**numbers, "path": str(summary)}), folder / PAGE)]
        except (ValueError, OSError) as error:
            log.warning("W&B: no report page is recorded: %s", error)
            return []


def flat_numbers(summary: Mapping[str, Any]) -> dict[str, float | int | str]:
    """A summary's numbers by plain names, such as ``asr``, ``asr_low``, ``asr_floor`` and ``retained_style``."""
    flat: dict[str, float | int | str] = {"run": summary["run"], "n": summary["n"], "seed": summary["seed"]}
    names = {"attacked": "asr"}
    found = {names.get(name, name): rate for name, rate in summary["rates"].items()}
    # Its accuracy on retained pictures, by the label that it is about.
    found |= {f"retained_{name.removeprefix('accuracy_')}": value for name, value in summary["measures"].items()}
    found["holds_on_new_seeds"] = summary.get("holds", {}).get("shown")
    found |= {_FLOORS.sub(r"asr_\g<0>", name): value for name, value in floor_numbers(summary).items()}
    found |= noise_numbers(summary)
    for name, value in found.items():
        if isinstance(value, Mapping):
            for part, number in value.items():
                flat[name if part in {"rate", "mean"} else f"{name}_{part}"] = number
        elif value is not None:
            flat[name] = value
    flat |= {f"{stage}_unet_evaluations": cost["unet_evaluations"] for stage, cost in summary["costs"].items()}
    flat |= {f"{stage}_seconds": cost["seconds"] for stage, cost in summary["costs"].items()}
    return flat
