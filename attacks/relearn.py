"""Relearning: a few training steps on a few pictures, and a look at how soon the concept is back."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass as plain_dataclass
from itertools import pairwise
from statistics import fmean
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.evaluate import Proposal, Trace, search
from attacks.prompt_pairs import Pairs, draw_in_turn, resolve_pairs
from attacks.prompt_search import ATTACK_DIVERGED, summed_errors
from diffusion.checked import checked
from diffusion.finite import require_finite
from diffusion.model import TextToImage
from diffusion.parameters import matching_parameters, substituted
from diffusion.progress import look_inside
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from diffusion.streams import stream
from evaluation.verdicts import Judge

log = logging.getLogger(__name__)

FIRST_COSINE = "first_step_cosine"
"""Name of :func:`first_cosine` among what a check has measured."""


def _increasing(checks: tuple[int, ...]) -> tuple[int, ...]:
    if all(earlier < later for earlier, later in pairwise((0, *checks))):
        return checks
    raise ValueError(f"checks is {[*checks]}; it must be a list of growing numbers of steps from 1 on, as [1, 10, 50].")


@plain_dataclass(frozen=True)
class Snapshot:
    """The weights at a check.

    Attributes:
        weights: By name, on the CPU, in the model's precision.
        loss: Mean over the steps since the check before.
        unet_evaluations: Spent since then; with the first, on the pictures too.
        first_cosine: How far the first step leads back to the unedited model; see :func:`first_cosine`. None if the
            weights are those already.
    """

    weights: dict[str, Tensor]
    loss: float
    unet_evaluations: int
    first_cosine: float | None = None


@checked
class Relearn:
    """Relearning, as in Suriyakumar et al. (arXiv 2410.08074), who fine-tune on pictures of something else.

    The edited U-Net theta is trained with the ordinary denoising loss on pictures x0 that the unedited model made of
    the prompts p:
        minimise over theta   E_{x0, t, eps} || eps - eps_theta(sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, t, text(p)) ||^2
    After given numbers of steps the plain prompts are drawn with the weights of that moment; the first picture of the
    concept ends a case. The training is one for all cases, and no case takes part in it. What is only asleep comes back
    within few steps, what is gone must be learned anew, as a model must that never knew it: only beside that one the
    steps that it takes say something (see :mod:`evaluation.savings`). The steps at which half of the prompts show the
    concept are logged. Every check also reports the cosine between the first step, -gradient at theta, and the way
    back, theta of the unedited model minus theta, over the parameters that are trained.

    Attributes:
        pairs: Prompts with the concept and without it, or a CSV file of them with the columns ``with`` and ``without``.
        pictures: Of which the pictures are: ``concept``, the prompts with it; ``other``, those without; or
            ``neighbours``, the phrases of that field.
        neighbours: Phrases of concepts near this one.
        count: How many pictures; the first prompts take turns.
        guidance: Guidance scale of the pictures; they take the sampling steps of the plain prompts'.
        checks: Numbers of training steps after which the plain prompts are drawn.
        pictures_per_step: Drawn with replacement.
        learning_rate: AdamW's step size.
        weight_decay: AdamW's decay.
        parameters: Which parameters of the U-Net are trained, a pattern for their names, as ``*.attn2.*``.
        keep_zeros: Keep the zeros of matrices and kernels at zero: what pruning took away stays away.
        batch_size: Prompts at a time; it changes speed and memory, never an outcome.
        seed: Seed of the pictures and of the training.
    """

    pairs: Pairs
    pictures: Literal["concept", "other", "neighbours"] = "concept"
    neighbours: tuple[str, ...] = ()
    count: Annotated[int, Field(ge=1)] = 8
    guidance: Annotated[float, Field(ge=1)] = 7.5
    checks: Annotated[tuple[int, ...], Field(min_length=1), AfterValidator(_increasing)] = (1, 2, 5, 10, 20, 50)
    pictures_per_step: Annotated[int, Field(ge=1)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    parameters: str = "*"
    keep_zeros: bool = False
    batch_size: Annotated[int, Field(ge=1)] = 64
    seed: int = 0

    threat_model: ClassVar[ThreatModel] = "white_box"
    needs_original: ClassVar[Literal[True]] = True

    def run(
        self,
        model: TextToImage,
        cases: Sequence[PromptCase],
        judge: Judge,
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        original: TextToImage | None = None,
    ) -> Iterator[Outcome]:
        """Yield each case's outcome when it ends; the model's own weights are never touched.

        Args:
            model: The edited model.
            cases: The prompts.
            judge: Says whether a picture shows the concept.
            sampling: How pictures are sampled.
            original: The unedited model, which makes the pictures. Its evaluations are shared like the training's.

        Raises:
            ValueError: ``original`` or a neighbour is missing, or no parameter of the U-Net has a name like
                ``parameters``.
        """
        if original is None:
            raise ValueError("original is None; relearning needs the unedited model's pictures: give it that model.")
        if self.pictures == "neighbours" and not self.neighbours:
            raise ValueError(
                "pictures is neighbours and neighbours is empty; name phrases of concepts near this one, as the field "
                "preserved of a concept does, or take pictures=concept or pictures=other."
            )
        matching_parameters(model, self.parameters)  # refuses a pattern that nothing matches
        training = self.train(model, original, sampling)
        snapshots: dict[str, Snapshot] = {}

        def propose(traces: list[Trace]) -> list[Proposal]:
            proposals = []
            for trace in traces:
                variant = _variant(self.checks[trace.attempts])
                # A case is at most one check ahead of what was trained.
                reached = snapshots[variant] if variant in snapshots else next(training)
                snapshots[variant] = reached
                proposals.append(
                    Proposal(
                        trace.case.prompt,
                        loss=reached.loss,
                        shared_evaluations=reached.unet_evaluations,
                        variant=variant,
                        measured=measured(reached),
                    )
                )
            return proposals

        def under(variant: str) -> AbstractContextManager[None]:
            weights = {name: weight.to(model.device) for name, weight in snapshots[variant].weights.items()}
            return substituted(model, weights)

        return self._reported(
            search(
                model,
                cases,
                judge,
                propose,
                sampling=sampling,
                rounds=len(self.checks),
                batch_size=self.batch_size,
                under=under,
            )
        )

    def train(self, model: TextToImage, original: TextToImage, sampling: Sampling) -> Iterator[Snapshot]:
        """Train copies of the model's weights from check to check, each when its turn comes.

        Args:
            model: The edited model; between checks it is as it was.
            original: The unedited model.
            sampling: How its pictures are sampled.
        """
        spent = original.unet_evaluations
        pairs = resolve_pairs(self.pairs)
        sides = {
            "concept": [present for present, _ in pairs],
            "other": [absent for _, absent in pairs],
            "neighbours": list(self.neighbours),
        }[self.pictures]
        seeds = torch.randint(2**31, (self.count,), generator=stream(self.seed, "relearn/pictures")).tolist()
        prompts, images = draw_in_turn(original, sides, seeds, self.guidance, sampling)
        latents = model.encode_images(images, batch_size=sampling.batch_size)
        text = model.encode_prompts(prompts, batch_size=sampling.batch_size)
        evaluations = original.unet_evaluations - spent

        own = matching_parameters(model, self.parameters)
        # Adam's steps are too small for half precision.
        weights = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True).requires_grad_()
            for name, weight in own.items()
        }
        cosine: float | None = None
        zeros = {name: weight == 0 for name, weight in own.items() if self.keep_zeros and weight.ndim >= 2}
        optimizer = torch.optim.AdamW(weights.values(), lr=self.learning_rate, weight_decay=self.weight_decay)
        for done, check in pairwise((0, *self.checks)):
            losses = []
            for step in range(done, check):
                look_inside(f"training step {step} of {self.checks[-1]}", 0.0)
                generator = stream(self.seed, "relearn/training", step)
                losses.append(denoising_gradient(model, weights, latents, text, self.pictures_per_step, generator))
                if step == 0:
                    cosine = first_cosine(weights, matching_parameters(original, self.parameters))
                optimizer.step()
                with torch.no_grad():
                    for name, where in zeros.items():
                        weights[name].masked_fill_(where, 0)
            evaluations += (check - done) * self.pictures_per_step
            reached = {name: weight.detach().to("cpu", model.dtype, copy=True) for name, weight in weights.items()}
            yield Snapshot(reached, fmean(losses), evaluations, cosine)
            evaluations = 0

    def _reported(self, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
        """Pass outcomes on, and log after how many steps half of the prompts show the concept."""
        attempts = []
        for outcome in outcomes:
            attempts.append(len(outcome.checks) - 1 if outcome.success else len(self.checks) + 1)
            yield outcome
        for attempt, steps in enumerate((0, *self.checks)):
            if attempts and 2 * sum(needed <= attempt for needed in attempts) >= len(attempts):
                log.info("relearn: half of %d prompts show the concept after %d steps", len(attempts), steps)
                return
        log.info("relearn: %d steps bring back less than half of %d prompts", self.checks[-1], len(attempts))


def denoising_gradient(
    model: TextToImage,
    weights: Mapping[str, Tensor],
    latents: Tensor,
    text: Tensor,
    size: int,
    generator: torch.Generator,
) -> float:
    """Give ``weights`` the gradient of the denoising loss on some pictures, and return the loss.

    Args:
        model: Whose U-Net predicts, with ``weights`` in place of its own; those are left as they are.
        weights: float32 or float64 leaves by parameter name.
        latents: float [n, c, h, w], pictures.
        text: float [n, tokens, width], what they are of.
        size: How many are drawn, each with a timestep and noise of its own.
        generator: The only source of the draws.
    """
    picks = torch.randint(len(latents), (size,), generator=generator)
    timesteps = torch.randint(model.training_timesteps, (size,), generator=generator).to(model.device)
    noise = torch.randn((size, *model.latent_shape), generator=generator).to(latents)
    noisy = model.add_noise(latents[picks], noise, timesteps)
    with torch.enable_grad(), substituted(model, {name: weight.to(model.dtype) for name, weight in weights.items()}):
        # A sum, because the gradient of a mean over many pixels underflows in half precision.
        total = summed_errors(model.predict_noise(noisy, timesteps, text[picks]), noise, "l2").sum()
        require_finite(total.detach(), "The loss of relearning", ATTACK_DIVERGED)
        gradients = torch.autograd.grad(total, list(weights.values()), materialize_grads=True)
    for weight, gradient in zip(weights.values(), gradients, strict=True):
        weight.grad = gradient / noise.numel()
    return total.item() / noise.numel()


def first_cosine(weights: Mapping[str, Tensor], unedited: Mapping[str, Tensor]) -> float | None:
    """The cosine between a step down the gradient and the way back to the unedited weights, over all parameters.

    Args:
        weights: By name, with their gradients.
        unedited: The same of the unedited model; what one of them alone has is left out.

    Returns:
        -1 to 1; None if there is no way or no gradient.
    """
    products = [0.0, 0.0, 0.0]
    for name, weight in weights.items():
        if name in unedited and weight.grad is not None:
            down = -weight.grad.double().flatten()
            back = unedited[name].detach().to(down.device, torch.float64).flatten() - weight.detach().double().flatten()
            products = [
                total + float(one @ other)
                for total, one, other in zip(products, (down, down, back), (back, down, back), strict=True)
            ]
    size = (products[1] * products[2]) ** 0.5
    return products[0] / size if size else None


def measured(snapshot: Snapshot) -> dict[str, float]:
    """What a check of this snapshot reports."""
    return {} if snapshot.first_cosine is None else {FIRST_COSINE: snapshot.first_cosine}


def variant_step(variant: str) -> int:
    """The training step that the variant of a check names.

    >>> variant_step("step 20")
    20
    """
    return int(variant.removeprefix("step "))


def _variant(steps: int) -> str:
    return f"step {steps}"
