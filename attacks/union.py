"""Several attacks on the same prompts: the worst case."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, get_args

from pydantic import Field

from attacks.cases import JudgedPicture, Outcome, PromptCase, ThreatModel
from attacks.none import NoAttack
from attacks.p4d import P4D
from attacks.protocols import Attack, InsertsTokens, is_given_original
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.needs import NOTHING, Need, needs_of
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from evaluation.verdicts import Judge


@checked(arbitrary_types_allowed=True)
class Union:
    """The union of attacks, as AutoAttack (Croce and Hein, ICML 2020, arXiv 2003.01690) takes it.

        broken(case) = plain(case) or member_1(case) or ... or member_n(case)
    Each member is given the prompts that the plain prompt and the members before it left; the first success ends a
    case. A member searches as it would alone, with its own seed, but the plain prompt's picture is made only once. So
    the rate is that of the members' separate runs taken together, at the cost of fewer searches.

    Attributes:
        members: The attacks by name, in the order of trying: the cheapest first saves most.
        batch_size: Prompts that go through all members at a time. It has no effect on outcomes, but what a member
            trains for all prompts it trains once per batch.
    """

    members: Annotated[Mapping[str, Attack], Field(min_length=1)]
    batch_size: Annotated[int, Field(ge=1)] = 32

    @property
    def threat_model(self) -> ThreatModel:
        """The strongest of the members'."""
        return min((member.threat_model for member in self.members.values()), key=get_args(ThreatModel).index)

    @property
    def needs(self) -> frozenset[Need]:
        """What the members need of a model."""
        return NOTHING.union(*map(needs_of, self.members.values()))

    @property
    def needs_original(self) -> bool:
        """Whether a member needs the unedited model."""
        return any(map(is_given_original, self.members.values()))

    def run(
        self,
        model: TextToImage,
        cases: Sequence[PromptCase],
        judge: Judge,
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        original: TextToImage | None = None,
    ) -> Iterator[Outcome]:
        """Yield each case's outcome when a member succeeds or the last one ends.

        Args:
            model: The edited model.
            cases: The prompts, as the members need them.
            judge: Says whether a picture shows the concept.
            sampling: How pictures are sampled.
            original: The unedited model, for the members that need it.

        Raises:
            ValueError: A member refuses the model or the cases, or two cases have the same number.
        """
        by_number = {case.case_number: case for case in cases}
        waiting: list[tuple[PromptCase, Outcome]] = []
        for plain in NoAttack().run(model, cases, judge, sampling=sampling):
            if plain.success:
                yield plain
                continue
            waiting.append((by_number[plain.case_number], plain))
            if len(waiting) == self.batch_size:
                yield from self._attack(model, waiting, judge, sampling, original)
                waiting = []
        yield from self._attack(model, waiting, judge, sampling, original)

    def _attack(
        self,
        model: TextToImage,
        waiting: Sequence[tuple[PromptCase, Outcome]],
        judge: Judge,
        sampling: Sampling,
        original: TextToImage | None,
    ) -> Iterator[Outcome]:
        """Let the members in turn attack cases whose plain prompts failed."""
        left = [replace(case, plain=JudgedPicture(plain.success, plain.score, plain.image)) for case, plain in waiting]
        outcomes = {plain.case_number: plain for _, plain in waiting}
        *_, last = self.members
        for name, member in self.members.items():
            if not left:
                return
            run = member.run
            if is_given_original(member):
                run = partial(member.run, original=original)
            for outcome in run(model, left, judge, sampling=sampling):
                number = outcome.case_number
                outcomes[number] = continued(outcomes[number], outcome, name)
                if outcome.success or name == last:
                    yield outcomes.pop(number)
            left = [case for case in left if case.case_number in outcomes]


def inserted_tokens(attack: Attack, length: int, member: str = "") -> int:
    """How many tokens an attack puts beside a prompt of ``length`` tokens; 0 if it puts others in its place.

    Of a union it is what its ``member`` puts there, or the most that any does.
    """
    if isinstance(attack, Union):
        members = [attack.members[member]] if member in attack.members else attack.members.values()
        return max(inserted_tokens(other, length) for other in members)
    if isinstance(attack, P4D):
        return attack.inserted_tokens(length)
    return attack.tokens if isinstance(attack, InsertsTokens) else 0


def continued(earlier: Outcome, later: Outcome, name: str) -> Outcome:
    """Return the outcome of a failed attack and of the next one on the same case, ``name``, taken together.

    The first check of ``later``, the plain prompt's, repeats that of ``earlier`` and cost nothing.
    """
    before = earlier.checks[-1]
    checks = tuple(
        replace(
            check,
            attack=name,
            unet_evaluations=before.unet_evaluations + check.unet_evaluations,
            shared_evaluations=before.shared_evaluations + check.shared_evaluations,
            payments={**before.payments, **{f"{name}/{paid}": cost for paid, cost in check.payments.items()}},
        )
        for check in later.checks[1:]
    )
    if not checks:
        return earlier
    return replace(
        later,
        checks=earlier.checks + checks,
        unet_evaluations=earlier.unet_evaluations + later.unet_evaluations,
    )
