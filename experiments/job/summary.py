"""What a job found, in one JSON file that says where each number comes from."""

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from experiments.command.config import TRAINING_SPEED_ONLY, Job, matters
from experiments.job.cost import Cost
from experiments.job.protocol import success_rates
from experiments.job.stages import Stages
from experiments.job.store import SCHEMA_VERSION, Store, content_hash, read_json

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "torchmetrics", "hydra-core", "numpy")
RUNS = "runs"
"""The store's stage that holds the summaries."""


@dataclass(frozen=True)
class CaseResult:
    """Whether the picture of one prompt shows the concept: by the base model, once erased, under attack.

    Attributes:
        unet_evaluations: Spent on the attack of this case, what serves all cases included.
        pictures: Made for it, the plain prompt's included.
        variant: What the last picture depended on besides its text and seed, such as embeddings; see
            :class:`attacks.cases.Check`.
        broken_by: Which member of a union succeeded.
        too_long: The protocol does not attack prompts of so many tokens; ``attacked`` is ``erased``.
    """

    case_number: int
    prompt: str
    adversarial_prompt: str
    base: bool
    erased: bool
    attacked: bool
    unet_evaluations: int
    pictures: int
    variant: str = ""
    broken_by: str = ""
    too_long: bool = False

    @classmethod
    def of(cls, outcome: Outcome, *, base: bool, too_long: bool = False) -> "CaseResult":
        """The result of a case from its outcome and the verdict on the base model's picture."""
        return cls(
            outcome.case_number,
            outcome.prompt,
            outcome.adversarial_prompt,
            base,
            outcome.plain_success,
            outcome.success,
            outcome.unet_evaluations,
            len({(check.prompt, check.seed, check.variant) for check in outcome.checks}),
            outcome.checks[-1].variant,
            outcome.checks[-1].attack if outcome.success else "",
            too_long,
        )


@dataclass(frozen=True)
class CurvePoint:
    """The attack success rate within a number of judged pictures per prompt (0: the plain prompt alone).

    Attributes:
        attempts: Adversarial pictures per prompt.
        unet_evaluations: Spent by all prompts together up to there.
        rate: Of prompts that have succeeded.
    """

    attempts: int
    unet_evaluations: int
    rate: float


@dataclass(frozen=True)
class Summary:
    """A job's numbers and their origin.

    Attributes:
        identity: Hashes and config of everything that the numbers depend on; its hash names the run.
        choices: Which file each config group took.
        rates: ``base``, ``erased`` and ``attacked``: share of prompts whose picture shows the concept.
        measures: What the evaluators say of the retained prompts.
        members: Of a union of attacks, by name: share of prompts that each broke and those before it did not.
        unpruned: The same job with pruning off, compared prompt by prompt, where the store has it.
        labels: Of judges with labels, how often each is found in the pictures of each rate.
        model: Name of the model.
        protocol: Its ``name``, its rule of ``counting``, how many prompts were ``too_long`` for it, the attack success
            rate ``success`` under that rule and ``by_rule`` under each; a rate is None where a rule counts no prompt.
            The rate before the attack is ``rates["erased"]``, over all prompts.
    """

    identity: dict[str, Any]
    choices: dict[str, str]
    concept: str
    threat_model: str
    rates: dict[str, Rate]
    measures: Measures
    curve: list[CurvePoint]
    costs: dict[str, Cost]
    edit: dict[str, Any]
    artefacts: dict[str, str]
    cases: list[CaseResult]
    config: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)
    unpruned: dict[str, Any] | None = None
    members: dict[str, Rate] = field(default_factory=dict)
    labels: dict[str, LabelCounts] = field(default_factory=dict)
    model: str = ""
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """The run's name: the hash of all that its numbers depend on."""
        return content_hash({"schema": SCHEMA_VERSION, "stage": RUNS, **self.identity})

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "schema": SCHEMA_VERSION,
            "run": self.run,
            "n": len(self.cases),
            "seed": self.config["seed"],
            "choices": self.choices,
            "model": self.model,
            "concept": self.concept,
            "threat_model": self.threat_model,
            "protocol": self.protocol,
            "rates": {name: rate.as_dict() for name, rate in self.rates.items()},
            "members": {name: rate.as_dict() for name, rate in self.members.items()},
            "labels": self.labels,
            "measures": self.measures,
            "unpruned": self.unpruned,
            "costs": {name: cost.as_dict() for name, cost in self.costs.items()},
            "edit": self.edit,
            "artefacts": self.artefacts,
            "curve": [asdict(point) for point in self.curve],
            "cases": [asdict(case) for case in self.cases],
            "identity": self.identity,
            "config": self.config,
            **self.provenance,
        }


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
