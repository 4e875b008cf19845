"""What an attack offers to those who run it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeGuard, runtime_checkable

from attacks.cases import Outcome, PromptCase, ThreatModel
from diffusion.model import TextToImage
from diffusion.prompt_template import Insertion
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from evaluation.verdicts import Judge


@runtime_checkable
class Attack(Protocol):
    """A search for prompts that bring an erased concept back."""

    @property
    def threat_model(self) -> ThreatModel:
        """What the attacker may use."""

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Judge, *, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Iterator[Outcome]:
        """Yield the outcome of each case as soon as it is known; no outcome depends on the other cases."""


@runtime_checkable
class ReferenceAttack(Attack, Protocol):
    """An attack that can be given the unedited model beside the edited one."""

    @property
    def needs_original(self) -> bool:
        """Whether it must be given it."""

    def run(
        self,
        model: TextToImage,
        cases: Sequence[PromptCase],
        judge: Judge,
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        original: TextToImage | None = None,
    ) -> Iterator[Outcome]:
        """See :class:`Attack`; ``original`` is the unedited model."""


@runtime_checkable
class InsertsTokens(Protocol):
    """An attack that puts a fixed number of tokens beside the prompt's own."""

    @property
    def tokens(self) -> int:
        """How many."""

    @property
    def insertion(self) -> Insertion:
        """Where."""


def one_for_each(outcomes: Iterable[Outcome], cases: Sequence[PromptCase], attack: Attack) -> Iterator[Outcome]:
    """Hand on ``outcomes``, and see to it that there is one for each of ``cases`` and no other.

    Raises:
        ValueError: ``attack`` drops a case, or yields one that it was not given, or twice, or something else.
    """
    name = f"Attack {type(attack).__module__}.{type(attack).__name__}"
    if not isinstance(outcomes, Iterable):
        raise ValueError(f"{name}.run returned {type(outcomes).__name__}; it must yield an Outcome for each case.")
    waiting = {case.case_number: case.prompt for case in cases}
    for outcome in outcomes:
        if not isinstance(outcome, Outcome):
            raise ValueError(f"{name}.run yielded {type(outcome).__name__}; it must yield an Outcome for each case.")
        if outcome.case_number not in waiting:
            known = any(case.case_number == outcome.case_number for case in cases)
            fault = "a second time" if known else "which it was not given"
            raise ValueError(f"{name} yielded case {outcome.case_number} {fault}; it must yield each case once.")
        del waiting[outcome.case_number]
        yield outcome
    if waiting:
        number, prompt = next(iter(waiting.items()))
        raise ValueError(
            f"{name} ended without an outcome for {len(waiting)} of {len(cases)} cases, the first of them case "
            f"{number} ({prompt!r}); it must yield each case once."
        )


def is_given_original(attack: Attack) -> TypeGuard[ReferenceAttack]:
    """Whether an attack must be given the unedited model."""
    return isinstance(attack, ReferenceAttack) and attack.needs_original
