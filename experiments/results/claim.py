"""The paper's claim on finished runs: pruning holds better under attack."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffusion.files import write_atomically
from evaluation.floors import TwoWay
from evaluation.statistics import Mean
from experiments.job.result import warnings_of
from experiments.results.floors import floor_decides
from experiments.results.screen import doubts, made_sentence
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
    """One pruned method against its eraser alone, over tasks and seeds of erasure.

    Rates are in percent. The unit is the erasure: over several seeds intervals are two-way, over seeds and prompts
    (:class:`evaluation.floors.TwoWay`); of one seed they are the bootstrap's over prompts, and hold for these models.

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
        """Compare over ``pairs``, one or more.

        Raises:
            ValueError: Seeds differ in their concepts or prompts.
        """
        pruned, unpruned = (_by_seed(runs) for runs in zip(*pairs, strict=True))
        first, second = (_retained(runs) for runs in zip(*pairs, strict=True))
        return cls(
            unpruned=_mean(unpruned),
            pruned=_mean(pruned),
            lower_by=_mean(unpruned - pruned),
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
    """One row per pruned method and concept, and one over its concepts if all have several and the same seeds."""
    groups: dict[tuple[str, str], dict[str, list[Pair]]] = {}
    for pair in method_pairs(summaries):
        choices = pair[0]["choices"]
        concepts = groups.setdefault((choices["eraser"], choices["pruning"]), {})
        concepts.setdefault(pair[0]["concept"], []).append(pair)
    rows = []
    for (eraser, pruning), concepts in sorted(groups.items()):
        seeds = {tuple(sorted(pruned["seed"] for pruned, _ in pairs)) for pairs in concepts.values()}
        if len(concepts) > 1 and len(seeds) == 1:
            concepts[EVERY] = [pair for pairs in concepts.values() for pair in pairs]
        for concept, pairs in concepts.items():
            found = Comparison.of(pairs)
            floors = [pruned["floor"]["floor"]["rate"] for pruned, _ in pairs if floor_decides(pruned)]
            rows.append(
                {
                    "method": f"{eraser}, pruning {pruning}",
                    "concept": concept,
                    "erasures": len({pruned["seed"] for pruned, _ in pairs}),
                    "prompts": found.lower_by.n,
                    "floor": f"{100 * fmean(floors):.0f}" if floors else "",
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


def _by_seed(runs: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Whether each prompt's concept was brought back, 0 or 100, [seeds, prompts of all concepts]."""
    found: dict[int, dict[tuple[str, int], float]] = {}
    for run in runs:
        own = found.setdefault(run["seed"], {})
        own |= {(run["concept"], case["case_number"]): 100.0 * case["attacked"] for case in run["cases"]}
    prompts = sorted({prompt for own in found.values() for prompt in own})
    if lacking := [seed for seed, own in found.items() if len(own) < len(prompts)]:
        raise ValueError(f"Seed {lacking[0]} was not attacked on the prompts of the others; compare equal ones.")
    return np.array([[own[prompt] for prompt in prompts] for own in found.values()])


def _mean(values: NDArray[np.float64]) -> Mean:
    """The mean of ``values`` [seeds, prompts]; see :class:`Comparison`."""
    if len(values) == 1:
        return Mean.bootstrapped(values[0].tolist(), seed=0)
    mean, margin = float(values.mean()), TwoWay.of(values).margin()
    return Mean(values.shape[1], mean, mean - margin, mean + margin)


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
    table = claim_table(summaries)
    keys = ["method", "concept"]
    kept = ["style", "subject", "CLIP score", "FID", "falls short in"]
    text = [
        "# Pruned methods against their erasers alone",
        "## Under attack",
        markdown_table(table.drop(columns=kept, errors="ignore"), disable_numparse=True),
        "Without, with: percent of prompts whose picture shows the concept under attack, without and with pruning; "
        "lower by: their difference, prompt by prompt; floor: the same attack on a model that never knew the concept. "
        "95 % intervals: two-way over seeds of erasure and prompts; of one erasure the bootstrap's over prompts.",
        "## What pruning costs",
        markdown_table(table[[*keys, *kept]] if len(table) else table, disable_numparse=True),
        "Style, subject: points of retained accuracy gained by pruning, CLIP score and FID in percent. "
        f"The claim: lower by {LOWER_BY:g} points or more and intervals apart, with at most {ACCURACY_WITHIN:g} "
        f"points of accuracy, {CLIP_WITHIN:g} % of CLIP score and {FID_WITHIN:g} % of FID lost.",
    ]
    text += [made_sentence(summaries)] if summaries else []
    if left_out := doubts(summaries):
        text += ["Left out, as they support no claim:", *(f"- {sentence}" for sentence in left_out)]
    text += [f"{len(missing)} runs are missing: {'; '.join(missing)}."] if missing else []
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_comparison.md"
    write_atomically(path, "\n\n".join(text) + "\n")
    return path
