"""What an attack offers to those who run it."""

from collections.abc import Iterator, Sequence
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


def is_given_original(attack: Attack) -> TypeGuard[ReferenceAttack]:
    """Whether an attack must be given the unedited model."""
    return isinstance(attack, ReferenceAttack) and attack.needs_original
