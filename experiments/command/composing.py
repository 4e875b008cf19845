"""The jobs of a command as Hydra composes them; imports nothing heavy."""

import copy
from collections.abc import Iterator

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict

from experiments.command.shorthands import spell_out


def sweep_jobs(config: DictConfig, config_name: str) -> Iterator[DictConfig]:
    """Compose every job of a multirun (Hydra's basic sweeper), in its order."""
    arguments = [f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items()]
    arguments += config.hydra.overrides.task
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides(spell_out(arguments))
    for batch in BasicSweeper.split_arguments(overrides, max_batch_size=None):
        for job_overrides in batch:
            yield compose(config_name, [*config.hydra.overrides.hydra, *job_overrides], return_hydra_config=True)


def plain_job(config: DictConfig) -> tuple[DictConfig, dict[str, str]]:
    """A job's own config and its choices, of one that Hydra composed together with its own settings."""
    choices = dict(config.hydra.runtime.choices)
    own = copy.deepcopy(config)
    with open_dict(own):
        del own["hydra"]
    return own, choices
