"""Unions of attacks: the first member that succeeds, at the members' own cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError

from attacks.cases import Outcome, PromptCase, evaluations_paid
from attacks.evaluate import Proposal, search
from attacks.none import NoAttack
from attacks.p4d import P4D
from attacks.protocols import Attack, ReferenceAttack
from attacks.random_tokens import RandomTokens
from attacks.ringabell import RingABell
from attacks.seed_search import SeedSearch
from attacks.union import Union
from diffusion.model import TextToImage
from diffusion.sampling import Sampling
from tests.judges import never, one_in

SAMPLING = Sampling(steps=1, batch_size=3)
PICTURE = 2 * SAMPLING.steps
by_pixels = one_in(4)
CASES = [
    PromptCase(number, prompt, 50 + number, 3.0)
    for number, prompt in enumerate(["a church", "a red fish", "a golf ball", "two fish", "a church"])
]
MEMBERS: dict[str, Attack] = {
    "random": RandomTokens(tries=2),
    "seeds": SeedSearch(tries=2),
    "more": RandomTokens(tries=2, seed=1),
}


@dataclass(frozen=True)
class Trained:
    """An attack that pays 7 evaluations once for all cases, and 1 for each."""

    threat_model: ClassVar[str] = "white_box"

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Any, *, sampling: Sampling
    ) -> Iterator[Outcome]:
        def propose(traces: list) -> list[Proposal]:
            return [
                Proposal(f"x {trace.case.prompt}", unet_evaluations=1, shared_evaluations=0 if trace.attempts else 7)
                for trace in traces
            ]

        return search(model, cases, judge, propose, sampling=sampling, rounds=2, batch_size=8)


def run(
    attack: Attack, model: TextToImage, cases: Sequence[PromptCase] = CASES, judge: Any = by_pixels
) -> list[Outcome]:
    return sorted(attack.run(model, cases, judge, sampling=SAMPLING), key=lambda outcome: outcome.case_number)


def test_an_outcome_strings_together_the_members_own_searches_up_to_the_first_success(
    tiny_model64: TextToImage,
) -> None:
    together = run(Union(MEMBERS), tiny_model64)
    alone = {name: run(member, tiny_model64) for name, member in MEMBERS.items()}
    endings = set()
    for number, outcome in enumerate(together):
        searches = {name: outcomes[number] for name, outcomes in alone.items()}
        plain = searches["random"].checks[0]
        expected, spent, ending = [plain], PICTURE, ""
        for name, search_ in searches.items():
            if expected[-1].present:
                break
            for check in search_.checks[1:]:
                total = spent + check.unet_evaluations - PICTURE
                expected.append(replace(check, attack=name, unet_evaluations=total))
            spent, ending = expected[-1].unet_evaluations, name
        assert outcome.checks == tuple(expected)
        last = expected[-1]
        assert (outcome.success, outcome.plain_success) == (last.present, plain.present)
        assert (outcome.adversarial_prompt, outcome.score) == (last.prompt, last.score)
        assert outcome.unet_evaluations == spent
        assert torch.equal(
            outcome.image, tiny_model64.generate([last.prompt], seeds=[last.seed], steps=1, guidance=3.0)[0]
        )
        assert outcome.success == any(search_.success for search_ in searches.values())
        endings.add((ending, outcome.success))
    assert endings >= {("", True), ("random", True), ("seeds", True), ("more", True), ("more", False)}, (
        "the example should show every ending"
    )


def test_the_plain_picture_is_made_once_and_every_cost_is_exact(tiny_model: TextToImage) -> None:
    outcomes = run(Union(MEMBERS), tiny_model, judge=never)
    assert tiny_model.unet_evaluations == len(CASES) * (1 + 2 + 2 + 2) * PICTURE
    assert {outcome.unet_evaluations for outcome in outcomes} == {7 * PICTURE}
    before = tiny_model.unet_evaluations
    outcomes = run(Union(MEMBERS), tiny_model)
    assert tiny_model.unet_evaluations - before == sum(outcome.unet_evaluations for outcome in outcomes)


def test_what_members_share_among_cases_is_paid_once(tiny_model: TextToImage) -> None:
    outcomes = run(
        Union({"random": RandomTokens(tries=1), "one": Trained(), "two": Trained()}), tiny_model, judge=never
    )
    assert {outcome.checks[-1].shared_evaluations for outcome in outcomes} == {14}
    drawn = len(CASES) * 4 * PICTURE  # plain, random and each member's one text
    assert tiny_model.unet_evaluations == drawn
    own = len(CASES) * (2 + 2)
    assert evaluations_paid([outcome.checks[-1] for outcome in outcomes]) == drawn + own + 14


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_what_members_share_is_paid_once_in_every_batch(tiny_model: TextToImage, batch_size: int) -> None:
    """The training of :class:`tests.test_union.Trained` is run by each batch, and for each member."""
    union = Union({"one": Trained(), "inner": Union({"two": Trained()}, batch_size=2)}, batch_size=batch_size)
    outcomes = run(union, tiny_model, judge=never)
    batches = -(-len(CASES) // batch_size)
    inner = sum(-(-min(batch_size, len(CASES) - start) // 2) for start in range(0, len(CASES), batch_size))
    drawn = len(CASES) * 3 * PICTURE
    assert tiny_model.unet_evaluations == drawn
    paid = drawn + len(CASES) * 4 + 7 * batches + 7 * inner
    assert evaluations_paid([outcome.checks[-1] for outcome in outcomes]) == paid


def test_outcomes_do_not_depend_on_batch_size_or_order(tiny_model64: TextToImage) -> None:
    union = Union(MEMBERS, batch_size=2)
    together = run(Union(MEMBERS), tiny_model64, CASES[::-1])
    assert run(union, tiny_model64) == together
    assert run(union, tiny_model64, CASES[4:5]) == together[4:5]


def test_successes_come_before_the_next_member_begins(tiny_model: TextToImage) -> None:
    @dataclass(frozen=True)
    class Failing:
        threat_model: ClassVar[str] = "none"

        def run(self, *_: Any, **__: Any) -> Iterator[Outcome]:
            raise RuntimeError("begun")

    union = Union({"random": RandomTokens(tries=2), "failing": Failing()})
    yielded = []
    with pytest.raises(RuntimeError, match="begun"):
        yielded.extend(union.run(tiny_model, CASES, by_pixels, sampling=SAMPLING))  # type: ignore[func-returns-value]


def test_a_member_that_tries_nothing_changes_nothing(tiny_model: TextToImage) -> None:
    (alone,) = run(Union({"random": RandomTokens(tries=1)}), tiny_model, CASES[:1], never)
    (outcome,) = run(Union({"random": RandomTokens(tries=1), "none": NoAttack()}), tiny_model, CASES[:1], never)
    assert outcome == alone


def test_the_strongest_member_names_the_threat_model() -> None:
    pairs = (("a church", "a picture"),)
    black, text, white = RandomTokens(), RingABell(pairs=pairs), P4D()
    assert Union({"none": NoAttack()}).threat_model == "none"
    assert Union({"none": NoAttack(), "random": black}).threat_model == "black_box"
    assert Union({"text": text, "random": black}).threat_model == "text_only"
    assert Union({"text": text, "white": white, "random": black}).threat_model == "white_box"


def test_only_members_that_need_the_unedited_model_are_given_it(tiny_model: TextToImage) -> None:
    given = []

    @dataclass(frozen=True)
    class Referring:
        threat_model: ClassVar[str] = "white_box"
        needs_original: ClassVar[bool] = True

        def run(self, *arguments: Any, original: TextToImage | None = None, **named: Any) -> Iterator[Outcome]:
            given.append(original)
            return NoAttack().run(*arguments, **named)

    union = Union({"inner": Union({"random": RandomTokens(tries=1), "referring": Referring()})})
    assert isinstance(union, ReferenceAttack)
    assert union.needs_original
    assert not Union(MEMBERS).needs_original
    list(union.run(tiny_model, CASES[:2], never, sampling=SAMPLING, original=tiny_model))
    assert given == [tiny_model]


@pytest.mark.parametrize("members", [{}, {"x": 3}, None])
def test_members_must_be_attacks(members: Any) -> None:
    with pytest.raises(ValidationError, match="members"):
        Union(members=members)


def test_two_cases_of_one_number_are_refused(tiny_model: TextToImage) -> None:
    with pytest.raises(ValueError, match="case number 0 occurs 2 times"):
        run(Union(MEMBERS, batch_size=1), tiny_model, [CASES[0], CASES[0]])
