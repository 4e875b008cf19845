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
and ``settings`` fields of the config with their values: a run that has them all is of the published kind. What is empty
matches every run."""


@dataclass(frozen=True)
class Published:
    """A published number beside a run of ours.

    Attributes:
        metric: What it measures, as ``ASR``.
        value: As it was published, with its unit.
        method: What its authors call what they measured.
        model: The model that it was measured on, by the name of our choice.
        run_model: The model of our run.
        source: Where it stands.
    """

    metric: str
    value: str
    method: str
    model: str
    run_model: str
    source: str

    @property
    def comparable(self) -> bool:
        """Whether our run is on the same model."""
        return self.model == self.run_model

    def __str__(self) -> str:
        doubt = "" if self.comparable else f"; not comparable, as this run is on {self.run_model}"
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
            parts = (row["metric"], value, row["method"], row["model"], summary["model"], row["source"])
            numbers.append(Published(*parts))
    return numbers


_GROUPS = ("eraser", "pruning", "attack")


@cache
def _rows() -> list[dict[str, str]]:
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def _class(summary: Mapping[str, Any], group: str) -> str:
    return str(summary["config"][group]["_target_"]).rpartition(".")[2]


def _has(config: Mapping[str, Any], setting: str) -> bool:
    """Whether a config has the value that ``setting`` says, as in ``eraser.safety_scale=5000``."""
    key, _, value = setting.partition("=")
    return bool(OmegaConf.select(OmegaConf.create(dict(config)), key) == yaml.safe_load(value))
