"""The jobs of a command as Hydra composes them; imports nothing heavy."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments import CONFIG_FOLDER
from experiments.command.arguments import tidy_arguments
from experiments.command.errors import CommandError, explain
from experiments.command.shorthands import spell_out, spell_out_params


def sweep_jobs(config: DictConfig, config_name: str) -> Iterator[DictConfig]:
    """Compose every job of a multirun (Hydra's basic sweeper), in its order.

    Raises:
        CommandError: A job cannot be composed, and the sentence says which; or there is none.
    """
    jobs = job_overrides(config)
    for number, overrides in enumerate(jobs, start=1):
        with told_apart(number, jobs):
            yield compose(config_name, [*typed(config.hydra.overrides.hydra), *overrides], return_hydra_config=True)


def job_overrides(config: DictConfig) -> list[list[str]]:
    """What each job of a multirun is told, in their order; none is composed.

    Raises:
        CommandError: There is no job.
    """
    arguments = [f"{key}={values}" for key, values in swept_by_preset(config).items()]
    arguments += typed(config.hydra.overrides.task)
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides(spell_out(arguments))
    for override in overrides:
        if override.is_sweep_override() and not any(True for _ in override.sweep_iterator()):
            raise CommandError(f"{override.input_line} has no values, so there is no job to run; give it at least one.")
    return [list(job) for batch in BasicSweeper.split_arguments(overrides, max_batch_size=None) for job in batch]


def typed(overrides: Sequence[str]) -> list[str]:
    """One of the lists of ``hydra.overrides`` as it was typed; taken item by item, ``${...}`` in it is resolved."""
    told: Any = OmegaConf.to_container(overrides, resolve=False)
    return list(told)


def swept_by_preset(config: DictConfig) -> dict[str, str]:
    """What a preset sweeps over and the command line does not name, in Hydra's words.

    Hydra would sweep over both, and do jobs twice.
    """
    told = typed(config.hydra.overrides.task)
    named = {override.lstrip("+~").partition("=")[0] for override in told}
    params = {key: str(values) for key, values in (config.hydra.sweeper.params or {}).items() if key not in named}
    return spell_out_params(params, told)


@contextmanager
def told_apart(number: int, jobs: Sequence[Sequence[str]]) -> Iterator[None]:
    """Say of an error of the user's which of several ``jobs``, given by their overrides, it belongs to.

    A field that only some choices of a swept group have is refused with what to do instead.
    """
    try:
        yield
    except Exception as error:
        sentence = explain(error)
        if sentence is None or len(jobs) == 1:
            raise
        overrides = jobs[number - 1]
        swept = {override for override in overrides if any(override not in other for other in jobs)}
        groups = {override.partition("=")[0] for override in swept}
        fields = (override.lstrip("+~").partition("=")[0] for override in overrides)
        field = next((field for field in fields if "." in field and field.partition(".")[0] in groups), "")
        group = field.partition(".")[0]
        apart = f" Not every choice of {group} takes {field}: sweep those that do in a command of their own."
        where = f"Job {number} of {len(jobs)} ({' '.join(overrides)})"
        raise CommandError(f"{where}: {sentence}{apart if field and field in sentence else ''}") from error


def compose_job(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """The config and the choices of one job, from what is typed after ``run``."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return plain_job(compose("config", spell_out(tidy_arguments(overrides)), return_hydra_config=True))


def plain_job(config: DictConfig) -> tuple[DictConfig, dict[str, str]]:
    """A job's own config and its choices, of one that Hydra composed together with its own settings."""
    choices = dict(config.hydra.runtime.choices)
    own = copy.deepcopy(config)
    with open_dict(own):
        del own["hydra"]
    return own, choices
