"""``eraselab new``: the code, the YAML file and the test of a new method, from templates."""

import keyword
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from experiments import CONFIG_FOLDER
from experiments.command.errors import CommandError, unknown

HOMES: Mapping[str, str] = {
    "eraser": "erasure/erasers",
    "pruning": "erasure/pruning",
    "attack": "attacks",
    "judge": "evaluation/judges",
}
"""Where this project keeps the methods of each kind."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")


def write_method(kind: str, name: str, into: Path | None = None) -> list[Path]:
    """Write the three files of a method that runs as it stands.

    Args:
        kind: One of :data:`HOMES`.
        name: What choices call it: ``kind=name``.
        into: A folder for a plugin, made if need be; None for this project's own folders.

    Returns:
        The code, the YAML file and the test.

    Raises:
        CommandError: The name cannot be taken, a file is there already, or this is no checkout.
    """
    if kind not in HOMES:
        raise CommandError(unknown(kind, HOMES, what="is no kind of method; the kinds are"))
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise CommandError(f"{name!r} is no name for a method; take small letters, digits and _, as in my_method.")
    if (taken := CONFIG_FOLDER / kind / f"{name}.yaml").exists():
        raise CommandError(f"{kind}={name} is taken by {taken}; choose another name.")
    root, module = (into.expanduser().absolute(), name) if into is not None else (_checkout(), _own_module(kind, name))
    if into is not None and (spec := find_spec(name)) is not None and not str(spec.origin).startswith(str(root)):
        raise CommandError(f"{name} is the name of an installed module ({spec.origin}); choose another name.")
    class_name = "".join(part.capitalize() for part in name.split("_"))
    told = {
        "kind": kind,
        "name": name,
        "title": name.replace("_", " ").capitalize(),
        "class_name": class_name,
        "target": f"{module}.{class_name}",
        "outside": into is not None,
    }
    written = {
        f"{kind}.py.jinja": root / f"{module.replace('.', '/')}.py",
        f"{kind}.yaml.jinja": (root if into is not None else CONFIG_FOLDER.parent) / "conf" / kind / f"{name}.yaml",
        "test.py.jinja": root / "tests" / f"test_{name}.py",
    }
    for path in written.values():
        if path.exists():
            raise CommandError(f"{path} is there already; choose another name, or delete it.")
    templates = Environment(
        loader=PackageLoader(__package__ or ""),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # what is written is code, of names that were checked
    )
    for template, path in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(templates.get_template(template).render(told), encoding="utf-8")
    return list(written.values())


def _own_module(kind: str, name: str) -> str:
    return f"{HOMES[kind].replace('/', '.')}.{name}"


def _checkout() -> Path:
    root = CONFIG_FOLDER.parent
    if not all((root / each).is_dir() for each in ("tests", *HOMES.values())):
        raise CommandError(f"{root} is no checkout of this project; name a folder of your own with --into FOLDER.")
    return root
