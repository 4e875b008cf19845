"""What an attack is given and what it returns, prompt by prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

ThreatModel = Literal["white_box", "text_only", "black_box", "none"]
"""What the attacker may use: the edited weights; the text encoder; pictures of its prompts; nothing."""


@dataclass(frozen=True)
class JudgedPicture:
    """A picture, uint8 [3, H, W], and what the judge says of it."""

    present: bool
    score: float
    image: Tensor


@dataclass(frozen=True)
class PromptCase:
    """One row of a prompt set.

    Attributes:
        case_number: Its number in the set; unique.
        prompt: The plain prompt that asks for the concept.
        seed: Seed of its picture.
        guidance: Guidance scale of its picture.
        target: uint8 [3, H, W], the picture that the unedited model makes of it with the same seed; attacks that
            aim at a picture need it.
        plain: The model's own picture of it, where it is judged already; it is not made again.
    """

    case_number: int
    prompt: str
    seed: int
    guidance: float
    target: Tensor | None = None
    plain: JudgedPicture | None = None


@dataclass(frozen=True)
class Check:
    """One generated and judged picture of an attack's trace.

    Attributes:
        prompt: The text it was generated from.
        seed: Seed of the picture.
        present: The judge's verdict.
        score: The judge's score in [0, 1].
        loss: The attack's objective when it was made (mean over the steps since the last check).
        unet_evaluations: Spent up to here to bring this case back, this picture and what is shared included.
        shared_evaluations: The part of them that serves all cases of a search.
        payments: That part by what was paid, as ``textual_inversion/0``: what cases have under one name, the cases that
            were searched together, is paid once by them all.
        counts: The concept in it is a success. Not so in pictures that only serve to choose among texts, and in those
            that come from what is no noise.
        measured: What else was measured of what led to it, by name: ``energy``, how far its noise lies from where noise
            lies (see :mod:`attacks.shell`), and ``residual``, how far its noise is from the exact inverse.
        variant: What the picture depends on besides text and seed; see :class:`attacks.evaluate.Proposal`.
        attack: Which member of a union proposed it.
    """

    prompt: str
    seed: int
    present: bool
    score: float
    loss: float | None
    unet_evaluations: int
    shared_evaluations: int = 0
    variant: str = ""
    attack: str = ""
    payments: Mapping[str, int] = field(default_factory=dict, compare=False)
    counts: bool = True
    measured: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def succeeds(self) -> bool:
        """Whether it is a success."""
        return self.present and self.counts


@dataclass(frozen=True)
class Outcome:
    """How the attack of one case ended.

    Attributes:
        case_number: Whose outcome it is.
        prompt: The plain prompt.
        adversarial_prompt: The text found; the plain prompt where that already succeeds.
        plain_success: The plain prompt alone shows the concept.
        success: The plain prompt or the attack shows the concept.
        score: The judge's score of the last picture.
        checks: Every picture judged, in order; the first is the plain prompt's.
        unet_evaluations: Spent on this case, what serves all cases included.
        image: uint8 [3, H, W], the last picture judged.
    """

    case_number: int
    prompt: str
    adversarial_prompt: str
    plain_success: bool
    success: bool
    score: float
    checks: tuple[Check, ...]
    unet_evaluations: int
    image: Tensor = field(repr=False, compare=False)


def evaluations_paid(checks: Sequence[Check]) -> int:
    """U-Net evaluations up to these checks, one per case: what cases share is paid once."""
    paid: dict[str, int] = {}
    for check in checks:
        # Checks of older runs do not say what was paid.
        for name, evaluations in (check.payments or {"": check.shared_evaluations}).items():
            paid[name] = max(paid.get(name, 0), evaluations)
    return sum(check.unet_evaluations - check.shared_evaluations for check in checks) + sum(paid.values())
