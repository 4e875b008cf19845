"""What tables and figures call a run."""

from collections.abc import Mapping
from typing import Any

GROUPS = ("eraser", "pruning", "attack")
"""The choices that tables tell runs apart by."""


def names_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A run's concept and choices, by column."""
    return {"concept": summary["concept"]} | {group: summary["choices"].get(group, "") for group in GROUPS}


def model_name(summary: Mapping[str, Any]) -> str:
    """The erased model that a run attacked, in a few words."""
    names = names_of(summary)
    return f"{names['concept']}, {names['eraser']}, pruning {names['pruning']}, seed {summary['seed']}"


def method_name(summary: Mapping[str, Any]) -> str:
    """Eraser and pruning of a run in a few words."""
    names = names_of(summary)
    return names["eraser"] if names["pruning"] in {"", "off"} else f"{names['eraser']}, pruning {names['pruning']}"
