"""The paper's claim on finished runs: pruning holds better under attack."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from diffusion.files import write_atomically
from evaluation.statistics import Mean
from experiments.job.result import warnings_of
from experiments.results.screen import doubts
from experiments.results.writing import markdown_table

LOWER_BY = 25.0
"""Points by which the attack is to succeed less often."""

ACCURACY_WITHIN = 3.0
"""Points that retained style and subject may lose."""

CLIP_WITHIN = 1.0
"""Percent that the CLIP score may lose."""

FID_WITHIN = 10.0
"""Percent that the FID may gain."""

EVERY = "all"

Pair = tuple[Mapping[str, Any], Mapping[str, Any]]
"""Summaries of the same concept, eraser, seed and attack, (pruned, not pruned)."""


def method_pairs(summaries: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Every pruned run beside the unpruned run of the same eraser; other settings of the eraser may differ.

    Runs with warnings, which support no claim, are in no pair.
    """
    summaries = [summary for summary in summaries if not warnings_of(summary)]
    unpruned = {_cell(summary): summary for summary in summaries if summary["choices"]["pruning"] == "off"}
    return [
        (summary, unpruned[_cell(summary)])
        for summary in summaries
        if summary["choices"]["pruning"] != "off" and _cell(summary) in unpruned
    ]


def _cell(summary: Mapping[str, Any]) -> tuple[Any, ...]:
    return summary["concept"], summary["seed"], summary["choices"]["eraser"], summary["choices"]["attack"]


@dataclass(frozen=True)
class Comparison:
    """One pruned method against its eraser alone, over tasks and seeds.

    Rates are in percent. A prompt's value is its mean over the seeds, and intervals are the bootstrap's over prompts.

    Attributes:
        unpruned: Rate under attack without pruning.
        pruned: The same with pruning.
        lower_by: Unpruned minus pruned, prompt by prompt.
        style: Retained style accuracy gained, in points.
        subject: Retained subject accuracy gained, in points.
        clip: CLIP score gained, in percent.
        fid: FID gained, in percent; less is better.
    """

    unpruned: Mean
    pruned: Mean
    lower_by: Mean
    style: float
    subject: float
    clip: float
    fid: float

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "Comparison":
        """Compare over ``pairs``, one or more, with the same prompts wherever the concept is the same."""
        pruned, unpruned = (_rate_by_prompt(runs) for runs in zip(*pairs, strict=True))
        first, second = (_retained(runs) for runs in zip(*pairs, strict=True))
        return cls(
            unpruned=Mean.bootstrapped(list(unpruned.values()), seed=0),
            pruned=Mean.bootstrapped(list(pruned.values()), seed=0),
            lower_by=Mean.bootstrapped([unpruned[prompt] - rate for prompt, rate in pruned.items()], seed=0),
            style=100 * (first["accuracy_style"] - second["accuracy_style"]),
            subject=100 * (first["accuracy_subject"] - second["accuracy_subject"]),
            clip=100 * (first["clip_score"] / second["clip_score"] - 1),
            fid=100 * (first["fid"] / second["fid"] - 1),
        )

    @property
    def shortfalls(self) -> list[str]:
        """What the claim asks for and these numbers do not have."""
        wanted = {
            f"{LOWER_BY:g} points": self.lower_by.mean >= LOWER_BY,
            "intervals apart": self.pruned.high < self.unpruned.low,
            "style": self.style >= -ACCURACY_WITHIN,
            "subject": self.subject >= -ACCURACY_WITHIN,
            "CLIP score": self.clip >= -CLIP_WITHIN,
            "FID": self.fid <= FID_WITHIN,
        }
        return [name for name, holds in wanted.items() if not holds]


def claim_table(summaries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per pruned method and concept, and one over all its concepts."""
    groups: dict[tuple[str, str, str], list[Pair]] = {}
    for pair in method_pairs(summaries):
        choices = pair[0]["choices"]
        for concept in (pair[0]["concept"], EVERY):
            groups.setdefault((choices["eraser"], choices["pruning"], concept), []).append(pair)
    rows = []
    for (eraser, pruning, concept), pairs in sorted(
        groups.items(), key=lambda group: (*group[0][:2], group[0][2] == EVERY)
    ):
        found = Comparison.of(pairs)
        rows.append(
            {
                "eraser": eraser,
                "pruning": pruning,
                "concept": concept,
                "runs": len(pairs),
                "prompts": found.lower_by.n,
                "without": _interval(found.unpruned),
                "with": _interval(found.pruned),
                "lower by": _interval(found.lower_by),
                "style": f"{found.style:+.1f}",
                "subject": f"{found.subject:+.1f}",
                "CLIP score": f"{found.clip:+.1f} %",
                "FID": f"{found.fid:+.0f} %",
                "falls short in": ", ".join(found.shortfalls) or "nothing",
            }
        )
    return pd.DataFrame(rows)


def _rate_by_prompt(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], float]:
    """Percent of the runs under which each prompt's concept was brought back, by concept and prompt."""
    found: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        for case in run["cases"]:
            found.setdefault((run["concept"], case["case_number"]), []).append(100.0 * case["attacked"])
    return {prompt: fmean(values) for prompt, values in found.items()}


def _retained(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the runs of what they measure of the retained prompts."""
    measured = [run["measures"] for run in runs]
    return {
        "accuracy_style": fmean(measures["accuracy_style"]["rate"] for measures in measured),
        "accuracy_subject": fmean(measures["accuracy_subject"]["rate"] for measures in measured),
        "clip_score": fmean(measures["clip_score"]["mean"] for measures in measured),
        "fid": fmean(measures["fid"] for measures in measured),
    }


def _interval(mean: Mean) -> str:
    return f"{mean.mean:.0f} [{mean.low:.0f}, {mean.high:.0f}]"


def write_claim(summaries: Sequence[Mapping[str, Any]], name: str, folder: Path, *, missing: Sequence[str]) -> Path:
    """Write ``<name>_comparison.md`` into ``folder``; ``missing`` names the runs that were not made yet."""
    text = [
        "# Pruned methods against their erasers alone",
        markdown_table(claim_table(summaries), disable_numparse=True),
        "Without, with: percent of prompts whose picture shows the concept under attack, a prompt's value being "
        "its mean over the seeds; lower by: their difference, prompt by prompt; 95 % bootstrap intervals over "
        "prompts. Style, subject: points of retained accuracy gained by pruning, CLIP score and FID in percent. "
        f"The claim: lower by {LOWER_BY:g} points or more and intervals apart, with at most {ACCURACY_WITHIN:g} "
        f"points of accuracy, {CLIP_WITHIN:g} % of CLIP score and {FID_WITHIN:g} % of FID lost.",
    ]
    if left_out := doubts(summaries):
        text += ["Left out, as they support no claim:", *(f"- {sentence}" for sentence in left_out)]
    text += [f"{len(missing)} runs are missing: {'; '.join(missing)}."] if missing else []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_comparison.md"
    write_atomically(path, "\n\n".join(text) + "\n")
    return path
