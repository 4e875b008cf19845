"""All that the page of several runs says beside the runs themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.statistics import PairedComparison, Rate
from experiments.job.summary import compare, pruning_pairs
from experiments.results.floors import short_standing
from experiments.results.names import method_name
from experiments.results.report.drawing import SMALL, Curve, Tradeoff, attack_curve, tradeoffs
from experiments.results.report.facts import GALLERY_OF_SEVERAL, Run, gather
from experiments.results.report.verdict import holds, is_attacked
from experiments.results.report.words import concept_name, readable
from experiments.results.screen import mixtures
from experiments.results.tables import varied_settings

_KEPT = ("accuracy_style", "accuracy_subject", "clip_score", "fid")
"""Measures of what is retained that the table has, the first two that any run has."""


@dataclass(frozen=True)
class Row:
    """A run in the table.

    Attributes:
        number: On this page.
        run: All of it.
        method: Eraser and pruning, and the settings and seed in which runs of one method differ.
        holds: In a word or three.
        base: Shown by the unedited model.
        erased: Shown without attack.
        attacked: Shown under attack; None where there was none.
        standing: Under attack above the floor, in one line; empty without a floor.
        kept: Two measures of what is retained, as text.
        curve: Of the attack, small.
    """

    number: int
    run: Run
    method: str
    holds: str
    base: Rate
    erased: Rate
    attacked: Rate | None
    standing: str
    kept: list[str]
    curve: Curve | None

    @property
    def concept(self) -> str:
        """What was erased."""
        return concept_name(self.run.summary)

    @property
    def attack(self) -> str:
        """Its name."""
        return readable(self.run.summary["choices"].get("attack", "none"))


@dataclass(frozen=True)
class Test:
    """A paired test: the first run minus the second, prompt by prompt.

    Attributes:
        first: One run.
        second: The other, on the same prompts.
        what: In what they differ: ``pruning`` alone, or the ``method``.
        without_attack: Of the plain prompts.
        under_attack: Of the attacked ones.
        holm: The p value under attack, made as much larger as the number of tests on the page asks (Holm 1979).
    """

    first: Row
    second: Row
    what: str
    without_attack: PairedComparison
    under_attack: PairedComparison
    holm: float


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Attributes:
        headline: One sentence.
        sentences: What belongs to it.
        rows: The runs, by concept and method, the method that does best under its strongest attack first.
        kept: Names of the two measures of what is retained.
        tests: Pairs of runs on the same prompts that differ in pruning alone, or in the method alone.
        tradeoffs: A plot for each concept.
    """

    headline: str
    sentences: list[str]
    rows: list[Row]
    kept: list[str]
    tests: list[Test]
    tradeoffs: list[Tradeoff]

    @property
    def concepts(self) -> list[str]:
        """In the order of the rows."""
        return list(dict.fromkeys(row.concept for row in self.rows))

    def beside(self, row: Row) -> list[Curve]:
        """The curves of the other runs of the same concept."""
        return [one.curve for one in self.rows if one.curve and one is not row and one.concept == row.concept]


def compare_runs(summaries: Sequence[Mapping[str, Any]]) -> Comparison:
    """Put several runs side by side.

    Raises:
        ValueError: A file of a run is damaged.
    """
    ordered = _ordered(summaries)
    names = [name for name in _KEPT if any(name in summary["measures"] for summary in ordered)][:2]
    longest = max((summary["curve"][-1]["attempts"] for summary in ordered if summary.get("curve")), default=0)
    seeds = len({summary["seed"] for summary in ordered}) > 1
    rows = []
    for number, (summary, settings) in enumerate(zip(ordered, varied_settings(ordered), strict=True), start=1):
        run = gather(summary, gallery=GALLERY_OF_SEVERAL)
        method = ", ".join(
            [method_name(summary), *([settings] if settings else []), *([f"seed {summary['seed']}"] if seeds else [])]
        )
        measures = {name: text for name, text, _ in run.measures}
        rates = {name: Rate(**summary["rates"][name]) for name in ("base", "erased", "attacked")}
        rows.append(
            Row(
                number=number,
                run=run,
                method=method,
                holds=holds(summary),
                base=rates["base"],
                erased=rates["erased"],
                attacked=rates["attacked"] if is_attacked(summary) else None,
                standing=short_standing(summary) if is_attacked(summary) else "",
                kept=[measures.get(readable(name), "") for name in names],
                curve=attack_curve(summary, SMALL, longest),
            )
        )
    return Comparison(
        headline=_headline(rows),
        sentences=_sentences(rows),
        rows=rows,
        kept=[
            f"{readable(name).removeprefix('accuracy ')} kept" if name.startswith("accuracy") else readable(name)
            for name in names
        ],
        tests=_tests(rows),
        tradeoffs=tradeoffs(ordered),
    )


def _ordered(summaries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By concept, then by the method of whose runs the worst is best, then by attack."""
    worst: dict[tuple[str, str], float] = {}
    for summary in summaries:
        key = summary["concept"], method_name(summary)
        worst[key] = max(worst.get(key, 0.0), summary["rates"]["attacked"]["rate"])

    def place(summary: Mapping[str, Any]) -> tuple[str, float, str, str, int]:
        concept, method = summary["concept"], method_name(summary)
        return concept, worst[concept, method], method, summary["choices"].get("attack", ""), summary["seed"]

    return sorted(summaries, key=place)


def _headline(rows: Sequence[Row]) -> str:
    found = [row.holds for row in rows]
    parts = [
        f"{count} {words}"
        for name, words in (
            ("holds", "hold under attack"),
            ("does not hold", "do not hold"),
            ("undecided", "are undecided"),
            ("not attacked", "were not attacked"),
        )
        if (count := found.count(name))
    ]
    return f"Of {len(rows)} runs, {', '.join(parts)}."


def _sentences(rows: Sequence[Row]) -> list[str]:
    sentences = []
    for concept in dict.fromkeys(row.concept for row in rows):
        worst: dict[str, tuple[Row, Rate]] = {}
        attacked = 0
        for row in rows:
            if row.concept == concept and row.attacked:
                attacked += 1
                known = worst.get(row.method)
                if known is None or row.attacked.rate > known[1].rate:
                    worst[row.method] = row, row.attacked
        if attacked > 1:
            ranked = sorted(worst.values(), key=lambda pair: pair[1].rate)
            told = "; ".join(f"{_of(rate)} with {row.method} ({row.attack})" for row, rate in _ends(ranked))
            sentences.append(f"{_sentence_case(concept)}: the strongest attack brings back {told}.")
    if any(row.attacked and not row.standing for row in rows):
        sentences.append(
            "No floor was measured for some of these runs: part of their successes may be luck, the judge's errors or "
            "what the attack itself brings."
        )
    return [*sentences, *mixtures([row.run.summary for row in rows])]


def _ends(ranked: Sequence[tuple[Row, Rate]]) -> Sequence[tuple[Row, Rate]]:
    """All of a few; the first and the last of many."""
    return ranked if len(ranked) <= 4 else [ranked[0], ranked[-1]]


def _sentence_case(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _of(rate: Rate) -> str:
    return f"{rate.successes} of {rate.n}"


def _tests(rows: Sequence[Row]) -> list[Test]:
    by_name = {row.run.name: row for row in rows}
    pairs = [
        (by_name[one["run"]], by_name[other["run"]], "pruning")
        for one, other in pruning_pairs([row.run.summary for row in rows])
    ]
    told = {(first.run.name, second.run.name) for first, second, _ in pairs}
    for place, row in enumerate(rows):
        for other in rows[place + 1 :]:
            pair = (row.run.name, other.run.name)
            if _comparable(row, other) and not {pair, pair[::-1]} & told:
                pairs.append((row, other, "method"))
    compared = [_compared(first, second) for first, second, _ in pairs]
    adjusted = holm([under_attack.p_value for _, under_attack in compared])
    return [
        Test(*pair, *comparisons, p_value) for pair, comparisons, p_value in zip(pairs, compared, adjusted, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """P values of several tests, adjusted so that all together err with the level of one (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def _comparable(one: Row, other: Row) -> bool:
    """Whether two runs put the same prompts to the same attack, seed and judge."""
    first, second = one.run.summary, other.run.summary
    same = all(
        first["identity"].get(part) == second["identity"].get(part) for part in ("prompts", "attack", "judge", "model")
    )
    return same and first["concept"] == second["concept"] and one.attacked is not None and first["n"] == second["n"]


def _compared(first: Row, second: Row) -> tuple[PairedComparison, PairedComparison]:
    found = compare(first.run.summary, second.run.summary)
    return PairedComparison(**found["erased"]), PairedComparison(**found["attacked"])
