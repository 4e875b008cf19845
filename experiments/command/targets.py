"""A config names the classes that are made of it: which may be named.

A ``_target_`` is code: Hydra imports what it names and calls it. Configs travel (a run's ``config.yaml``, a preset from
elsewhere), so only classes of this project and of declared plugins are made; Hydra's own blocklist, of which there is
no end, is not relied on.
"""

import os
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from hydra.utils import get_object

from experiments.command.errors import CommandError

ROOMS = ("attacks", "diffusion", "erasure", "evaluation", "experiments")
"""The project's packages."""

PLUGINS_VARIABLE = "ERASELAB_PLUGINS"
"""Environment variable that declares packages or modules as plugins, by their names with commas between."""

PLUGINS_GROUP = "eraselab.plugins"
"""Entry points by which installed packages declare themselves."""


def require_known_targets(config: Any, key: str) -> None:
    """See to it that every ``_target_`` in ``config`` is a class of the project or of a declared plugin.

    A name that cannot be imported is left to whoever makes the object.

    Args:
        config: Plain values; those at ``key`` of the whole config.
        key: What errors call them.

    Raises:
        CommandError: One is not.
    """
    for place, target in _targets(config, key):
        known = (*ROOMS, *declared_plugins())
        if not isinstance(target, str) or not _is_of(target, known):
            raise _refusal(place, target)
        try:
            found = get_object(target)
        except Exception:
            continue
        # A module gives out what it has imported as well.
        if not isinstance(found, type) or not _is_of(found.__module__, known):
            raise _refusal(place, target)


@cache
def installed_plugins() -> tuple[str, ...]:
    """Names of the installed packages that are plugins."""
    return tuple(sorted({entry.module for entry in entry_points(group=PLUGINS_GROUP)}))


def declared_plugins() -> tuple[str, ...]:
    """Names of packages and modules whose classes a config may name besides the project's."""
    named = os.environ.get(PLUGINS_VARIABLE, "").split(",")
    return (*(name.strip() for name in named if name.strip()), *installed_plugins())


def _is_of(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _refusal(place: str, target: object) -> CommandError:
    return CommandError(
        f"{place}._target_ is {target!r}; it must be a class of {', '.join(ROOMS)}, or of a plugin that "
        f"{PLUGINS_VARIABLE}=package or an entry point of {PLUGINS_GROUP!r} declares."
    )


def _targets(config: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every ``_target_`` in plain values, with its place."""
    if isinstance(config, Mapping):
        if "_target_" in config:
            yield key, config["_target_"]
        for name, value in config.items():
            yield from _targets(value, f"{key}.{name}")
    elif isinstance(config, list | tuple):
        for number, value in enumerate(config):
            yield from _targets(value, f"{key}[{number}]")
