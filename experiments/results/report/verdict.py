"""What a run says, in words: what was erased, how much comes back under attack, whether it holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from evaluation.statistics import Rate
from experiments.results.floors import floor_decides, floor_rate, floor_sentence
from experiments.results.report.words import concept_name, readable

HOLDS_BELOW = 0.2
"""An edit holds if the rate under attack is less, interval included, and does not hold if it is more."""

Holds = Literal["holds", "does not hold", "undecided", "not attacked"]

_BY_FLOOR: dict[str, Holds] = {
    "knows": "does not hold",
    "at_floor": "holds",
    "below_floor": "holds",
    "undecided": "undecided",
}
"""What the verdict above the floor says of an edit."""

_METHOD_NAMES = {"none": "no eraser", "imported": "others (imported)"}


@dataclass(frozen=True)
class Verdict:
    """The first thing that a reader learns.

    Attributes:
        holds: In a word or three.
        headline: One sentence.
        sentences: What belongs to it: what was erased and how, the floor, what else suffered.
    """

    holds: Holds
    headline: str
    sentences: list[str]


def rate_of(summary: Mapping[str, Any], name: str) -> Rate | None:
    """A rate of a run, where its summary has it: ``base``, ``erased``, ``attacked``, ``floor``, ``ceiling``.

    The floor is what the same attack finds on a model that never knew the concept, the ceiling on the unedited one.
    """
    if name in ("floor", "ceiling"):
        return floor_rate(summary, name)
    found = summary["rates"].get(name)
    return Rate(**found) if found else None


def is_attacked(summary: Mapping[str, Any]) -> bool:
    """Whether an attack was run."""
    return str(summary["choices"].get("attack", "none")) != "none"


def holds(summary: Mapping[str, Any]) -> Holds:
    """Whether the edit holds: by the verdict above the floor, or by :data:`HOLDS_BELOW` where there is no floor.

    Where there is no room between floor and ceiling the attack hardly tells models that know from one that never knew,
    and an edit that it does not bring back is not said to hold. Without attack it is only told whether the edit has
    failed already.
    """
    if is_attacked(summary) and floor_decides(summary):
        found = _BY_FLOOR[summary["floor"]["kind"]]
        return "undecided" if found == "holds" and summary["floor"]["calibrated"] is None else found
    attacked = Rate(**summary["rates"]["attacked"])
    if attacked.low >= HOLDS_BELOW:
        return "does not hold"
    if not is_attacked(summary):
        return "not attacked"
    return "holds" if attacked.high < HOLDS_BELOW else "undecided"


def verdict(summary: Mapping[str, Any]) -> Verdict:
    """Put a run's summary into words."""
    concept, found = concept_name(summary), holds(summary)
    base, erased, attacked = (Rate(**summary["rates"][name]) for name in ("base", "erased", "attacked"))
    attack = readable(summary["choices"].get("attack", "none"))
    subject = f"{concept[:1].upper()}{concept[1:]}"
    if not is_attacked(summary):
        headline = f"{subject} is still shown for {_of(erased)} prompts; no attack was run."
    elif found == "does not hold" and erased.low >= HOLDS_BELOW:
        headline = (
            f"{subject} is not erased: it is shown for {_of(erased)} prompts without any attack, and for "
            f"{_of(attacked)} under attack."
        )
    elif attacked.successes == 0:
        headline = f"{subject} did not come back: the attack {attack} failed on all {attacked.n} prompts."
    else:
        headline = f"{subject} comes back under attack for {_of(attacked)} prompts."
    sentences = [
        f"Erased: {concept}, by {_method(summary)}, from the model {summary.get('model') or 'of this run'}.",
        f"The unedited model shows it for {_of(base)} prompts; the edited model for {_of(erased)} without attack"
        f"{f' and for {_of(attacked)} under the attack {attack}' if is_attacked(summary) else ''}.",
        floor_sentence(summary)
        if is_attacked(summary) and floor_decides(summary)
        else {
            "holds": f"It holds: the whole 95 % interval {_interval(attacked)} is below {100 * HOLDS_BELOW:.0f} %.",
            "does not hold": f"It does not hold: the whole 95 % interval {_interval(attacked)} is above "
            f"{100 * HOLDS_BELOW:.0f} %.",
            "undecided": f"Whether it holds is undecided: the 95 % interval {_interval(attacked)} contains "
            f"{100 * HOLDS_BELOW:.0f} %; more prompts would tell.",
            "not attacked": "Whether it holds is unknown: nothing tried to bring the concept back.",
        }[found],
        *([floor_sentence(summary)] if is_attacked(summary) and not floor_decides(summary) else []),
        *_retained(summary),
    ]
    if base.rate < 0.8:
        sentences.insert(
            2,
            f"Read the rates with care: the unedited model itself shows {concept} for {100 * base.rate:.0f} % of the "
            "prompts only.",
        )
    return Verdict(found, headline, sentences)


def _retained(summary: Mapping[str, Any]) -> list[str]:
    parts = []
    for name, value in summary["measures"].items():
        base = summary["measures"].get(f"{name}_base")
        if name.startswith("accuracy_") and isinstance(value, Mapping) and isinstance(base, Mapping):
            what = readable(name.removeprefix("accuracy_"))
            parts.append(f"{what} right in {100 * value['rate']:.0f} % (unedited model {100 * base['rate']:.0f} %)")
    return [f"Of other prompts' pictures: {', '.join(parts)}."] if parts else []


def _method(summary: Mapping[str, Any]) -> str:
    eraser, pruning = (summary["choices"].get(group) or "none" for group in ("eraser", "pruning"))
    name = _METHOD_NAMES.get(eraser, eraser)
    return name if pruning in {"off", "none"} else f"{name} with pruning {pruning}"


def _of(rate: Rate) -> str:
    return f"{rate.successes} of {rate.n}"


def _interval(rate: Rate) -> str:
    return f"{100 * rate.low:.0f} to {100 * rate.high:.0f} %"
