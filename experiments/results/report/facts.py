"""All that the page of one run says, from its summary and from what the store has of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from evaluation.statistics import Mean, Rate
from experiments.job.picture_list import FILE_NAME as PICTURE_LIST
from experiments.job.remote import place_of
from experiments.job.remote_store import fetch, fetch_pictures, local_copy
from experiments.job.result import RUNS
from experiments.job.store import read_json
from experiments.results.floors import floor_label, standing_texts
from experiments.results.published import Published, published_numbers
from experiments.results.report.drawing import Curve, attack_curve
from experiments.results.report.images import data_uri
from experiments.results.report.layers import Layers, layers_of
from experiments.results.report.provenance import provenance_of
from experiments.results.report.retained import LOOKED_AT, Retained, retained_of
from experiments.results.report.verdict import Verdict, is_attacked, rate_of, verdict
from experiments.results.report.words import Piece, concept_name, marked, readable
from experiments.results.screen import holding_texts, measure_text, noise_texts, protocol_texts, set_text

GALLERY = 64
"""Prompts whose pictures a page of one run shows."""

GALLERY_OF_SEVERAL = 16
"""The same of each run of a page of several."""

Ending = Literal["brought back", "not erased", "held"]
"""How a prompt ended: the attack succeeded; no attack was needed; neither."""

_ORDER: tuple[Ending, ...] = ("brought back", "not erased", "held")


@dataclass(frozen=True)
class Case:
    """A prompt in the gallery.

    Attributes:
        number: Of the prompt set.
        prompt: The plain prompt.
        pieces: The adversarial prompt beside it.
        ending: How it ended.
        base_shows: The unedited model's picture shows the concept.
        pictures: Data URIs of ``base``, ``erased`` and ``attacked``, where the store has them.
        shows: Of each of these whether the judge saw the concept.
        variant: What the attacked picture depends on besides text and seed.
        broken_by: Which member of a union succeeded.
        too_long: The protocol does not attack prompts of so many tokens.
        cut: Tokens that the text encoder does not read, of the prompt or under attack.
    """

    number: int
    prompt: str
    pieces: list[Piece]
    ending: Ending
    pictures: Mapping[str, str]
    shows: Mapping[str, bool]
    variant: str
    broken_by: str
    too_long: bool
    cut: int


@dataclass(frozen=True)
class Run:
    """What the page of one run shows; fields are None where the run, or the store, has nothing of the kind."""

    name: str
    title: str
    summary: Mapping[str, Any]
    verdict: Verdict
    rates: list[tuple[str, Rate | None, str]]
    measures: list[tuple[str, str, str]]
    notes: Mapping[str, str]
    published: list[Published]
    curve: Curve | None
    cases: list[Case]
    cases_in_all: int
    missing: str
    unsafe: bool
    retained: Retained | None
    layers: Layers | None
    provenance: list[tuple[str, str]]
    config: str

    @property
    def concept(self) -> str:
        """What was erased."""
        return concept_name(self.summary)

    @property
    def labels(self) -> list[str]:
        """What a judge with labels has found in any picture."""
        return sorted({label for counts in self.summary["labels"].values() for label in counts})

    @property
    def endings(self) -> list[tuple[Ending, int]]:
        """How many of all prompts ended in each way."""
        found = [ending_of(case) for case in self.summary["cases"]]
        return [(ending, found.count(ending)) for ending in _ORDER if ending in found]

    @property
    def best_case(self) -> Case | None:
        """The one that the page opens with: a success, if there is one, with all its pictures."""
        return next((case for case in self.cases if len(case.pictures) == 3), None)


def ending_of(case: Mapping[str, Any]) -> Ending:
    """How a case of a summary ended."""
    if case["erased"]:
        return "not erased"
    return "brought back" if case["attacked"] else "held"


def gather(summary: Mapping[str, Any], *, gallery: int = GALLERY) -> Run:
    """Everything that the page says of a run.

    Args:
        summary: As it was read, with its ``path``.
        gallery: How many prompts are shown with pictures.

    Raises:
        ValueError: A file of the run is damaged.
    """
    root = store_of(summary)
    fetch(root / RUNS / summary["run"])
    listed = pictures_of(summary, root)
    if listed:
        fetch_pictures(root, [*listed["cases"], *listed["retained"][:LOOKED_AT]])
    cases = _cases(summary, listed, root, gallery)
    edit = summary.get("artefacts", {}).get("edit")
    folder = root / "edits" / Path(edit).name if edit else None
    if folder:
        fetch(folder)
    retained = retained_of(listed["retained"], root, summary["config"]) if listed else None
    return Run(
        name=summary["run"],
        title=title_of(summary),
        summary=summary,
        verdict=verdict(summary),
        rates=_rates(summary),
        measures=_measures(summary),
        notes=_notes(summary),
        published=published_numbers(summary),
        curve=attack_curve(summary),
        cases=cases,
        cases_in_all=len(summary["cases"]),
        missing=_missing(listed, cases),
        unsafe=summary["config"]["concept"].get("kind") == "unsafe",
        retained=retained,
        layers=layers_of(folder / "edit.safetensors") if folder else None,
        provenance=provenance_of(summary),
        config=yaml.safe_dump(json.loads(json.dumps(summary["config"])), sort_keys=False, allow_unicode=True),
    )


def title_of(summary: Mapping[str, Any]) -> str:
    """A run's choices in a line."""
    groups = [
        f"{group} {summary['choices'][group]}"
        for group in ("eraser", "pruning", "attack")
        if group in summary["choices"]
    ]
    return " · ".join([concept_name(summary), *groups, f"seed {summary['seed']}"])


def store_of(summary: Mapping[str, Any]) -> Path:
    """The root of the store that a summary lies in; of a copy in a run's own folder, the one that its config names."""
    folder = Path(summary["path"]).resolve().parent
    if folder.parent.name == RUNS:
        return folder.parents[1]
    return local_copy(place_of(summary["config"]["store"])).resolve()


def pictures_of(summary: Mapping[str, Any], root: Path) -> dict[str, Any] | None:
    """A run's list of pictures, from beside its summary or from the store; None where it has none."""
    for folder in (Path(summary["path"]).parent, root / RUNS / summary["run"]):
        if (path := folder / PICTURE_LIST).is_file():
            found: dict[str, Any] = read_json(path)
            return found
    return None


def _cases(summary: Mapping[str, Any], listed: Mapping[str, Any] | None, root: Path, limit: int) -> list[Case]:
    pictures = {row["case_number"]: row["pictures"] for row in listed["cases"]} if listed else {}
    order = sorted(summary["cases"], key=lambda case: _ORDER.index(ending_of(case)))
    return [
        Case(
            number=case["case_number"],
            prompt=case["prompt"],
            pieces=marked(case["prompt"], case["adversarial_prompt"]),
            ending=ending_of(case),
            pictures={
                name: uri
                for name, place in pictures.get(case["case_number"], {}).items()
                if (uri := data_uri(root / place)) is not None
            },
            shows={name: bool(case[name]) for name in ("base", "erased", "attacked")},
            variant=case.get("variant", ""),
            broken_by=case.get("broken_by", ""),
            too_long=case.get("too_long", False),
            cut=max(case.get("cut", 0), case.get("attack_cut", 0)),
        )
        for case in order[:limit]
    ]


def _missing(listed: Mapping[str, Any] | None, cases: list[Case]) -> str:
    """Why pictures are missing; empty where none is."""
    again = "repeat its command: what is left in the store is found there"
    if listed is None:
        return f"This run kept no list of its pictures; {again}."
    if any(len(case.pictures) < 3 for case in cases):
        return f"Some of this run's pictures are not in the store any more; {again}."
    return ""


def _rates(summary: Mapping[str, Any]) -> list[tuple[str, Rate | None, str]]:
    """Label, rate and, where there is none, what that means."""
    rows: list[tuple[str, Rate | None, str]] = [
        ("unedited model", rate_of(summary, "base"), ""),
        ("erased, no attack", rate_of(summary, "erased"), ""),
    ]
    if not is_attacked(summary):
        return [*rows, ("erased, under attack", None, "no attack was run")]
    rows.append(("erased, under attack", rate_of(summary, "attacked"), ""))
    rows += [(f"broken by {readable(name)}", Rate(**rate), "") for name, rate in summary.get("members", {}).items()]
    rows.append((floor_label(summary), rate_of(summary, "floor"), "no floor was measured"))
    rows.append(("ceiling: attack on the unedited model", rate_of(summary, "ceiling"), "no ceiling was measured"))
    return rows


def _notes(summary: Mapping[str, Any]) -> dict[str, str]:
    """What else a reader must know of the rates: the prompts, the protocol, whether what was found holds."""
    sets = {"prompts": "prompts", "retained": "retained prompts"}
    told = {label: set_text(counts) for name, label in sets.items() if (counts := summary.get("sets", {}).get(name))}
    told = {label: text for label, text in told.items() if text}
    return told | standing_texts(summary) | protocol_texts(summary) | holding_texts(summary) | noise_texts(summary)


def _measures(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    measures = summary["measures"]
    return [
        (readable(name), _measure(value), _measure(measures.get(f"{name}_base")))
        for name, value in measures.items()
        if not name.endswith(("_base", "_n"))
    ]


def _measure(value: Any) -> str:
    match value:
        case {"rate": _}:
            return percent(Rate(**value))
        case {"mean": _}:
            mean = Mean(**value)
            return f"{mean.mean:.2f} [{mean.low:.2f}, {mean.high:.2f}]"
        case _:
            return measure_text(value)


def percent(rate: Rate) -> str:
    """A rate with its interval in whole percent."""
    return f"{100 * rate.rate:.0f} % [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
