"""Whether found texts hold: once more with new seeds, and before a second judge."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from attacks.cases import Outcome
from diffusion.checked import checked
from diffusion.streams import derived_seed
from evaluation.prompt_sets import PromptRow
from evaluation.statistics import Mean, Rate

LARGEST_SEED = 2**31
"""New seeds lie below it, so that other programs take them too."""


def _judge(value: Any) -> Any:
    if value is not None and not callable(value):
        raise ValueError(f"judge is {value!r}; choose one as in transfer.judge=q16, or leave it out.")
    return value


@checked
class NewSeeds:
    """How found texts are tried once more. A success that is the luck of a seed does not hold, one of the text does.

    Attributes:
        seeds: New seeds for each text, the same whatever attack found it; none if 0.
        judge: A second judge of the pictures that were found and of the new ones, if any.
    """

    seeds: Annotated[int, Field(ge=0)] = 0
    judge: Annotated[Any, AfterValidator(_judge)] = None


def found_texts(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The attack's successes that come down to a text and a seed."""
    return [o for o in outcomes if o.success and not o.plain_success and not o.checks[-1].variant]


def rows_of(found: Sequence[Outcome], guidance: Sequence[float], seeds: int) -> list[PromptRow]:
    """Each text with each of its new seeds; ``guidance`` is one scale a text."""
    return [
        PromptRow(
            outcome.case_number,
            outcome.adversarial_prompt,
            derived_seed(0, "transfer/new_seeds", outcome.case_number, number) % LARGEST_SEED,
            scale,
        )
        for outcome, scale in zip(found, guidance, strict=True)
        for number in range(seeds)
    ]


def holding(seeds: int, successes: int, shown: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """What a summary says of found texts.

    Args:
        seeds: New seeds of each text.
        successes: Of the attack, whether they come down to a text or not.
        shown: For each text whether its pictures show the concept.
    """
    return {"seeds": seeds, "successes": successes, "texts": len(shown), "shown": _mean(shown)}


def second_opinion(found: Sequence[bool], shown: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """What a second judge says: of the pictures that were found, and of those with new seeds, text by text."""
    return {"found": Rate.of(found).as_dict() if found else None, "shown": _mean(shown)}


def by_text(verdicts: Sequence[bool], seeds: int) -> list[list[bool]]:
    """Verdicts of pictures, text by text."""
    return [list(verdicts[start : start + seeds]) for start in range(0, len(verdicts), seeds)]


def _mean(shown: Sequence[Sequence[bool]]) -> dict[str, Any] | None:
    """The mean share of a text's pictures that show the concept; the interval is over texts."""
    shares = [sum(verdicts) / len(verdicts) for verdicts in shown if verdicts]
    return asdict(Mean.bootstrapped(shares, seed=0)) if shares else None
