"""What a job found, in one JSON file that says where each number comes from."""

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from attacks.cases import Outcome, evaluations_paid
from attacks.union import Union
from evaluation.prompt_sets import PromptRow
from evaluation.quality import Measures
from evaluation.statistics import PairedComparison, Rate
from evaluation.verdicts import LabelCounts
from experiments.job.cost import Cost
from experiments.job.protocol import success_rates
from experiments.job.result import RUNS, CaseResult, CurvePoint, Summary, base_warnings
from experiments.job.settings import TRAINING_SPEED_ONLY, Job, matters
from experiments.job.stages import Stages
from experiments.job.store import Store, content_hash, read_json

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "torchmetrics", "hydra-core", "numpy")


def summarise(
    job: Job,
    cases: list[CaseResult],
    *,
    model: str,
    identity: dict[str, Any],
    measures: Measures,
    labels: dict[str, LabelCounts],
    curve: list[CurvePoint],
    costs: dict[str, Cost],
    edit: dict[str, Any],
    artefacts: dict[str, str],
) -> Summary:
    """Put a job's results together; see :class:`Summary`."""
    rates = {name: Rate.of([getattr(case, name) for case in cases]) for name in ("base", "erased", "attacked")}
    members = job.attack.members if isinstance(job.attack, Union) else ()
    by_rule = {rule: rate and rate.as_dict() for rule, rate in success_rates(cases).items()}
    return Summary(
        identity=identity,
        choices=job.choices,
        concept=job.concept.name,
        threat_model=job.attack.threat_model,
        rates=rates,
        measures=measures,
        curve=curve,
        costs=costs,
        edit=edit,
        artefacts=artefacts,
        cases=cases,
        config=job.config,
        provenance=provenance(),
        members={name: Rate.of([case.broken_by == name for case in cases]) for name in members},
        labels=labels,
        model=model,
        protocol={
            "name": job.protocol.name,
            "counting": job.protocol.counting,
            "too_long": sum(case.too_long for case in cases),
            "success": by_rule[job.protocol.counting],
            "by_rule": by_rule,
        },
        warnings=base_warnings(rates["base"], job.concept.name),
    )


def run_identity(stages: Stages, edit: str, rows: Sequence[PromptRow], retained: Sequence[PromptRow]) -> dict[str, Any]:
    """All that a job's numbers depend on."""
    config = stages.job.config
    return {
        "model": stages.model_key,
        "concept": config["concept"]["name"],
        "eraser": stages.eraser_key,
        "pruning": matters(config["pruning"], TRAINING_SPEED_ONLY),
        "edit": edit,
        "judge": stages.judge_key,
        "attack": stages.attack_key,
        "evaluator": stages.evaluator_keys,
        "seed": config["seed"],
        "prompts": content_hash([[row.prompt, row.seed, row.guidance] for row in rows]),
        "retained": content_hash([[row.prompt, row.seed, row.guidance] for row in retained]),
        **stages.sampler_key,
        **stages.retained_sampler_key,
        **stages.job.protocol.key,
    }


def success_curve(outcomes: Sequence[Outcome]) -> list[CurvePoint]:
    """Attack success rate over the attempts per prompt, from the checks that every outcome keeps."""
    longest = max((len(outcome.checks) for outcome in outcomes), default=0)
    points = []
    for attempts in range(longest):
        reached = [outcome.checks[: attempts + 1] for outcome in outcomes]
        points.append(
            CurvePoint(
                attempts,
                evaluations_paid([checks[-1] for checks in reached]),
                sum(any(check.present for check in checks) for checks in reached) / len(outcomes),
            )
        )
    return points


def find_unpruned(summary: Summary, store: Store) -> dict[str, Any] | None:
    """Look for the same job with pruning off in the store and compare with it, prompt by prompt."""
    if summary.choices.get("pruning") == "off":
        return None
    wanted = _without_pruning(summary.identity)
    for other in read_summaries(store.root):
        if other["choices"].get("pruning") == "off" and _without_pruning(other["identity"]) == wanted:
            return compare(summary.as_dict(), other)
    return None


def compare(pruned: Mapping[str, Any], unpruned: Mapping[str, Any]) -> dict[str, Any]:
    """McNemar's comparison of two summaries on the same prompts and seeds, erased and under attack."""
    result: dict[str, Any] = {"run": unpruned["run"]}
    for rate in ("erased", "attacked"):
        first, second = ([case[rate] for case in summary["cases"]] for summary in (pruned, unpruned))
        result[rate] = PairedComparison.of(first, second).as_dict()
    return result


def pruning_pairs(summaries: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Pairs of summaries that differ in pruning alone: (pruned, not pruned)."""
    unpruned = {
        content_hash(_without_pruning(summary["identity"])): summary
        for summary in summaries
        if summary["choices"].get("pruning") == "off"
    }
    return [
        (summary, unpruned[name])
        for summary in summaries
        if summary["choices"].get("pruning") != "off"
        and (name := content_hash(_without_pruning(summary["identity"]))) in unpruned
    ]


def read_summaries(store_root: Path) -> list[dict[str, Any]]:
    """Every summary in the store, the newest first."""
    paths = sorted((store_root / RUNS).glob("*/summary.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [{**read_json(path), "path": str(path)} for path in paths]


def provenance() -> dict[str, Any]:
    """When, by which code and with which packages."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(Path(__file__).parent),
        "versions": {"python": python_version(), **dict(_versions(PACKAGES))},
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """The revision of the repository around ``folder`` and whether files differ from it; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _versions(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _without_pruning(identity: Mapping[str, Any]) -> dict[str, Any]:
    # The edit's hash follows from the pruning.
    return {key: value for key, value in identity.items() if key not in {"pruning", "edit"}}
