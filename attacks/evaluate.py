"""What every attack shares: propose a text, make its picture, ask the judge, stop at the first success."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

from attacks.cases import Check, JudgedPicture, Outcome, PromptCase
from attacks.prompt_search import ATTACK_DIVERGED
from diffusion.finite import require_finite
from diffusion.model import TextToImage
from diffusion.progress import look_inside
from diffusion.sampling import Sampling
from evaluation.verdicts import Judge


@dataclass(frozen=True)
class Proposal:
    """A text to try on a case.

    Attributes:
        prompt: The text.
        seed: Seed of its picture; the case's own if None.
        loss: The attack's objective, mean over the steps that led here.
        unet_evaluations: Spent on finding it, for this case alone.
        shared_evaluations: Spent since the case's last proposal on what all cases use, as a model that was trained.
        text: float [tokens, width], what the picture is conditioned on in place of the encoded prompt.
        noise: float [c, h, w], what its sampling starts from in place of the seed's noise.
        variant: What the picture depends on besides text and seed, as ``step 20``: a picture is made once for each
            prompt, seed and variant. To be given with ``text``, with ``noise`` and wherever weights were changed.
        counts: The concept in its picture is a success and ends the search; not so of a picture that only serves to
            choose among texts.
        measured: What else was measured of what led here, by name; see :attr:`attacks.cases.Check.measured`.
        plain: It is a further picture of the plain prompt as it stands, proposed before any other text.
    """

    prompt: str
    seed: int | None = None
    loss: float | None = None
    unet_evaluations: int = 0
    shared_evaluations: int = 0
    text: Tensor | None = None
    noise: Tensor | None = None
    variant: str = ""
    counts: bool = True
    measured: Mapping[str, float] = field(default_factory=dict)
    plain: bool = False


PictureKey = tuple[str, int, str]
"""Text, seed and variant."""


class Trace:
    """One case under attack: its checks so far and what they cost.

    Attributes:
        case: The case.
        checks: One per text tried, the plain prompt first.
        unet_evaluations: Spent so far, what is shared included.
        shared_evaluations: Spent so far on what all cases use.
        search: The least number of a case of the search, which tells it from others.
        verdicts: Whether a picture shows the concept, and the judge's score, by text, seed and variant; where these are
            the same, the picture is.
        last: The picture of the last check, the only one that is kept.
        state: What an attack keeps of its search of the case; it goes with the case.
    """

    last: JudgedPicture

    def __init__(self, case: PromptCase, search: int = 0) -> None:
        self.case = case
        self.search = search
        self.checks: list[Check] = []
        self.unet_evaluations = 0
        self.shared_evaluations = 0
        self.verdicts: dict[PictureKey, tuple[bool, float]] = {}
        self.state: Any = None
        self._plain_checks = 0
        self._last_key: PictureKey | None = None
        if case.plain is not None:
            self.judge(self.key(Proposal(case.prompt)), case.plain)

    @property
    def attempts(self) -> int:
        """Texts tried, the plain prompt not counted."""
        return len(self.checks) - 1

    @property
    def succeeded(self) -> bool:
        """Whether the last picture shows the concept and counts."""
        return self.checks[-1].succeeds

    def outcome(self) -> Outcome:
        """Return how the attack ended, as it stands now."""
        return Outcome(
            case_number=self.case.case_number,
            prompt=self.case.prompt,
            adversarial_prompt=self.checks[-1].prompt,
            plain_success=any(check.present for check in self.checks[: self._plain_checks]),
            success=self.succeeded,
            score=self.checks[-1].score,
            checks=tuple(self.checks),
            unet_evaluations=self.unet_evaluations,
            image=self.last.image,
        )

    def key(self, proposal: Proposal) -> PictureKey:
        """Return what a picture depends on."""
        return proposal.prompt, self.case.seed if proposal.seed is None else proposal.seed, proposal.variant

    def must_draw(self, proposal: Proposal, *, last: bool) -> bool:
        """Whether a proposal's picture must be made: it is new, or it ends the case and is not at hand any more."""
        key = self.key(proposal)
        if key not in self.verdicts:
            return True
        present, _ = self.verdicts[key]
        return key != self._last_key and (last or (present and proposal.counts))

    def judge(self, key: PictureKey, picture: JudgedPicture) -> None:
        """Take a judged picture, and let go of the one before."""
        self.verdicts[key] = (picture.present, picture.score)
        self.last, self._last_key = picture, key

    def record(self, proposal: Proposal) -> None:
        """Add the check of a proposal whose picture is judged."""
        prompt, seed, variant = key = self.key(proposal)
        present, score = self.verdicts[key]
        if proposal.plain or not self.checks:
            self._plain_checks += 1
        self.checks.append(
            Check(
                prompt,
                seed,
                present,
                score,
                proposal.loss,
                self.unet_evaluations,
                self.shared_evaluations,
                variant,
                payments={str(self.search): self.shared_evaluations} if self.shared_evaluations else {},
                counts=proposal.counts,
                measured=proposal.measured,
            )
        )


Propose = Callable[[list[Trace]], list[Proposal]]
"""The next text for each of the cases in hand. A case's text must not depend on the other cases."""

Under = Callable[[str], AbstractContextManager[None]]
"""What the model is while it draws the pictures of a variant; the empty variant is the model as it stands."""


def search(
    model: TextToImage,
    cases: Sequence[PromptCase],
    judge: Judge,
    propose: Propose,
    *,
    sampling: Sampling,
    rounds: int,
    batch_size: int,
    under: Under | None = None,
) -> Iterator[Outcome]:
    """Try the plain prompt of every case, then up to ``rounds`` proposed texts; yield each case when it ends.

    A case ends at its first success. Its place in the batch goes to the next one that waits, so the batch stays full.
    A text that was judged before is not drawn again: its check repeats the verdict and costs nothing. Of a case the
    last picture alone is kept in memory; so where its very last text is one of earlier, that one is drawn again.

    Args:
        model: The model under attack.
        cases: The prompts, each with its own seed and guidance scale.
        judge: Says whether a picture shows the concept.
        propose: Gives the next text of every case in hand.
        sampling: How pictures are sampled.
        rounds: Texts per case at most, the plain prompt not counted.
        batch_size: Cases in hand at a time.
        under: For attacks that change weights: entered around the drawing of a variant's pictures, and left before
            anything is yielded.

    Raises:
        ValueError: Two cases have the same number.
    """
    (number, occurrences), *_ = Counter(case.case_number for case in cases).most_common(1) or [(0, 0)]
    if occurrences > 1:
        raise ValueError(f"case number {number} occurs {occurrences} times; number the cases of a prompt set uniquely.")
    first = min((case.case_number for case in cases), default=0)
    waiting = iter(cases)
    active: list[Trace] = []
    while True:
        while newcomers := [Trace(case, first) for case in islice(waiting, batch_size - len(active))]:
            check(model, newcomers, [Proposal(trace.case.prompt) for trace in newcomers], judge, sampling)
            for trace in newcomers:
                if trace.succeeded or rounds == 0:
                    yield trace.outcome()
                else:
                    active.append(trace)
        if not active:
            return
        proposals = propose(active)
        for trace, proposal in zip(active, proposals, strict=True):
            place = f"The attack's loss on case {trace.case.case_number} after {trace.attempts + 1} attempts"
            require_finite(0.0 if proposal.loss is None else proposal.loss, place, ATTACK_DIVERGED)
        check(model, active, proposals, judge, sampling, under, rounds=rounds)
        ended = [trace for trace in active if trace.succeeded or trace.attempts == rounds]
        active = [trace for trace in active if trace not in ended]
        _tell_rounds(active, rounds)
        yield from (trace.outcome() for trace in ended)


def _tell_rounds(active: Sequence[Trace], rounds: int) -> None:
    """Show how far the cases in hand have come, of which each may take all rounds."""
    done = [trace.attempts for trace in active]
    span = f"{min(done)} to {max(done)}" if len(set(done)) > 1 else f"{done[0]}" if done else ""
    look_inside(f"round {span} of {rounds} with {len(done)} in hand" if done else "", sum(done) / rounds)


def check(
    model: TextToImage,
    traces: Sequence[Trace],
    proposals: Sequence[Proposal],
    judge: Judge,
    sampling: Sampling,
    under: Under | None = None,
    *,
    rounds: int | None = None,
) -> None:
    """Make and judge the picture of one proposal per case and add it to the traces; see :func:`search`."""
    # One guided picture makes a whole batch pay for guidance; apart, a case's cost is its own.
    groups: dict[tuple[int, str], list[tuple[Trace, Proposal]]] = defaultdict(list)
    for trace, proposal in zip(traces, proposals, strict=True):
        if trace.must_draw(proposal, last=trace.attempts + 1 == rounds):
            evaluations = model.evaluations_per_step(trace.case.guidance)
            groups[evaluations, proposal.variant if under else ""].append((trace, proposal))
    steps = len(model.sampling_timesteps(sampling.steps)) if groups else 0
    for (evaluations, variant), group in groups.items():
        for start in range(0, len(group), sampling.batch_size):
            batch = group[start : start + sampling.batch_size]
            with under(variant) if under and variant else nullcontext():
                images = draw(model, batch, sampling)
            verdicts = judge(images)
            for (trace, proposal), image, present, score in zip(
                batch, images, verdicts.present.tolist(), verdicts.score.tolist(), strict=True
            ):
                trace.judge(trace.key(proposal), JudgedPicture(present, score, image.clone()))
                trace.unet_evaluations += steps * evaluations
    for trace, proposal in zip(traces, proposals, strict=True):
        trace.unet_evaluations += proposal.unet_evaluations + proposal.shared_evaluations
        trace.shared_evaluations += proposal.shared_evaluations
        trace.record(proposal)


def draw(model: TextToImage, batch: Sequence[tuple[Trace, Proposal]], sampling: Sampling) -> Tensor:
    """Make the pictures of proposals in one batch; uint8 [n, 3, H, W]."""
    seeds = [trace.key(proposal)[1] for trace, proposal in batch]
    text = model.encode_prompts([proposal.prompt for _, proposal in batch], batch_size=sampling.batch_size)
    noise = model.initial_latents(seeds)
    for row, (_, proposal) in enumerate(batch):
        if proposal.text is not None:
            text[row] = proposal.text
        if proposal.noise is not None:
            noise[row] = proposal.noise
    latents = model.sample(
        text,
        seeds=seeds,
        noise=noise,
        steps=sampling.steps,
        guidance=[trace.case.guidance for trace, _ in batch],
        batch_size=sampling.batch_size,
    )
    return model.decode(latents, batch_size=sampling.batch_size)
