"""One clear sentence for whatever a command line got wrong; imports nothing heavy."""

import errno
import io
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError

from diffusion.disk import room_left, size_limit
from diffusion.files import in_short
from diffusion.plugins import declared_plugins, is_of
from diffusion.text_files import visible
from experiments import CONFIG_FOLDER

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

TERMINATED = 143
"""Exit status after SIGTERM."""

_ROOT = Path(__file__).resolve().parents[2]
_WANTED = {
    "int_parsing": "an integer",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "list_type": "a list",
    "path_type": "a path",
    "dict_type": "a group of fields",
    "dataclass_type": "a group of fields",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "{} or more"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "{} or less"),
    "less_than": ("lt", "less than {}"),
    "too_short": ("min_length", "a list of {} or more"),
    "too_long": ("max_length", "a list of {} or fewer"),
}


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The operating system's numbers for a full disk, a full quota and a file beyond the limit."""

_NO_MEMORY = re.compile(r"^MemoryError|OutOfMemoryError|not enough memory|can't allocate memory|can't start new thread")
"""How Python, PyTorch on the processor and on a GPU say that there is no memory left."""

_UNION_MEMBER = re.compile(r"int|float|str|bool|(literal|tuple)\[.*\]")


class VisibleFormatter(logging.Formatter):
    """Log lines in which a text from elsewhere, as a prompt, cannot tell the terminal anything."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`; only line breaks and tabs stay what they are."""
        return re.sub(r"[^\n\t]+", lambda text: visible(text[0]), super().format(record))


class CommandError(Exception):
    """What was asked for cannot be done; the message is one sentence that says why."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end, as by Slurm or a container's host."""


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Exit with one sentence on an error of the user's; let an unexpected one keep its traceback."""
    try:
        yield
    except Terminated:
        print("Stopped by SIGTERM; the same command continues where it stopped.", file=sys.stderr)
        sys.exit(TERMINATED)
    except KeyboardInterrupt:
        print("Interrupted; the same command continues where it stopped.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        log.debug("the whole story", exc_info=True)
        sys.exit(sentence)


def explain(error: BaseException) -> str | None:  # noqa: PLR0912 - one case per kind of error
    """The sentence for an error of the user's; None for what looks like a bug."""
    match error:
        case CommandError():
            sentence = str(error)
        case ValidationError():
            sentence = explain_validation(error)
        case MissingConfigException():
            sentence = _explain_missing_config(error)
        case InstantiationException():
            sentence = explain_instantiation(error, lambda key: ()) or str(error)
        case OverrideParseException():
            sentence = (
                f"{error.override!r} is no override; write group=choice or field=value, as in eraser=esd or "
                "eraser.steps=200 (quote what has commas or brackets)."
            )
        case HydraException():
            sentence = _explain_composition(error)
        case MissingMandatoryValue():
            sentence = f"{error.full_key} is missing; give it a value, as in {error.full_key}=..."
        case OmegaConfBaseException():
            reason = str(error).splitlines()[0]
            reason = reason.partition("raised while resolving interpolation: ")[2] or reason
            sentence = f"{error.full_key or 'The config'} cannot be resolved: {reason}."
        case ValueError() if str(error).startswith("Config group override must be"):
            sentence = "A group takes the name of one of its choices, as in eraser=esd; run.py --help lists them."
        case ValueError() if _raised_by_this_project(error):
            sentence = str(error)
        case OSError(strerror=str()):
            sentence = _explain_file(error)
        case OSError():
            sentence = str(error)
        case MemoryError() | RuntimeError() if _NO_MEMORY.search(f"{type(error).__name__}: {error}"):
            sentence = (
                f"There is not enough memory ({in_short(error)}); smaller batches need less (sampling.batch_size, "
                "attack.batch_size, eraser.batch_size, eraser.sampling_batch_size), and the same command continues "
                "where it stopped."
            )
        case _:
            return None
    return one_line(sentence)


def unknown(name: str, known: Iterable[str], *, what: str = "is unknown; it must be one of") -> str:
    """A sentence that lists what could have been meant instead of ``name``, with the nearest."""
    known = sorted(known)
    if not known:
        return f"{name} is unknown; there are no fields to set here."
    nearest = get_close_matches(name.rpartition(".")[2].rpartition("=")[2], known, n=1)
    guess = f" (did you mean {nearest[0]}?)" if nearest else ""
    return f"{name} {what} {', '.join(known)}{guess}."


def explain_validation(error: ValidationError, prefix: str = "", known: Iterable[str] = ()) -> str:
    """The first fault that pydantic found.

    Args:
        error: What pydantic raised.
        prefix: Where the object lies in the config, as in ``eraser``.
        known: Its fields.
    """
    fault = error.errors()[0]
    # Inside a union pydantic also names the member that it tried, as in ("trajectories", "int").
    location = [str(part) for part in fault["loc"] if not _UNION_MEMBER.fullmatch(str(part))]
    name = ".".join([*([prefix] if prefix else []), *location])
    value, kind = repr(fault["input"]), fault["type"]
    context: dict[str, Any] = fault.get("ctx", {})
    match kind:
        case "unexpected_keyword_argument" | "extra_forbidden":
            return unknown(name, known, what="is unknown; the fields are")
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{name} is missing; give it a value."
        case "value_error":
            return f"{name + ': ' if name else ''}{context['error']}"
        case "literal_error":
            wanted = f"one of {context['expected'].replace(' or ', ', ')}"
        case _ if kind in _BOUNDS:
            bound, wording = _BOUNDS[kind]
            wanted = wording.format(context[bound])
        case _ if kind in _WANTED:
            wanted = _WANTED[kind]
        case _:
            return f"{name} is {value}: {fault['msg']}."
    return f"{name} is {value}; it must be {wanted}."


def _explain_file(error: OSError) -> str:
    """The sentence for what the operating system says of a file, with the room that is left where it matters."""
    path, reason = error.filename or _open_file(error), error.strerror
    if error.errno not in _FULL:
        return f"{path or 'A file'} cannot be used: {reason}."
    room = f"files may have {limit}" if (limit := size_limit()) and error.errno == errno.EFBIG else ""
    room = room or room_left(Path(path or "."))
    told = f"{path or 'A file'} cannot be written: {reason}{f' ({room})' if room else ''}"
    return f"{told}; make room, and the same command continues where it stopped."


def _open_file(error: OSError) -> str:
    """The path of the file that a library was writing when the error arose, which Python leaves out; empty if none."""
    for frame, _ in reversed(list(walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(name := getattr(value, "name", None), str):
                return name
    return ""


def _explain_missing_config(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").partition("/")
    if error.options:
        nested = [f"{path.parent.name}/{path.stem}" for path in (CONFIG_FOLDER / group).glob("*/*.yaml")]
        # A union of attacks is no file.
        return unknown(f"{group}={choice}", [*(option for option in error.options if "+" not in option), *nested])
    return f"There is no config {error.missing_cfg_file!r}; run.py --help lists what there is."


def explain_instantiation(error: InstantiationException, fields: Callable[[str], Iterable[str]]) -> str | None:
    """Why Hydra could not make an object; ``fields`` names those of the object at a key of the config."""
    lines = str(error).splitlines()
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    cause = error.__cause__
    if isinstance(cause, ValidationError):
        return explain_validation(cause, key, fields(key))
    if isinstance(cause, (ValueError, OSError)):
        return f"{key + ': ' if key else ''}{cause}"
    if isinstance(cause, TypeError):
        return f"{key}: {cause}."
    return f"{key}: {lines[0]}" if cause is None else None


def _explain_composition(error: HydraException) -> str:
    cause, message = error.__cause__, str(error)
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        fields = [str(key) for key in (cause.parent_node or {}) if key not in {"hydra", "_target_"}]
        return unknown(cause.full_key, fields, what="is unknown; the fields are")
    if message.startswith("Ambiguous value for argument"):
        override = message.split("'")[1]
        return f"{override} lists several values; add -m to run them all, or write a list as [a,b]."
    return "; ".join(line.strip(" .") for line in message.splitlines() if line.strip(" .")) + "."


def _raised_by_this_project(error: BaseException) -> bool:
    """Our own ValueErrors and those of plugins are sentences for the user; those of libraries come from bugs."""
    innermost = list(walk_tb(error.__traceback__))[-1][0]
    if is_of(str(innermost.f_globals.get("__name__", "")), declared_plugins()):
        return True
    rooms = (_ROOT / room for room in ("attacks", "diffusion", "erasure", "evaluation", "experiments"))
    return any(Path(innermost.f_code.co_filename).is_relative_to(room) for room in rooms)


def one_line(text: str) -> str:
    """``text`` in one line that ends as a sentence does."""
    line = visible(" ".join(text.split()))
    return line if line.endswith((".", "?", ")")) else f"{line}."
