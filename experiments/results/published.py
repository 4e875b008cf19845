"""Published numbers, which stand beside ours where a run follows the same protocol."""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

PUBLISHED = Path(__file__).with_name("published.csv")
"""One number a row. ``protocols`` are the presets that measure it; ``eraser``, ``pruning`` and ``attack`` are classes,
and ``settings`` fields of the config with their values: a run that has them all is of the published kind. ``prompts``
is how many the authors' set has. What is empty matches every run. ``doubt`` says what is to be doubted: papers that
disagree, rules that are not known."""

CONDITIONS = Path(__file__).with_name("published_conditions.yaml")
"""What they were measured with: judge, counting rule, sampler, attack settings, prompt set."""

SHOWN_SETTINGS = 2
"""How many other settings a line of text names."""

_GROUPS = ("eraser", "pruning", "attack")


@dataclass(frozen=True)
class Published:
    """A published number beside a run of ours.

    Attributes:
        metric: What it measures, as ``ASR``.
        value: As it was published, with its unit.
        method: What its authors call what they measured.
        model: The model that it was measured on, by the name of our choice.
        source: Where it stands.
        elsewhere: Where our run differs in model or prompts; empty if it does not.
        settings: Which settings of our run are others, each as ``attack.tokens 3 (theirs: 5)``.
        doubt: What speaks against the number itself; mostly empty.
    """

    metric: str
    value: str
    method: str
    model: str
    source: str
    elsewhere: str
    settings: tuple[str, ...]
    doubt: str = ""

    @property
    def differences(self) -> str:
        """What our run does otherwise; empty if it is comparable as far as is known."""
        return self._differences(self.settings)

    def __str__(self) -> str:
        shown = self.settings[:SHOWN_SETTINGS]
        if more := len(self.settings) - len(shown):
            shown = (*shown, f"{more} more")
        difference = f"; not comparable, as this run is {told}" if (told := self._differences(shown)) else ""
        doubt = f"; {self.doubt}" if self.doubt else ""
        return f"{self.value} ({self.method} on {self.model}{difference}{doubt})"

    def _differences(self, settings: tuple[str, ...]) -> str:
        return " and ".join(filter(None, [self.elsewhere, f"with {', '.join(settings)}" if settings else ""]))


def published_numbers(summary: Mapping[str, Any]) -> list[Published]:
    """What was published of the protocol, concept, eraser, pruning and attack of a run's summary."""
    run = summary.get("protocol")
    if not run:
        return []
    config = OmegaConf.create(dict(summary["config"]))
    numbers = []
    for row in _rows():
        wanted = [("concept", summary["concept"]), *((group, _class(summary, group)) for group in _GROUPS)]
        if (
            run["name"] in row["protocols"].split()
            and all(row[column] in {"", value} for column, value in wanted)
            and all(_has(config, setting) for setting in row["settings"].split())
        ):
            numbers.append(
                Published(
                    metric=row["metric"],
                    value=f"{row['value']} {row['unit']}".strip(),
                    method=row["method"],
                    model=row["model"],
                    source=row["source"],
                    elsewhere=_elsewhere(row, summary),
                    settings=tuple(_other_fields(row, summary, config)),
                    doubt=row["doubt"],
                )
            )
    return numbers


@cache
def _rows() -> list[dict[str, str]]:
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


@cache
def _conditions() -> list[dict[str, Any]]:
    conditions: list[dict[str, Any]] = yaml.safe_load(CONDITIONS.read_text(encoding="utf-8"))
    return conditions


def _elsewhere(row: Mapping[str, str], summary: Mapping[str, Any]) -> str:
    parts = []
    if row["model"] != summary["model"]:
        parts.append(f"on {summary['model']}")
    if row["prompts"] not in {"", str(summary["n"])}:
        parts.append(f"of {summary['n']} prompts, not {row['prompts']}")
    return " and ".join(parts)


def _other_fields(row: Mapping[str, str], summary: Mapping[str, Any], config: Any) -> Iterator[str]:
    """What a run has in place of what the number was measured with, as ``attack.tokens 3 (theirs: 5)``."""
    those = {
        "protocols": summary["protocol"]["name"],
        "metrics": row["metric"],
        "concepts": summary["concept"],
        "erasers": row["eraser"],
        "attacks": row["attack"],
        "sources": row["source"],
    }
    for condition in _conditions():
        if all(value in condition.get(name, [value]) for name, value in those.items()):
            for field, wanted in condition["fields"].items():
                found = OmegaConf.select(config, field)
                if found != wanted:
                    own, theirs = (_short(value) for value in (found, wanted))
                    yield f"{field.removesuffix('.source.sha256').removesuffix('._target_')} {own} (theirs: {theirs})"


def _short(value: Any) -> str:
    """A checksum by its beginning, a class without its module."""
    text = "none" if value is None else str(value)
    return text[:8] if len(text) == 64 else text.rpartition(".")[2] if text.count(".") > 1 else text


def _class(summary: Mapping[str, Any], group: str) -> str:
    return str(summary["config"][group]["_target_"]).rpartition(".")[2]


def _has(config: Any, setting: str) -> bool:
    """Whether a config has the value that ``setting`` says, as in ``eraser.safety_scale=5000``."""
    key, _, value = setting.partition("=")
    return bool(OmegaConf.select(config, key) == yaml.safe_load(value))
