"""``plugins=PATH``: erasers, attacks, judges and the like of others, with their YAML files, beside the project's.

A plugin is a Python file, a folder of them, or a package; the choices lie in its folder ``conf``, one folder for each
group as in the project's. Imports nothing heavy, and no plugin.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from diffusion.plugins import declare, declared_plugins
from experiments import CONFIG_FOLDER
from experiments.command.errors import CommandError
from hydra_plugins.eraselab.launchers import LAUNCHERS

_ARGUMENT = "plugins="


class PluginChoices(SearchPathPlugin):
    """Lets Hydra look for choices in the ``conf`` folders of plugins, after the project's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """See :class:`SearchPathPlugin`."""
        for folder in choice_folders():
            search_path.append("plugin", f"file://{folder}")


def take_plugins(arguments: Sequence[str]) -> list[str]:
    """Declare what ``plugins=...`` names among ``arguments``; the others are returned.

    Its value is a path or the name of a package that can be imported, or several with commas between. Processes that
    this one starts find them too.

    Raises:
        CommandError: There is no such plugin, or one of its choices has the name of one of the project's.
    """
    for argument in arguments:
        if argument.startswith(_ARGUMENT):
            for value in argument.removeprefix(_ARGUMENT).strip("[]").split(","):
                _take(value.strip(" '\""))
    # Hydra itself would find the launchers in the working folder alone.
    for own in (PluginChoices, *LAUNCHERS):
        Plugins.instance().register(own)
    for folder in choice_folders():
        for file in folder.rglob("*.yaml"):
            if (CONFIG_FOLDER / (choice := file.relative_to(folder))).exists():
                raise CommandError(
                    f"{file} has the name of a choice of this project ({choice.parent}={choice.stem}); "
                    "name it otherwise."
                )
    return [argument for argument in arguments if not argument.startswith(_ARGUMENT)]


def choice_folders() -> list[Path]:
    """The ``conf`` folders of all plugins."""
    folders = (folder / "conf" for name in declared_plugins() for folder in _homes(name))
    return list(dict.fromkeys(folder for folder in folders if folder.is_dir() and folder != CONFIG_FOLDER))


def choice_files(group: str) -> dict[str, Path]:
    """The YAML files of a group's choices by name, the project's and those of plugins."""
    folders = [folder / group for folder in (CONFIG_FOLDER, *choice_folders())]
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in folders
        for path in sorted(folder.rglob("*.yaml"))
    }


def _homes(name: str) -> Iterator[Path]:
    """Where a plugin's files lie; nothing for one that is not there."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return
    if spec is not None and spec.submodule_search_locations:
        yield from map(Path, spec.submodule_search_locations)
    elif spec is not None and spec.origin:
        yield Path(spec.origin).parent


def _take(value: str) -> None:
    path = Path(value).expanduser().absolute()
    if path.suffix == ".py" and path.is_file():
        home, names = path.parent, [path.stem]
    elif (path / "__init__.py").is_file():
        home, names = path.parent, [path.name]
    elif path.is_dir():
        packages = [file.parent.name for file in path.glob("*/__init__.py")]
        home, names = path, sorted({*packages, *(file.stem for file in path.glob("*.py"))})
    else:
        home, names = None, [value] if value.replace(".", "").isidentifier() and list(_homes(value)) else []
    if not names:
        raise CommandError(
            f"plugins={value} is no plugin; it must be a Python file, a folder with Python files, or a package that "
            "can be imported."
        )
    for name in names:
        if home is not None:
            _find_in(home)
            _require_own_name(name, home)
        declare(name)


def _find_in(home: Path) -> None:
    """Let this process and those that it starts import from ``home``."""
    if str(home) not in sys.path:
        sys.path.append(str(home))
        inherited = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{inherited}{os.pathsep}{home}" if inherited else str(home)


def _require_own_name(name: str, home: Path) -> None:
    found = list(_homes(name))
    if not name.isidentifier() or (found and not any(folder.is_relative_to(home) for folder in found)):
        raise CommandError(
            f"{home / name} cannot be imported under that name"
            + (f", which is that of {found[0]}" if found else "")
            + "; call it otherwise."
        )
