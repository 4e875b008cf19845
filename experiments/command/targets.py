"""A config names the classes that are made of it: which may be named.

A ``_target_`` is code: Hydra imports what it names and calls it. Configs travel (a run's ``config.yaml``, a preset from
elsewhere), so only classes of this project and of declared plugins are made; Hydra's own blocklist, of which there is
no end, is not relied on.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from hydra.utils import get_object

from diffusion.plugins import PLUGINS_GROUP, declared_plugins, is_of
from experiments.command.errors import CommandError
from experiments.command.kinds import why_not_found

ROOMS = ("attacks", "diffusion", "erasure", "evaluation", "experiments")
"""The project's packages."""


def require_known_targets(config: Any, key: str) -> None:
    """See to it that every ``_target_`` in ``config`` is a class of the project or of a declared plugin.

    Args:
        config: Plain values; those at ``key`` of the whole config.
        key: What errors call them.

    Raises:
        CommandError: One is not, or cannot be imported; the sentence says where the fault lies.
    """
    for place, target in _targets(config, key):
        known = (*ROOMS, *declared_plugins())
        if not isinstance(target, str) or not is_of(target, known):
            raise _refusal(place, target)
        if fault := why_not_found(target):
            raise CommandError(f"{place}._target_ is {target!r}, which cannot be imported: {fault}")
        found = get_object(target)
        # A module gives out what it has imported as well.
        if not isinstance(found, type) or not is_of(found.__module__, known):
            raise _refusal(place, target)


def _refusal(place: str, target: object) -> CommandError:
    return CommandError(
        f"{place}._target_ is {target!r}; it must be a class of {', '.join(ROOMS)}, or of a plugin that plugins=PATH "
        f"or an entry point of {PLUGINS_GROUP!r} declares."
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
