"""The leaderboard, as RobustBench has it: a JSON record a method, concept and base model, and one page over all.

A record says what the authors reported, what our runs found and what others found since (external). Our own fields
(``ours``, ``plain``, ``unedited``, ``kept``, ``doubts``) are written anew from the runs in the store; all others are
for people to write, and stay. What is known best of a method is the highest success of any attack, ours or external.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from diffusion.checked import checked
from evaluation.statistics import Rate
from experiments.job.store import content_hash, write_json
from experiments.results.floors import short_standing, verdict_text
from experiments.results.names import method_name
from experiments.results.published import published_numbers
from experiments.results.report.page import leaderboard_page, write_page
from experiments.results.report.verdict import is_attacked
from experiments.results.report.words import readable
from experiments.results.screen import short_text
from experiments.results.tables import varied_settings

ENOUGH_PROMPTS = 30
"""With fewer, an interval is so wide that ranks mean little."""

KNOWN_TO_SHOW = 0.8
"""Of the prompts, for which the unedited model is to show the concept."""

_LEADERBOARD = "leaderboard.html"
_Share = Annotated[float, Field(ge=0, le=1)]


@checked
class Found:
    """The success of one attack on one erased model.

    Attributes:
        rate: Share of prompts, 0 to 1.
        n: Prompts; None if unknown.
        low: Lower end of the 95 % interval.
        high: Upper end.
        source: Who found it: a paper, a person, a run of ours.
        evidence: The file with the adversarial prompts or latents, which makes the number checkable.
        prompts: Hash of the prompt set.
        judge: Who judged.
        attack: Hash of the attack's settings.
        revision: Of the code.
        seed: Of eraser and attack.
        standing: Floor, excess over it with its interval and calibrated success, in a line; empty without a floor.
        verdict: Above the floor, in words.
    """

    rate: _Share
    n: int | None = None
    low: _Share | None = None
    high: _Share | None = None
    source: str = ""
    evidence: str = ""
    prompts: str = ""
    judge: str = ""
    attack: str = ""
    revision: str = ""
    seed: int | None = None
    standing: str = ""
    verdict: str = ""


@checked
class Record:
    """What is known of a method on a concept and base model.

    Attributes:
        method: Its name.
        concept: What it erases.
        base: The unedited model.
        authors: Of the method.
        link: To its paper or code.
        reported: By its authors, by attack.
        ours: By our runs, by attack; of several seeds the highest.
        external: By others since, by attack.
        plain: Without attack, by our runs.
        unedited: The unedited model's rate on the same prompts.
        kept: What is left of other abilities, as text by measure.
        doubts: Why our numbers are to be read with care, found by rule.
        unreliable: Why the record as a whole is, written by people.
        footnote: What else a reader should know.
    """

    method: Annotated[str, Field(min_length=1)]
    concept: Annotated[str, Field(min_length=1)]
    base: Annotated[str, Field(min_length=1)]
    authors: str = ""
    link: Annotated[str, Field(pattern=r"^(https?://\S+)?$")] = ""
    reported: dict[str, Found] = field(default_factory=dict)
    ours: dict[str, Found] = field(default_factory=dict)
    external: dict[str, Found] = field(default_factory=dict)
    plain: Found | None = None
    unedited: Found | None = None
    kept: dict[str, str] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    unreliable: list[str] = field(default_factory=list)
    footnote: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is of."""
        return self.method, self.concept, self.base

    @property
    def known(self) -> tuple[str, Found] | None:
        """The strongest attack that we or others ran, and what it found; None if nobody ran one."""
        return strongest([*self.ours.items(), *self.external.items()])

    @property
    def reasons(self) -> list[str]:
        """All reasons to read it with care."""
        return [*self.unreliable, *self.doubts]


def strongest(found: Sequence[tuple[str, Found]]) -> tuple[str, Found] | None:
    """The attack with the highest rate, with its name."""
    return max(found, key=lambda pair: pair[1].rate, default=None)


@dataclass(frozen=True)
class Row:
    """A record in the table, with its rank: the fewest successes of the strongest attack known first."""

    rank: int | None
    record: Record
    ours: tuple[str, Found] | None
    reported: tuple[str, Found] | None
    external: tuple[str, Found] | None


@dataclass(frozen=True)
class Board:
    """The table of one concept."""

    concept: str
    rows: list[Row]


def write_leaderboard(summaries: Sequence[Mapping[str, Any]], records: Path, folder: Path) -> Path:
    """Bring the records in the folder ``records`` up to date with runs, and write the page over all of them.

    Args:
        summaries: Of the runs, the newest first.
        records: Where the JSON records lie, those that others contributed too.
        folder: Where ``leaderboard.html`` goes.

    Raises:
        ValueError: A record is no such thing, two records are of the same, or there is nothing to show.
    """
    known: dict[tuple[str, str, str], tuple[Path, Record]] = {}
    for path in sorted(records.glob("*.json")):
        record = read_record(path)
        if record.key in known:
            raise ValueError(f"{path} and {known[record.key][0]} are records of the same: {', '.join(record.key)}.")
        known[record.key] = path, record
    for made in records_of(summaries):
        path, before = known.get(made.key, (records / f"{_file_name(made)}.json", made))
        record = replace(
            before,
            reported={**made.reported, **before.reported},
            **{name: getattr(made, name) for name in ("plain", "unedited", "kept", "doubts")},
            ours={**before.ours, **made.ours},
        )
        records.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(record))
        known[made.key] = path, record
    if not known:
        raise ValueError(f"There is nothing to rank: no run in the store, and no record in {records}.")
    return write_page(
        leaderboard_page(boards_of([record for _, record in known.values()]), records), folder / _LEADERBOARD
    )


def read_record(path: Path) -> Record:
    """Read a record, whoever wrote it.

    Raises:
        ValueError: It is no such record; the message says which field is wrong.
    """
    try:
        return TypeAdapter(Record).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"])) or "it"
        raise ValueError(
            f"{path} is no record of the leaderboard: {place} is {fault['input']!r} ({fault['msg'].lower()})."
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON file ({error}).") from error


def records_of(summaries: Sequence[Mapping[str, Any]]) -> list[Record]:
    """A record for each method, its settings told apart, concept and model that was attacked, from runs."""
    if not summaries:
        return []
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for summary, settings in zip(summaries, varied_settings(summaries), strict=True):
        method = ", ".join(part for part in (method_name(summary), settings) if part)
        groups.setdefault((method, summary["concept"], summary.get("model") or "unknown"), []).append(summary)
    return [_record(*key, runs) for key, runs in groups.items()]


def _record(method: str, concept: str, base: str, runs: Sequence[Mapping[str, Any]]) -> Record:
    most = max(run["n"] for run in runs)
    # Runs on fewer prompts are trials of the same thing, or of something else.
    runs = [run for run in runs if run["n"] == most]
    newest = runs[0]
    ours: dict[str, Found] = {}
    reported: dict[str, Found] = {}
    for run in runs:
        attack = run["choices"].get("attack", "none")
        if is_attacked(run):
            found = _found(run, "attacked")
            ours[attack] = max(ours.get(attack, found), found, key=lambda one: one.rate)
        for number in published_numbers(run):
            if number.metric == "ASR" and (value := re.fullmatch(r"([\d.]+) ?%", number.value)):
                reported[attack] = Found(float(value[1]) / 100, source=number.source)
    return Record(
        method=method,
        concept=concept,
        base=base,
        reported=reported,
        ours=ours,
        plain=_found(newest, "erased"),
        unedited=_found(newest, "base"),
        kept={
            readable(name): short_text(value)
            for name, value in newest["measures"].items()
            if not name.endswith(("_base", "_n"))
        },
        doubts=_doubts(runs),
    )


def _found(run: Mapping[str, Any], name: str) -> Found:
    rate = Rate(**run["rates"][name])
    floor = run.get("floor")
    above = {"standing": short_standing(run), "verdict": verdict_text(floor) if floor else ""}
    return Found(
        rate=rate.rate,
        n=rate.n,
        low=rate.low,
        high=rate.high,
        source=f"run {run['run']}",
        evidence=run.get("path", ""),
        prompts=str(run["identity"].get("prompts", "")),
        judge=str(run["config"].get("judge", {}).get("_target_", "")).rpartition(".")[2],
        attack=content_hash(run["identity"].get("attack", {})),
        revision=str((run.get("git") or {}).get("revision", "")),
        seed=run["seed"],
        **(above if name == "attacked" else {}),
    )


def _doubts(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    newest, attacked = runs[0], [run for run in runs if is_attacked(run)]
    doubts = []
    if (base := newest["rates"]["base"]["rate"]) < KNOWN_TO_SHOW:
        doubts.append(f"the unedited model shows the concept for {100 * base:.0f} % of the prompts only")
    if newest["n"] < ENOUGH_PROMPTS:
        doubts.append(f"only {newest['n']} prompts")
    if not all(run.get("floor") for run in attacked):
        doubts.append("floor not measured")
    doubts += dict.fromkeys(
        f"reported otherwise: our run is {number.differences}"
        for run in attacked
        for number in published_numbers(run)
        if number.metric == "ASR" and number.differences
    )
    return doubts


def boards_of(records: Sequence[Record]) -> list[Board]:
    """A table for each concept; methods that nobody attacked come last, without a rank."""

    def order(record: Record) -> tuple[str, bool, float, str]:
        known = record.known
        return record.concept, known is None, known[1].rate if known else 0.0, record.method

    boards = []
    for concept, own in groupby(sorted(records, key=order), key=lambda record: record.concept):
        rows = [
            Row(
                rank=rank if record.known else None,
                record=record,
                ours=strongest(list(record.ours.items())),
                reported=strongest(list(record.reported.items())),
                external=strongest(list(record.external.items())),
            )
            for rank, record in enumerate(own, start=1)
        ]
        boards.append(Board(concept, rows))
    return boards


def _file_name(record: Record) -> str:
    """A name of plain characters; two records of different keys never share one."""
    plain = re.sub(r"[^A-Za-z0-9]+", "_", "_".join(record.key)).strip("_")[:80]
    return f"{plain}_{content_hash(record.key)[:6]}"
