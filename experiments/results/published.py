"""Published numbers, which stand beside ours where a run follows the same protocol."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

PUBLISHED = Path(__file__).with_name("published.csv")
"""One number a row. ``protocols`` are the presets that measure it; ``eraser``, ``pruning`` and ``attack`` are classes,
and ``settings`` fields of the config with their values: a run that has them all is of the published kind. ``prompts``
is how many the authors' set has. What is empty matches every run."""


@dataclass(frozen=True)
class Published:
    """A published number beside a run of ours.

    Attributes:
        metric: What it measures, as ``ASR``.
        value: As it was published, with its unit.
        method: What its authors call what they measured.
        model: The model that it was measured on, by the name of our choice.
        source: Where it stands.
        differences: What our run does otherwise; empty if it is comparable as far as models and prompts go.
    """

    metric: str
    value: str
    method: str
    model: str
    source: str
    differences: str

    def __str__(self) -> str:
        doubt = f"; not comparable, as this run is {self.differences}" if self.differences else ""
        return f"{self.value} ({self.method} on {self.model}{doubt})"


def published_numbers(summary: Mapping[str, Any]) -> list[Published]:
    """What was published of the protocol, concept, eraser, pruning and attack of a run's summary."""
    run = summary.get("protocol")
    if not run:
        return []
    numbers = []
    for row in _rows():
        wanted = [("concept", summary["concept"]), *((group, _class(summary, group)) for group in _GROUPS)]
        if (
            run["name"] in row["protocols"].split()
            and all(row[column] in {"", value} for column, value in wanted)
            and all(_has(summary["config"], setting) for setting in row["settings"].split())
        ):
            value = f"{row['value']} {row['unit']}".strip()
            differences = _differences(row, summary)
            numbers.append(Published(row["metric"], value, row["method"], row["model"], row["source"], differences))
    return numbers


_GROUPS = ("eraser", "pruning", "attack")


@cache
def _rows() -> list[dict[str, str]]:
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def _differences(row: Mapping[str, str], summary: Mapping[str, Any]) -> str:
    parts = []
    if row["model"] != summary["model"]:
        parts.append(f"on {summary['model']}")
    if row["prompts"] not in {"", str(summary["n"])}:
        parts.append(f"of {summary['n']} prompts, not {row['prompts']}")
    return " and ".join(parts)


def _class(summary: Mapping[str, Any], group: str) -> str:
    return str(summary["config"][group]["_target_"]).rpartition(".")[2]


def _has(config: Mapping[str, Any], setting: str) -> bool:
    """Whether a config has the value that ``setting`` says, as in ``eraser.safety_scale=5000``."""
    key, _, value = setting.partition("=")
    return bool(OmegaConf.select(OmegaConf.create(dict(config)), key) == yaml.safe_load(value))
