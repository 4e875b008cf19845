"""What a choice's fields mean, read from its YAML file and from the class that it names."""

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import annotated_types
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf
from pydantic.fields import FieldInfo

from experiments import CONFIG_FOLDER
from experiments.command.errors import CommandError, unknown
from experiments.command.plugins import choice_files, choice_folders

_TARGET = "_target_"
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Note|Notes|Examples?):$")
_ENTRY = re.compile(r"^(?P<names>\w+(?:, \w+)*): ?(?P<text>.*)$")
_FIT = re.compile(r"\$\{fit:(?P<inside>.*)\}", re.DOTALL)
_PLAIN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    type(None): "null",
}
_OF_THE_CONFIG = {
    "preset": "Which of the presets the settings are taken from; null for those that fit the model.",
    "family": "What the settings of methods are fitted to; by default what the folder says.",
    "presets": "What preset may be, and whose settings that are.",
}


@dataclass(frozen=True)
class Field:
    """A field of a choice.

    Attributes:
        name: Its dotted name within the choice.
        default: What the YAML file gives it, or the class.
        meaning: From the class's docstring.
        allowed: From the type annotation; empty if there is none.
        source: The comment in the YAML file.
        typed: How it is set on the command line.
    """

    name: str
    default: str
    meaning: str
    allowed: str
    source: str
    typed: str


@dataclass(frozen=True)
class Explained:
    """A choice of a group.

    Attributes:
        choice: As typed: ``eraser=esd``.
        comment: What its YAML file says of itself.
        target: The class, where there is one.
        about: The class's docstring up to its first section.
        fields: In the order of the file, then those that the class alone has.
    """

    choice: str
    comment: str
    target: str
    about: str
    fields: list[Field] = field(default_factory=list)


def groups() -> list[str]:
    """The groups of choices."""
    return sorted(path.name for path in CONFIG_FOLDER.iterdir() if path.is_dir() and path.name != "hydra")


def choices(group: str) -> dict[str, str]:
    """The choices of a group, with the first sentence that each file says of itself.

    Raises:
        CommandError: There is no such group.
    """
    headings = {name: " ".join(_Comments.of(path).heading.split()) for name, path in _files(group).items()}
    return {name: re.split(r"(?<=\.)\s(?=[A-Z])", heading)[0] for name, heading in headings.items()}


def _files(group: str) -> dict[str, Path]:
    if group not in groups():
        raise CommandError(unknown(group, groups(), what="is no group of choices; they are"))
    return choice_files(group)


def explain_choice(choice: str) -> Explained:
    """Every field of a choice.

    Args:
        choice: As ``eraser=esd``.

    Raises:
        CommandError: There is no such choice.
    """
    group, _, name = choice.partition("=")
    known = _files(group)
    if name not in known:
        raise CommandError(unknown(choice, known, what="is unknown; it must be one of"))
    comments = _Comments.of(known[name])
    config: Any = comments.values
    prefix: tuple[str, ...] = ()
    if comments.is_global:
        prefix, config = (group,), config.get(group, {})
    target = str(config.get(_TARGET, "")) if isinstance(config, Mapping) else ""
    explained = Explained(choice, comments.heading, target, _about(_class_of(target)))
    explained.fields.extend(_fields(config, comments, prefix, "", group))
    return explained


def explain_job() -> Explained:
    """Every field of a job that belongs to no choice: ``seed``, ``prompts``, ``sampling.steps``, ..."""
    # Settings import what a job does.
    from experiments.job.settings import Settings  # noqa: PLC0415

    comments = _Comments.of(CONFIG_FOLDER / "config.yaml")
    own = {key: value for key, value in comments.values.items() if key not in {"defaults", "hydra"}}
    explained = Explained("job", "What a job needs besides its choices.", "", "")
    explained.fields.extend(_fields(own, comments, (), "", "", Settings))
    return explained


def _fields(
    config: Mapping[str, Any],
    comments: "_Comments",
    path: tuple[str, ...],
    name: str,
    group: str,
    settings: type | None = None,
) -> Iterator[Field]:
    """The fields of a choice, or of a class whose fields are the ``settings`` of the job itself."""
    found = settings or _class_of(str(config.get(_TARGET, "")))
    meanings, types_ = _meanings(found), _types(found)
    prefix = f"{group}." if group else ""
    for key, value in config.items():
        if key in {_TARGET, "defaults"}:
            continue
        own, dotted = (*path, key), f"{name}{key}"
        if isinstance(value, Mapping) and (_TARGET in value or found is None or settings is not None):
            inner = types_.get(key) if settings is not None and _TARGET not in value else None
            yield from _fields(value, comments, own, f"{dotted}.", group, inner)
            continue
        meaning = meanings.get(key) or _OF_THE_CONFIG.get(key, "")
        allowed = allowed_values(types_[key]) if key in types_ else ""
        if key == "preset" and isinstance(config.get("presets"), Mapping):
            allowed = f"null, {', '.join(map(str, config['presets']))}, or a kind: style, object, unsafe"
        yield Field(dotted, _shown(value), meaning, allowed, comments.by_path.get(own, ""), f"{prefix}{dotted}=")
    for own_field in _own_fields(found):
        if own_field.name not in config:
            yield Field(
                f"{name}{own_field.name}",
                _default(own_field),
                meanings.get(own_field.name, ""),
                allowed_values(types_[own_field.name]),
                "the class's default",
                f"+{prefix}{name}{own_field.name}=",
            )


def allowed_values(annotation: Any) -> str:  # noqa: PLR0911 - one case per kind of type
    """What a type annotation lets a field be, in words.

    >>> allowed_values(typing.Annotated[int, annotated_types.Ge(1)] | None)
    'a whole number, 1 or more; or null'
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _bounded(allowed_values(inner[0]), inner[1:])
    if origin in {typing.Union, types.UnionType}:
        return "; or ".join(dict.fromkeys(map(allowed_values, inner)))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in {tuple, list} or getattr(origin, "__name__", "") == "Sequence":
        of = [part for part in inner if part is not Ellipsis]
        return f"a list, each {allowed_values(of[0])}" if of else "a list"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"fields, each {allowed_values(inner[-1])}"
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if isinstance(annotation, type):
        return f"fields of {annotation.__name__}" if dataclasses.is_dataclass(annotation) else annotation.__name__
    return str(annotation)


def _bounded(text: str, metadata: Sequence[Any]) -> str:
    bounds: list[str] = []
    for constraint in metadata:
        for each in constraint.metadata if isinstance(constraint, FieldInfo) else [constraint]:
            match each:
                case annotated_types.Ge(bound):
                    bounds.append(f"{bound} or more")
                case annotated_types.Gt(bound):
                    bounds.append(f"more than {bound}")
                case annotated_types.Le(bound):
                    bounds.append(f"{bound} or less")
                case annotated_types.Lt(bound):
                    bounds.append(f"less than {bound}")
                case annotated_types.MinLen(length):
                    text, bounds = _lengthy(text, bounds, f"{length} or more", "not empty" if length == 1 else "")
                case annotated_types.MaxLen(length):
                    text, bounds = _lengthy(text, bounds, f"{length} or fewer", "")
    return ", ".join([text, *bounds])


def _lengthy(text: str, bounds: list[str], length: str, of_a_text: str) -> tuple[str, list[str]]:
    """The words for a length: of a list behind its name, of a text at the end."""
    if text.startswith("a list"):
        return text.replace("a list", f"a list of {length}", 1), bounds
    return text, [*bounds, of_a_text or f"{length} characters"]


def _class_of(target: str) -> type | None:
    if not target:
        return None
    try:
        found = get_object(target)
    except ImportError as error:
        raise CommandError(f"{target} cannot be imported: {error}") from error
    return found if isinstance(found, type) else None


def _types(found: type | None) -> dict[str, Any]:
    return {} if found is None else typing.get_type_hints(found, include_extras=True)


def _own_fields(found: type | None) -> Sequence[Any]:
    if found is None or not dataclasses.is_dataclass(found):
        return ()
    return [each for each in dataclasses.fields(found) if each.init and not each.name.startswith("_")]


def _default(own: Any) -> str:
    if own.default is not dataclasses.MISSING:
        value = own.default.default if isinstance(own.default, FieldInfo) else own.default
        return _shown(value)
    if own.default_factory is not dataclasses.MISSING:
        return _shown(own.default_factory())
    return "to be given"


def _about(found: type | None) -> str:
    lines = inspect.cleandoc(found.__doc__ or "").splitlines() if found else []
    end = next((n for n, line in enumerate(lines) if line == "Attributes:" or _SECTION.match(line)), len(lines))
    return _plain("\n".join(lines[:end]).strip())


def _meanings(found: type | None) -> dict[str, str]:
    """What the Attributes sections of a class and its bases say, by field."""
    meanings: dict[str, str] = {}
    for base in reversed(found.__mro__ if found else ()):
        meanings |= _attributes(inspect.cleandoc(vars(base).get("__doc__") or ""))
    return meanings


def _attributes(docstring: str) -> dict[str, str]:
    _, heading, rest = docstring.partition("\nAttributes:\n")
    lines = []
    for line in rest.splitlines() if heading else ():
        if line and not line.startswith(" "):
            break
        lines.append(line)
    meanings: dict[str, list[str]] = {}
    names: list[str] = []
    for line in textwrap.dedent("\n".join(lines)).splitlines():
        entry = _ENTRY.match(line)
        if entry:
            names = entry["names"].split(", ")
            meanings |= {name: [entry["text"]] for name in names}
        else:
            for name in names:
                meanings[name].append(line.strip())
    return {name: _plain(" ".join(part for part in parts if part)) for name, parts in meanings.items()}


def _plain(text: str) -> str:
    """A docstring's text without its markup."""
    return re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", "")


def _shown(value: Any) -> str:  # noqa: PLR0911 - one case per kind of value
    """A default as one reads it: of fitted settings the published value first, then what others take."""
    if isinstance(value, str):
        if value == "???":
            return "to be given"
        if fit := _FIT.fullmatch(value):
            published, exceptions = yaml.safe_load(f"[{fit['inside']}]")
            others = ", ".join(f"{words}: {_shown(other)}" for words, other in exceptions.items())
            return f"{_shown(published)} ({others})"
        return value or "''"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value)


@dataclass(frozen=True)
class _Comments:
    """A YAML file with its comments.

    Attributes:
        values: What it holds.
        heading: The comment above its first field.
        by_path: The comment of each field, behind it or above it.
        is_global: Whether its fields are the whole config's.
    """

    values: Any
    heading: str
    by_path: dict[tuple[str, ...], str]
    is_global: bool

    @classmethod
    def of(cls, path: Path) -> "_Comments":
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        ends: dict[int, int] = {}
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if token.end_mark.column and not isinstance(token, yaml.StreamEndToken | yaml.BlockEndToken):
                ends[token.end_mark.line] = max(ends.get(token.end_mark.line, 0), token.end_mark.column)
        behind = {
            number: lines[number][end:].strip().removeprefix("#").strip()
            for number, end in ends.items()
            if lines[number][end:].strip().startswith("#")
        }
        alone = {n: line.strip().lstrip("#").strip() for n, line in enumerate(lines) if line.strip().startswith("#")}
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        first = root.start_mark.line if root is not None else len(lines)
        heading = [told for number, told in alone.items() if number < first and not told.startswith("@package")]
        by_path: dict[tuple[str, ...], str] = {}
        for own, start, end in _places(root, ()):
            above: list[str] = []
            number = start - 1
            while number in alone and number >= first:
                above.insert(0, alone[number])
                number -= 1
            by_path[own] = " ".join([*above, *(behind[n] for n in range(start, end + 1) if n in behind)])
        values = yaml.safe_load(text) or {}
        for parent in values.get("defaults", ()):
            # Others, as /judge: canvas, are choices of other groups.
            inherited = choice_files(_group_of(path)).get(parent) if isinstance(parent, str) else None
            if inherited is not None and inherited != path:
                told = cls.of(inherited)
                values = OmegaConf.to_container(OmegaConf.merge(told.values, values))
                by_path = {own: by_path.get(own) or told.by_path.get(own, "") for own in [*told.by_path, *by_path]}
        return cls(values, "\n".join(heading), by_path, "@package _global_" in alone.values())


def _group_of(path: Path) -> str:
    root = next(root for root in (CONFIG_FOLDER, *choice_folders()) if path.is_relative_to(root))
    return path.relative_to(root).parts[0]


def _places(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """Every field of a YAML mapping with its first line and the last one that is its own."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        own = (*path, str(key.value))
        nested = isinstance(value, yaml.CollectionNode) and not value.flow_style
        end = (
            key.end_mark.line if nested else max(key.end_mark.line, value.end_mark.line - (value.end_mark.column == 0))
        )
        yield own, key.start_mark.line, end
        yield from _places(value, own)
