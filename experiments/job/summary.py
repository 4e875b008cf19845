"""What a job found, in one JSON file that says where each number comes from."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attacks.cases import Outcome, evaluations_paid
from attacks.union import Union
from evaluation.prompt_sets import PromptRow
from evaluation.quality import Measures
from evaluation.statistics import PairedComparison, Rate
from evaluation.verdicts import LabelCounts
from experiments.job.cost import Cost
from experiments.job.prompts import PromptCounts
from experiments.job.protocol import success_rates
from experiments.job.remote_store import fetch_summaries
from experiments.job.result import RUNS, CaseResult, CurvePoint, Summary, base_warnings, prompt_groups
from experiments.job.settings import Job
from experiments.job.stages import Stages
from experiments.job.store import SCHEMA_VERSION, Store, content_hash, read_json, unchecked

log = logging.getLogger(__name__)


def summarise(
    job: Job,
    cases: list[CaseResult],
    *,
    model: str,
    sets: Mapping[str, PromptCounts],
    identity: dict[str, Any],
    measures: Measures,
    labels: dict[str, LabelCounts],
    curve: list[CurvePoint],
    costs: dict[str, Cost],
    edit: dict[str, Any],
    artefacts: dict[str, str],
    origin: dict[str, Any],
    origins: dict[str, list[dict[str, Any]]],
    holds: dict[str, Any],
) -> Summary:
    """Put a job's results together; see :class:`Summary`."""
    prompts = [case.prompt for case in cases]
    rates = {name: Rate.of([getattr(case, name) for case in cases], prompts) for name in ("base", "erased", "attacked")}
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
        provenance={"created": now(), **origin, "origins": origins},
        members={name: Rate.of([case.broken_by == name for case in cases], prompts) for name in members},
        labels=labels,
        model=model,
        holds=holds,
        sets={name: counts.as_dict() for name, counts in sets.items()},
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
        "pruning": stages.pruning_key,
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
        **stages.transfer_key,
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
                sum(any(check.succeeds for check in checks) for checks in reached) / len(outcomes),
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
        result[rate] = PairedComparison.of(first, second, prompt_groups(pruned["cases"])).as_dict()
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
    """Every summary in the store, the newest first; what cannot be read, or is of another version, is left out.

    In this machine's copy of a store on object storage, they are fetched first.
    """
    fetch_summaries(store_root)
    summaries, others = [], Counter[str]()
    paths = (store_root / RUNS).glob("*/summary.json")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            found = read_json(path)
            if isinstance(found, dict) and found.get("schema", SCHEMA_VERSION) != SCHEMA_VERSION:
                others[str(found["schema"])] += 1
                continue
            summaries.append({**unchecked(found), "path": str(path)})
        except (ValueError, OSError) as error:
            log.warning("%s is left out: %s", path, " ".join(str(error).split()))
    for schema, count in others.items():
        log.warning(
            "%d runs in %s are left out: version %s of this program made them, and this is version %d, whose numbers "
            "differ; run their commands again",
            *(count, store_root, schema, SCHEMA_VERSION),
        )
    return summaries


def now() -> str:
    """The time, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _without_pruning(identity: Mapping[str, Any]) -> dict[str, Any]:
    # The edit's hash follows from the pruning.
    return {key: value for key, value in identity.items() if key not in {"pruning", "edit"}}
