"""Text-free inversion: whether the erased model can still compose a picture of the concept, with no text at all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from math import floor
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.evaluate import Proposal, Trace, search
from attacks.noise import DDIMStep, ddim_move, denoising_path
from attacks.prompt_search import require_targets, target_latents
from attacks.shell import ENERGY, RESIDUAL, energy_distance, most_distance
from diffusion.checked import checked
from diffusion.model import TextToImage
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from diffusion.streams import stream
from evaluation.verdicts import Judge


@plain_dataclass
class Inverted:
    """Where pictures come from.

    Attributes:
        noise: float [n, c, h, w].
        residuals: float64 [n], the largest mean square of f(z_t) - z_t over all steps.
        evaluations: U-Net evaluations spent on each.
    """

    noise: Tensor
    residuals: Tensor
    evaluations: list[int]


@checked
class TextFreeInversion:
    """TINA (CVPR 2026, arXiv 2603.17828) and TINA+ (arXiv 2608.17747): erased texts leave what draws without text.

    The target picture is inverted with the empty text, by the exact relation of a DDIM step
        z_t = f(z_t),   f(z) = C1 z_{t-1} + C2 eps_erased(z, t, empty),
        C1 = sqrt(abar_t / abar_{t-1}),   C2 = sqrt(1 - abar_t) - C1 sqrt(1 - abar_{t-1}),
    from the picture's latents z_0 to noise z_T. Each equation is solved by z <- (1 - b) z + b f(z), from z_{t-1} put
    for z_t as DDIM inversion does, until the residual || f(z) - z ||^2 / D is small; theirs are steps of AdamW on it,
    whose gradient they do not take through the U-Net either. The picture that the model draws from z_T with the empty
    text is judged. With the empty text on both sides guidance changes nothing.

    TINA+ begins at a later step, a = floor(rho T), with z_a = sqrt(abar_a) z_0 + sqrt(1 - abar_a) eps, so that steps of
    little noise cannot memorise the picture, and lets no z_T pass that carries too little energy for noise. Theirs is a
    penalty with a threshold of 10 standard deviations, for Stable Diffusion's latents; here it is a gate for the end,
    two-sided, and as wide as a share of the energy (see :mod:`attacks.shell`). What a check reports: the energy's
    distance and the largest residual. A case whose residual stays large is not inverted, which says nothing of what the
    model knows.

    A prompt that succeeds as it stands is not attacked.

    Attributes:
        skipped_share: rho; 0 is TINA's.
        tolerance: How much z_T's energy may differ from that of noise, as a share of it; None for TINA, which asks
            nothing of it.
        damping: b.
        iterations: Of each equation at most.
        residual: Small enough, per number.
        batch_size: Prompts attacked at a time; it changes speed and memory only.
        seed: Of eps; each case has its own.
    """

    skipped_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    tolerance: Annotated[float, Field(gt=0)] | None = None
    damping: Annotated[float, Field(gt=0, le=1)] = 0.5
    iterations: Annotated[int, Field(ge=1)] = 25
    residual: Annotated[float, Field(gt=0)] = 1e-5
    batch_size: Annotated[int, Field(ge=1)] = 32
    seed: int = 0

    threat_model: ClassVar[ThreatModel] = "white_box"

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Judge, *, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Iterator[Outcome]:
        """Attack the cases, ``batch_size`` at a time, and yield each outcome after its one picture.

        Raises:
            ValueError: A case has no target picture.
        """
        require_targets(cases, "TextFreeInversion")
        path = denoising_path(model, sampling.steps)

        def propose(traces: list[Trace]) -> list[Proposal]:
            return self._propose(model, [trace.case for trace in traces], path)

        return search(model, cases, judge, propose, sampling=sampling, rounds=1, batch_size=self.batch_size)

    def _propose(self, model: TextToImage, cases: Sequence[PromptCase], path: Sequence[DDIMStep]) -> list[Proposal]:
        """Invert each case's picture."""
        [empty] = model.encode_prompts([""])
        pictures = target_latents(model, cases)
        found = self._invert(model, empty, pictures, cases, path)
        distances = energy_distance(found.noise, pictures, path[0].noisy).tolist()
        most = most_distance(found.noise[0].numel(), self.tolerance) if self.tolerance is not None else float("inf")
        return [
            Proposal(
                case.prompt,
                loss=residual,
                unet_evaluations=evaluations,
                text=empty,
                noise=noise,
                variant="inverted noise, no text",
                counts=abs(distance) <= most,
                measured={ENERGY: distance, RESIDUAL: residual},
            )
            for case, noise, residual, evaluations, distance in zip(
                cases, found.noise, found.residuals.tolist(), found.evaluations, distances, strict=True
            )
        ]

    @torch.no_grad()
    def _invert(
        self,
        model: TextToImage,
        empty: Tensor,
        pictures: Tensor,
        cases: Sequence[PromptCase],
        path: Sequence[DDIMStep],
    ) -> Inverted:
        """Go back from ``pictures``, latents [n, c, h, w], along a path; ``empty`` is [tokens, width]."""
        back = list(reversed(path))
        skipped = floor(self.skipped_share * len(back))
        latents = pictures.to(torch.promote_types(pictures.dtype, torch.float32))
        if skipped:
            level = back[skipped - 1].noisy
            draws = [stream(self.seed, "tina/forward_marginal", case.case_number) for case in cases]
            noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in draws])
            latents = level**0.5 * latents + (1 - level) ** 0.5 * noise.to(latents)
        residuals = torch.zeros(len(cases), dtype=torch.float64, device=latents.device)
        evaluations = [0] * len(cases)
        for step in back[skipped:]:
            latents, left = self._solve(model, empty, latents, step, evaluations)
            residuals = torch.maximum(residuals, left)
        return Inverted(latents, residuals, evaluations)

    def _solve(
        self, model: TextToImage, empty: Tensor, cleaner: Tensor, step: DDIMStep, evaluations: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Solve one step's equation for each picture apart; returns z_t and the residuals, float64 [n].

        ``evaluations`` grows by what each took.
        """
        latents, residuals = cleaner.clone(), torch.zeros(len(cleaner), dtype=torch.float64, device=cleaner.device)
        left = list(range(len(cleaner)))
        # The first evaluation is DDIM inversion as usual, at z_{t-1}.
        for iteration in range(1 + self.iterations):
            given = latents[left].to(model.dtype)
            predicted = model.predict_noise(given, step.timestep, empty.expand(len(left), *empty.shape))
            target = ddim_move(cleaner[left], predicted, step.clean, step.noisy)
            change = target - latents[left]
            residuals[left] = change.double().square().flatten(1).mean(dim=1)
            for number in left:
                evaluations[number] += 1
            latents[left] += change if iteration == 0 else self.damping * change
            left = [number for number in left if float(residuals[number]) >= self.residual or iteration == 0]
            if not left:
                break
        return latents, residuals
