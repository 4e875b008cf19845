"""A class for each choice of ``hydra/launcher`` that runs jobs side by side; Hydra takes launchers from here alone."""

from typing import Any

from experiments.command.engines import Joblib, Ray, SubmititLocal, SubmititSlurm
from experiments.command.launchers import SideBySide


class JoblibLauncher(SideBySide):
    """``hydra/launcher=joblib``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(Joblib, settings)


class SubmititLocalLauncher(SideBySide):
    """``hydra/launcher=submitit_local``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(SubmititLocal, settings)


class SubmititSlurmLauncher(SideBySide):
    """``hydra/launcher=submitit_slurm``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(SubmititSlurm, settings)


class RayLauncher(SideBySide):
    """``hydra/launcher=ray``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(Ray, settings)


LAUNCHERS = (JoblibLauncher, SubmititLocalLauncher, SubmititSlurmLauncher, RayLauncher)
