"""A command line as people type it becomes one that Hydra's grammar reads; imports nothing heavy."""

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from experiments.command.errors import CommandError, one_line

_OVERRIDE = re.compile(r"(?P<key>[+~]{0,2}[\w./@:$-]+)=(?P<value>.*)", re.DOTALL)
_FLAGS_OF_SWEEPS = frozenset({"-m", "--multirun"})


def tidy_arguments(arguments: Sequence[str]) -> list[str]:
    """Flags first and overrides after them, the one order that Hydra's parser takes, their values quoted if need be.

    Raises:
        CommandError: There is no such flag, or it lacks its value.
    """
    tidy = sorted(arguments, key=_is_override)
    captured = io.StringIO()
    try:
        with redirect_stderr(captured):
            get_args_parser().parse_args(tidy)
    except SystemExit as exit_:
        if exit_.code:
            _, _, reason = captured.getvalue().rpartition("error: ")
            raise CommandError(one_line(f"{reason.strip()}; run.py --hydra-help lists the flags")) from exit_
        raise
    sweeps = not _FLAGS_OF_SWEEPS.isdisjoint(tidy)
    readable = [argument if argument.startswith("-") else quoted(argument, sweeps=sweeps) for argument in tidy]
    return _left_to_the_jobs(readable) if sweeps else readable


def _left_to_the_jobs(arguments: Sequence[str]) -> list[str]:
    """Fields of a swept group are set in each job: Hydra would set them in the group's default choice first."""
    parsed = [_OVERRIDE.fullmatch(argument) for argument in arguments]
    swept = {parts["key"] for parts in parsed if parts and is_sweep(parts[0])}
    return [
        f"{parts['key']}=choice({parts['value']})"
        if parts and parts["key"].lstrip("+").partition(".")[0] in swept and not is_sweep(parts[0])
        else argument
        for argument, parts in zip(arguments, parsed, strict=True)
    ]


def is_sweep(override: str) -> bool:
    """Whether an override gives several values."""
    return _is_read(override) and OverridesParser.create().parse_override(override).is_sweep_override()


def _is_override(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def quoted(override: str, *, sweeps: bool = False) -> str:
    """``field=value`` with as many quotes as Hydra needs to read the value as it stands, and ``~`` expanded.

    A value that Hydra's grammar reads is left as it is, unless it is the name of a file.

    Args:
        override: As typed.
        sweeps: Commas part the values of a sweep.

    >>> quoted("eraser.path=epoch=05.ckpt")
    "eraser.path='epoch=05.ckpt'"
    >>> quoted("eraser.steps=20")
    'eraser.steps=20'
    """
    if (parts := _OVERRIDE.fullmatch(override)) is None:
        return override
    key, value = parts["key"], parts["value"]
    if value == "~" or value.startswith("~/"):
        value = str(Path(value).expanduser())
    if (_is_read(f"{key}={value}") and not _names_a_file(value)) or key == "attack":
        # Lists of attacks, which have a grammar of their own, are read elsewhere.
        return f"{key}={value}"
    if value.startswith("[") and value.endswith("]"):
        return f"{key}=[{','.join(_each_quoted(value[1:-1]))}]"
    if sweeps and not _names_a_file(value):
        return f"{key}={','.join(_each_quoted(value))}"
    return f"{key}={_quote(value)}"


def _each_quoted(values: str) -> list[str]:
    return [part if _is_read(f"value={part}") else _quote(part) for part in map(str.strip, values.split(","))]


def _quote(value: str) -> str:
    # Hydra reads a backslash as such, but before a quote.
    escaped = re.sub(r"(\\*)'", lambda found: 2 * found[1] + "\\'", value)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{trailing * chr(92)}'"


def _is_read(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _names_a_file(value: str) -> bool:
    try:
        return not value.isalnum() and any(sign in value for sign in ",(){}'\"") and Path(value).exists()
    except (OSError, ValueError):
        return False
