"""What an object of a config must be able to do, looked at when it is made; and why a class cannot be imported."""

import inspect
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

from experiments.command.errors import CommandError, unknown

METHODS: Mapping[str, tuple[str, ...]] = {
    "model": ("load",),
    "eraser": ("erase",),
    "pruning": ("prune",),
    "attack": ("run",),
    "judge": ("__call__",),
    "prompt_set": ("read",),
    "retained_set": ("read",),
}
"""By key of the config: what its object does."""

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "eraser": ("has_objective",),
    "pruning": ("needs_objective",),
    "attack": ("threat_model",),
}
"""By key of the config: what its object says of itself."""


def require_kind(name: str, made: Any) -> None:
    """See to it that what was made for the key ``name`` of the config is what that key takes.

    Raises:
        CommandError: Its YAML file names no class, or the class lacks something.
    """
    methods, attributes = METHODS.get(name, ()), ATTRIBUTES.get(name, ())
    if methods and isinstance(made, (dict, list)):
        raise CommandError(f"{name} has no _target_; its YAML file must name a class, as in _target_: module.Class.")
    for method in methods:
        # A class of its own would be called in place of its objects.
        if not callable(getattr(type(made), method, None)):
            raise CommandError(f"{name}: {where(type(made))} has no method {method}, which every {name} needs.")
    for attribute in attributes:
        if not hasattr(made, attribute):
            raise CommandError(f"{name}: {where(type(made))} does not say {attribute}, which every {name} must.")


def where(thing: Any) -> str:
    """The name of a class or function with its file and line."""
    try:
        return f"{thing.__name__} ({inspect.getsourcefile(thing)}, line {inspect.getsourcelines(thing)[1]})"
    except (OSError, TypeError):
        return str(thing.__name__)


def why_not_found(target: str) -> str:
    """Why the class of a dotted name cannot be imported: the true cause and where it lies; empty if it can."""
    found: Any = None
    parts = target.split(".")
    for number, part in enumerate(parts):
        name = ".".join(parts[: number + 1])
        if not isinstance(found, ModuleType) and found is not None:
            return f"{where(found)} has no {part}." if not hasattr(found, part) else ""
        if found is not None and hasattr(found, part):
            found = getattr(found, part)
            continue
        try:
            found = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                return told_with_line(error)
            if found is None:
                return f"there is no module {name}."
            own = [key for key, value in vars(found).items() if getattr(value, "__module__", "") == found.__name__]
            told = f"is not in {found.__file__ or found.__name__}"
            return unknown(part, own, what=f"{told}; there are") if own else f"{part} {told}."
        except Exception as error:
            return told_with_line(error)
    return ""


def told_with_line(error: Exception) -> str:
    """An error inside a module, with the last line that is not Python's own or a library's."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {kind}: {error.msg}."
    frames = [frame for frame in extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    own = [frame for frame in frames if not Path(frame.filename).is_relative_to(sys.base_prefix)]
    own = [frame for frame in own if "site-packages" not in frame.filename and frame.filename != __file__]
    place = f"{own[-1].filename}, line {own[-1].lineno}: " if own else ""
    return f"{place}{kind}: {error}."
