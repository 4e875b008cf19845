"""Where a run's numbers come from, as names and texts."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_MACHINE = ("device", "cpu", "threads", "processes")


def provenance_of(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Everything that a summary says of its origin but for the config."""
    metadata = summary["edit"].get("metadata", {})
    identity = summary.get("identity", {})
    facts: list[tuple[str, Any]] = [
        ("run", summary["run"]),
        ("made", summary.get("created")),
        ("by revision", _revision(summary)),
        ("on", ", ".join(_machine(summary))),
        ("choices", _listed({group: name for group, name in summary["choices"].items() if "/" not in group})),
        ("model", summary.get("model")),
        ("seed", f"{summary['seed']} of eraser and attack; the prompt set has those of the pictures"),
        ("prompts", f"{summary['n']}{_hash(identity.get('prompts'))}"),
        ("retained prompts", _hash(identity.get("retained")).removeprefix(", ")),
        ("weights of the model", _nested(identity, "model", "weights")),
        ("edit", summary["edit"].get("hash")),
        ("edit's format and base", _listed({name: metadata[name] for name in ("base", "schema") if name in metadata})),
        *((f"artefact: {stage}", _artefact(path)) for stage, path in summary.get("artefacts", {}).items()),
        *_origins(summary),
        ("versions", _listed(summary.get("versions") or {})),
        ("summary", summary.get("path")),
    ]
    return [(name, str(text)) for name, text in facts if text not in {None, ""}]


def _revision(made: Mapping[str, Any]) -> str:
    if not (git := made.get("git")):
        return ""
    return f"{git['revision']}{' and changes that are in no revision' if git.get('dirty') else ''}"


def _machine(made: Mapping[str, Any]) -> Iterable[str]:
    for name in _MACHINE:
        if (value := made.get(name)) is not None:
            yield f"{value} {name}" if name in {"threads", "processes"} else str(value)


def _origins(summary: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Who made the artefacts of each stage, which may have been made before the run."""
    for stage, makers in summary.get("origins", {}).items():
        told = [", ".join(part for part in (_revision(made), *_machine(made)) if part) for made in makers if made]
        yield f"made by: {stage}", "; ".join(dict.fromkeys(told))


def _artefact(path: str) -> str:
    """Stage and hash, which say where in the store it lies."""
    return "/".join(Path(path).parts[-2:])


def _hash(digits: Any) -> str:
    return f", hash {digits}" if digits else ""


def _nested(data: Mapping[str, Any], *keys: str) -> Any:
    found: Any = data
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _listed(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in data.items())
