"""Hydra's entry point, of ``python run.py`` and ``eraselab run`` alike; imports nothing heavy."""

import os
import sys

import hydra
from omegaconf import DictConfig

from experiments import CONFIG_FOLDER
from experiments.command.arguments import tidy_arguments
from experiments.command.errors import one_sentence, stop_on_sigterm
from experiments.command.plugins import take_plugins
from experiments.command.shorthands import spell_out


def run(config: DictConfig) -> str | None:
    """Run one job of the composed config; returns the path of its summary, None if it is one of a sweep and failed."""
    # Hydra would print more about an error that reaches it.
    with one_sentence():
        # Heavy imports wait until the command line is known to compose: --help and misspelt choices need none.
        from experiments.command.launch import launch  # noqa: PLC0415

        summary = launch(config)
        return None if summary is None else str(summary)


main = hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name="config")(run)


def command_line() -> None:
    """Run what the command line asks for; an error of the user's is one sentence and exit status 1."""
    # Hydra would print its own text for its errors; they are told in one sentence with all the others.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with one_sentence(), stop_on_sigterm():
        sys.argv[1:] = spell_out(tidy_arguments(take_plugins(sys.argv[1:])))
        main()
