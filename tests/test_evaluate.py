"""What every attack shares: which pictures are made, kept and counted."""

import gc
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attacks.cases import JudgedPicture, Outcome
from attacks.evaluate import Proposal, Trace, search
from diffusion.model import TextToImage
from diffusion.progress import progress_bar
from diffusion.sampling import Sampling
from evaluation.verdicts import Verdicts
from tests.attack_cases import make_cases
from tests.judges import never

SAMPLING = Sampling(steps=1, batch_size=4)
PICTURE = 2


def attack(model: TextToImage, texts: Sequence[Proposal | str], judge=never, count: int = 1) -> list[Outcome]:
    proposals = [Proposal(text) if isinstance(text, str) else text for text in texts]

    def propose(traces: list[Trace]) -> list[Proposal]:
        return [proposals[trace.attempts] for trace in traces]

    cases = make_cases(model, ["a church"] * count)
    return list(search(model, cases, judge, propose, sampling=SAMPLING, rounds=len(proposals), batch_size=count))


def picture(model: TextToImage, text: str) -> Tensor:
    (case,) = make_cases(model, ["a church"])
    return model.generate([text], seeds=[case.seed], steps=1, guidance=case.guidance)[0]


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """What is there already, some hundred thousand objects of libraries, is not looked through at every collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_of_every_case_only_the_last_picture_is_in_memory(tiny_model: TextToImage, only_new_objects: None) -> None:
    kept = []

    def counting(images: Tensor) -> Verdicts:
        gc.collect()
        kept.append(sum(isinstance(thing, JudgedPicture) for thing in gc.get_objects()))
        return never(images)

    before = sum(isinstance(thing, JudgedPicture) for thing in gc.get_objects())
    attack(tiny_model, [f"text {number}" for number in range(12)], counting, count=3)
    assert len(kept) == 13
    assert max(kept) - before == 3


@pytest.mark.parametrize(
    ("texts", "drawn"),
    [
        (["x", "x", "x"], 2),
        (["x", "y", "x"], 4),
        (["x", "x", "a church"], 3),
        (["x", "y", "x", "z"], 4),
        (["a church", "a church"], 1),
    ],
)
def test_a_text_is_drawn_again_only_where_its_picture_is_the_last_and_gone(
    tiny_model: TextToImage, texts: list[str], drawn: int
) -> None:
    (outcome,) = attack(tiny_model, texts)
    spent = tiny_model.unet_evaluations
    assert outcome.unet_evaluations == outcome.checks[-1].unet_evaluations == spent == drawn * PICTURE
    assert len(outcome.checks) == 1 + len(texts)
    assert torch.equal(outcome.image, picture(tiny_model, texts[-1]))
    assert all(one.unet_evaluations <= other.unet_evaluations for one, other in pairwise(outcome.checks))


def test_a_picture_that_does_not_count_ends_nothing_and_is_there_when_it_counts(tiny_model64: TextToImage) -> None:
    shown = picture(tiny_model64, "x")

    def judge(images: Tensor) -> Verdicts:
        return Verdicts(torch.tensor([torch.equal(image, shown) for image in images]), torch.zeros(len(images)))

    texts = [Proposal("x", counts=False), Proposal("y", counts=False), Proposal("x"), Proposal("never tried")]
    (outcome,) = attack(tiny_model64, texts, judge)
    assert [check.present for check in outcome.checks] == [False, True, False, True]
    assert [check.succeeds for check in outcome.checks] == [False, False, False, True]
    assert outcome.success
    assert not outcome.plain_success
    assert torch.equal(outcome.image, shown)


def test_further_pictures_of_the_plain_prompt_are_its_own_successes(tiny_model64: TextToImage) -> None:
    calls = []

    def second(images: Tensor) -> Verdicts:
        calls.append(len(images))
        return Verdicts(torch.tensor([len(calls) == 2] * len(images)), torch.zeros(len(images)))

    (outcome,) = attack(tiny_model64, [Proposal("a church", seed=7, plain=True), Proposal("x")], second)
    assert (outcome.plain_success, outcome.success, len(outcome.checks)) == (True, True, 2)


def test_more_cases_need_no_more_samplers(tiny_model: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    sampler = tiny_model.process.sampler

    def counted(name: str, steps: int) -> object:
        made.append(name)
        return sampler(name, steps)

    monkeypatch.setattr(tiny_model.process, "sampler", counted)
    attack(tiny_model, ["x"])
    alone = len(made)
    attack(tiny_model, ["x"], count=SAMPLING.batch_size)
    assert len(made) == 2 * alone


def test_rounds_are_told_before_the_first_case_has_ended(tiny_model: TextToImage) -> None:
    told = []
    with progress_bar("attack", 3) as bar:

        def telling(images: Tensor) -> Verdicts:
            told.append(bar.line().partition(", about")[0])
            return never(images)

        attack(tiny_model, ["x", "y", "z"], telling, count=3)
    assert told == [
        "attack: 0 of 3",
        "attack: 0 of 3",
        "attack: 0 of 3, round 1 of 3 with 3 in hand",
        "attack: 0 of 3, round 2 of 3 with 3 in hand",
    ]
