"""What a job found: each prompt's result, the curve, and the summary of them all."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from attacks.cases import Outcome
from evaluation.quality import Measures
from evaluation.statistics import Rate
from evaluation.verdicts import LabelCounts
from experiments.job.cost import Cost
from experiments.job.store import SCHEMA_VERSION, checked, content_hash

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
        cut: Tokens at the prompt's end that the text encoder does not read.
        attack_cut: The same of the prompt beside the attack's tokens, or of the text found, where that loses more.
        floor: Whether the same attack shows the concept on the model that never knew it; None if it was not run there.
        ceiling: The same on the unedited model.
        measured: What the last check has measured; see :class:`attacks.cases.Check`.
        counts: Whether the concept in the last picture counts.
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
    cut: int = 0
    attack_cut: int = 0
    floor: bool | None = None
    ceiling: bool | None = None
    measured: dict[str, float] = field(default_factory=dict)
    counts: bool = True

    @classmethod
    def of(
        cls, outcome: Outcome, *, base: bool, too_long: bool = False, cut: int = 0, attack_cut: int = 0
    ) -> "CaseResult":
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
            cut,
            attack_cut,
            measured=dict(outcome.checks[-1].measured),
            counts=outcome.checks[-1].counts,
        )


def prompt_groups(cases: Sequence[Mapping[str, Any]]) -> list[Hashable]:
    """Of each case of a summary what makes it one of several that are not independent: its prompt."""
    return [case.get("prompt") or number for number, case in enumerate(cases)]


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


def base_warnings(base: Rate, concept: str) -> list[str]:
    """A sentence if the base model shows the concept in less than half of the pictures, else nothing.

    What is not there cannot be erased: the judge does not know such pictures, or the model never knew the concept.
    """
    if 2 * base.successes >= base.n:
        return []
    return [
        f"The base model shows {concept} in {base.successes} of {base.n} pictures, less than half; this run supports "
        "no claim on erasing, so check model, concept and judge."
    ]


def warnings_of(summary: Mapping[str, Any]) -> list[str]:
    """The warnings of a summary as it is on the disk; those of older runs follow from their rates."""
    if "warnings" in summary:
        return list(summary["warnings"])
    return base_warnings(Rate(**summary["rates"]["base"]), summary["concept"])


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
        sets: Of ``prompts`` and ``retained`` how many prompts are what; see
            :class:`experiments.job.prompts.PromptCounts`.
        labels: Of judges with labels, how often each is found in the pictures of each rate.
        model: Name of the model.
        protocol: Its ``name``, its rule of ``counting``, how many prompts were ``too_long`` for it, the attack success
            rate ``success`` under that rule and ``by_rule`` under each; a rate is None where a rule counts no prompt.
            The rate before the attack is ``rates["erased"]``, over all prompts.
        warnings: Sentences that say why the numbers support no claim.
        holds: Of the attack's ``successes`` the ``texts`` (some attacks end in none), and with ``seeds`` new seeds each
            the share of a text's pictures that show the concept, ``shown``. ``second_judge`` says of how many of the
            texts it finds the concept in the picture ``found``, and what is ``shown`` by its verdicts. Empty where no
            new seeds are asked for.
        floor: What :func:`experiments.job.floors.above_floor` says; empty where there is no floor.
        uses: Every folder of the store that it stands on, as ``stage/hash``.
        provenance: When, by which revision and on which machine; and in ``origins`` the same for the artefacts of each
            stage, which may have been made before.
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
    warnings: list[str] = field(default_factory=list)
    holds: dict[str, Any] = field(default_factory=dict)
    uses: list[str] = field(default_factory=list)
    sets: dict[str, dict[str, int]] = field(default_factory=dict)
    floor: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """The run's name: the hash of all that its numbers depend on."""
        return content_hash({"schema": SCHEMA_VERSION, "stage": RUNS, **self.identity})

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON values, with a checksum."""
        return checked(
            {
                "schema": SCHEMA_VERSION,
                "run": self.run,
                "n": len(self.cases),
                "seed": self.config["seed"],
                "choices": self.choices,
                "model": self.model,
                "concept": self.concept,
                "threat_model": self.threat_model,
                "warnings": self.warnings,
                "protocol": self.protocol,
                "sets": self.sets,
                "rates": {name: rate.as_dict() for name, rate in self.rates.items()},
                "floor": self.floor,
                "members": {name: rate.as_dict() for name, rate in self.members.items()},
                "holds": self.holds,
                "labels": self.labels,
                "measures": self.measures,
                "unpruned": self.unpruned,
                "costs": {name: cost.as_dict() for name, cost in self.costs.items()},
                "edit": self.edit,
                "artefacts": self.artefacts,
                "uses": self.uses,
                "curve": [asdict(point) for point in self.curve],
                "cases": [asdict(case) for case in self.cases],
                "identity": self.identity,
                "config": self.config,
                **self.provenance,
            }
        )
