"""Packages and modules of others whose classes count as the project's own: who they are."""

import os
from functools import cache
from importlib.metadata import entry_points

PLUGINS_VARIABLE = "ERASELAB_PLUGINS"
"""Environment variable that declares packages or modules as plugins, by their names with commas between."""

PLUGINS_GROUP = "eraselab.plugins"
"""Entry points by which installed packages declare themselves."""


@cache
def installed_plugins() -> tuple[str, ...]:
    """Names of the installed packages that are plugins."""
    return tuple(sorted({entry.module for entry in entry_points(group=PLUGINS_GROUP)}))


def declared_plugins() -> tuple[str, ...]:
    """Names of all packages and modules that are plugins."""
    named = os.environ.get(PLUGINS_VARIABLE, "").split(",")
    return (*(name.strip() for name in named if name.strip()), *installed_plugins())


def declare(name: str) -> None:
    """Make a package or module a plugin in this process and in those that it starts."""
    if name not in declared_plugins():
        before = os.environ.get(PLUGINS_VARIABLE, "")
        os.environ[PLUGINS_VARIABLE] = f"{before},{name}" if before else name


def is_of(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a dotted name lies in one of ``packages``."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)
