"""The jobs of a sweep side by side: ``hydra/launcher=joblib`` and the like; imports nothing heavy.

Every job has a process of its own, here or on another machine, so one that is killed ends no other. What a job has to
say lies in its record and its log; for one that died without a record, what its engine knows is recorded.
"""

import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict
from pydantic import ValidationError

from diffusion.plugins import PLUGINS_VARIABLE
from diffusion.progress import report_in_lines
from experiments.command.composing import typed
from experiments.command.errors import CommandError, explain_validation
from experiments.command.records import Record

log = logging.getLogger(__name__)

OWN = "hydra_plugins.eraselab."
"""Where Hydra finds the launchers of this project."""

TAKEN_ALONG = ("PYTHONPATH", PLUGINS_VARIABLE)
"""Environment variables without which a job on another machine would not find this project and its plugins."""


@dataclass(frozen=True)
class JobCall:
    """One job of a sweep, to be done in another process.

    Attributes:
        config: As Hydra composed it, with Hydra's own settings.
        context: Hydra's callbacks and config loader.
        task: What is done with a composed config.
        singletons: What Hydra knows globally.
        folder: Where the command was typed; relative paths start there.
    """

    config: DictConfig
    context: HydraContext
    task: TaskFunction
    singletons: Any
    folder: str

    def __call__(self) -> str | None:
        """Do it; returns the path of its summary, None if it failed, which its record tells."""
        os.chdir(self.folder)
        setup_globals()
        Singleton.set_state(self.singletons)
        HydraConfig.instance().set_config(self.config)
        report_in_lines()
        try:
            done = run_job(
                hydra_context=self.context,
                task_function=self.task,
                config=self.config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        except SystemExit as stopped:
            if not isinstance(stopped.code, str):
                raise
            overrides = typed(self.config.hydra.overrides.task)
            Record(self.number, overrides, failure=stopped.code).write(Path(self.config.hydra.sweep.dir))
            return None
        value: str | None = done.return_value
        return value

    def checkpoint(self) -> Any:
        """What Slurm starts again when it ended the job for its time or for another; it continues from the store."""
        from submitit.helpers import DelayedSubmission  # noqa: PLC0415

        return DelayedSubmission(self)

    @property
    def number(self) -> int:
        """Its number in the sweep, from 0."""
        return int(self.config.hydra.job.num)


@dataclass(frozen=True)
class Ended:
    """How the process of a job ended.

    Attributes:
        value: What the job returned.
        died: Why it returned nothing, to follow a colon; empty if it did.
    """

    value: str | None = None
    died: str = ""


class Engine(Protocol):
    """Runs calls side by side, each in a process of its own.

    Attributes:
        package: What it needs to be installed.
        extra: The extra of this project that brings it.
    """

    package: ClassVar[str]
    extra: ClassVar[str]

    def run(self, calls: Sequence[JobCall]) -> list[Ended]:
        """Do all of them and tell, in their order, how each ended."""
        ...


class SideBySide(Launcher):
    """A launcher of Hydra's that hands jobs to an engine.

    Args:
        engine: Its class.
        settings: Its fields.

    Raises:
        CommandError: The engine is not installed, or a setting is wrong.
    """

    def __init__(self, engine: type[Engine], settings: dict[str, Any]) -> None:
        if find_spec(engine.package) is None:
            raise CommandError(
                f"This launcher needs the package {engine.package}, which is not installed: pip install "
                f"'.[{engine.extra}]' in a checkout, 'robust-concept-erasing[{engine.extra}]' elsewhere."
            )
        try:
            self._engine = engine(**settings)
        except ValidationError as error:
            raise CommandError(explain_validation(error, "hydra.launcher", settings)) from error

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See :class:`Launcher`."""
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """See :class:`Launcher`; a job that died returned nothing, and its record says so."""
        setup_globals()
        hydra = self._config.hydra
        configure_log(hydra.hydra_logging, hydra.verbose)
        sweep = Path(str(hydra.sweep.dir))
        sweep.mkdir(parents=True, exist_ok=True)
        log.info("%d jobs side by side by %s, in %s", len(job_overrides), self._engine.package, sweep)
        _let_others_import()
        state, folder = Singleton.get_state(), str(Path.cwd())
        calls = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
            config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = f"{hydra.job.name}_{number}"
                config.hydra.job.num = number
            calls.append(JobCall(config, self._context, self._task, state, folder))
        ends = self._engine.run(calls)
        returns = []
        for call, end in zip(calls, ends, strict=True):
            if end.died and not Record.exists(sweep, call.number):
                overrides = typed(call.config.hydra.overrides.task)
                Record(call.number, overrides, failure=f"It ended without a word: {end.died}.").write(sweep)
            returns.append(JobReturn(typed(call.config.hydra.overrides.task), status=JobStatus.COMPLETED))
            returns[-1].return_value = end.value
        return returns


def check_launcher(config: DictConfig) -> None:
    """Make the launcher of a sweep, which refuses at once what it cannot do.

    Raises:
        CommandError: What it needs is not installed, or a setting is wrong.
    """
    settings: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    target = str(settings.pop("_target_"))
    if target.startswith(OWN):
        get_class(target)(**settings)


def _let_others_import() -> None:
    """Let processes that this one starts import the packages from where it does."""
    home = str(Path(__file__).resolve().parents[2])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if home not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([home, *paths])


def ended_by(code: int) -> str:
    """What an exit status says, to follow "It ended without a word:".

    >>> ended_by(-9)
    'its process was ended by SIGKILL'
    """
    if code >= 0:
        return f"its process ended with status {code}"
    try:
        return f"its process was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"its process was ended by signal {-code}"
