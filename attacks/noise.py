"""Noise attacks: the plain prompt from an initial noise in which the erased model draws the concept all the same."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attacks.cases import Outcome, PromptCase, ThreatModel
from attacks.evaluate import Proposal, Trace, search
from attacks.prompt_search import ATTACK_DIVERGED, require_targets, target_latents
from attacks.shell import ENERGY, RESIDUAL, TOLERANCE, energy_distance, most_distance
from diffusion.checked import checked
from diffusion.finite import require_finite
from diffusion.model import UNGUIDED, TextToImage
from diffusion.sampling import DEFAULT_SAMPLING, Sampling
from evaluation.verdicts import Judge

Predict = Callable[[Tensor, int], Tensor]
"""Latents and their timestep to the noise in them; made anew for each pass over the steps, as it may remember."""


@plain_dataclass
class NoiseSearch:
    """The search on one prompt.

    Attributes:
        target: float [c, h, w], latents of the picture x0.
        seeded: float [c, h, w], the noise z of the prompt's seed.
        noise: float [c, h, w], the noise as it stands; single precision at least, like ``seeded``.
        steps: Steps taken.
    """

    target: Tensor
    seeded: Tensor
    noise: Tensor
    steps: int = 0


@plain_dataclass
class DDIMStep:
    """One step of the sampler: from ``timestep``, where abar is ``noisy``, to where it is ``clean``.

    ``number`` is its place among all steps of a picture.
    """

    timestep: int
    noisy: float
    clean: float
    number: int


@checked
class NoiseAttack:
    """What the erased model still draws of the plain prompt x0's picture if the noise is chosen instead of seeded.

    ``adversarial``: the nearest picture that a small change of the seed's noise z leads to,
        minimise over z'   || G(z') - x0 ||^2   subject to   || z' - z || <= radius || z ||
    with G a deterministic DDIM sampler (Song et al., ICLR 2021) of the erased model that takes ``unrolled_steps`` of
    the steps of a picture, with the prompt and its guidance; the gradient goes back through all of them. Each step is
    one of projected gradient descent (Madry et al., ICLR 2018): along the gradient's direction by
    ``step_size`` * radius || z ||, then back into the ball. Pictures are made with all steps, ``checks`` times; the
    first success ends the search. The noise's share in what brought the concept back is so bounded by ``radius``; a
    new seed lies at about 1.4 (sqrt 2).

    ``inversion``: the noise that x0 itself comes from, after "Memories of Forgotten Concepts" (Rusanovsky et al.,
    CVPR 2025, arXiv 2412.00782): a model without the concept should need an unlikely one. DDIM is run backwards,
        x_t = sqrt(abar_t / abar_s) x_s + (sqrt(1 - abar_t) - sqrt(abar_t (1 - abar_s) / abar_s)) eps_erased(x, t)
    from every s to the noisier t, with x = x_s at first and x_t as found so far in each further one of
    ``inversion_iterations`` (fixed-point iteration: the exact inverse is at x = x_t). One picture is made from the
    noise found. The loss of its check is -log N(noise; 0, I) per number in nats; 1.42 is that of seeded noise. Their
    inversion is another one and starts with the VAE's; this is its simplest form. Any picture can be coded in latents
    that are no noise, also by a model that has learned nothing: a success counts only if the noise found lies where
    noise lies, within ``tolerance`` either way.

    Both report their noise's distance from there, in standard deviations of its energy; see :mod:`attacks.shell`.

    A prompt that succeeds as it stands is not attacked.

    Attributes:
        mode: Which of the two.
        radius: Of the ball, in units of the norm of the seed's noise.
        unit_variance: Keep to noise of the norm of the seed's, within the ball: what is projected on is the part of
            the sphere that lies in it.
        unrolled_steps: Steps of G, spread evenly over those of a picture. The U-Net runs twice at each: its
            activations are computed again for the gradient (checkpointing), so memory does not grow with them. Under a
            guard that remembers what it was given, as SLD's, it runs once and memory grows.
        checks: Pictures per prompt.
        steps_per_check: Gradient steps before each.
        step_size: In units of the ball's radius.
        inverted_with: What eps_erased of the inversion is given: the ``plain`` prompt, the ``empty`` one, or the
            plain prompt with its ``guidance``, as the picture is made.
        inversion_iterations: Of the fixed point; 1 is DDIM inversion as usual.
        tolerance: How much the energy of an inversion's noise may differ from that of noise, as a share of it; None
            for as much as it likes.
        batch_size: Prompts attacked at a time; it changes speed and memory only. Nothing is drawn.
    """

    mode: Literal["adversarial", "inversion"] = "adversarial"
    radius: Annotated[float, Field(gt=0, le=2)] = 0.3
    unit_variance: bool = True
    unrolled_steps: Annotated[int, Field(ge=1)] = 4
    checks: Annotated[int, Field(ge=1)] = 7
    steps_per_check: Annotated[int, Field(ge=1)] = 5
    step_size: Annotated[float, Field(gt=0)] = 0.2
    inverted_with: Literal["plain", "empty", "guidance"] = "plain"
    inversion_iterations: Annotated[int, Field(ge=1)] = 1
    tolerance: Annotated[float, Field(gt=0)] | None = TOLERANCE
    batch_size: Annotated[int, Field(ge=1)] = 32

    threat_model: ClassVar[ThreatModel] = "white_box"

    def run(
        self, model: TextToImage, cases: Sequence[PromptCase], judge: Judge, *, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Iterator[Outcome]:
        """Attack the cases, ``batch_size`` at a time, and yield each outcome when its checks end.

        Raises:
            ValueError: A case has no target picture, or ``unrolled_steps`` are more than a picture has.
        """
        require_targets(cases, "NoiseAttack")
        path = denoising_path(model, sampling.steps)
        if self.mode == "adversarial":
            path = thinned(path, self.unrolled_steps)
        propose_group = self._descend if self.mode == "adversarial" else self._invert

        def propose(traces: list[Trace]) -> list[Proposal]:
            self._begin(model, [trace for trace in traces if trace.attempts == 0])
            proposals: dict[int, Proposal] = {}
            # One guided prompt makes a whole batch pay for guidance; apart, a case's cost is its own.
            for guided in (True, False):
                group = [trace for trace in traces if self._is_guided(model, trace.case) == guided]
                if group:
                    numbers = [trace.case.case_number for trace in group]
                    found = propose_group(model, group, path, guided=guided)
                    proposals |= zip(numbers, found, strict=True)
            return [proposals[trace.case.case_number] for trace in traces]

        rounds = self.checks if self.mode == "adversarial" else 1
        return search(model, cases, judge, propose, sampling=sampling, rounds=rounds, batch_size=self.batch_size)

    def _is_guided(self, model: TextToImage, case: PromptCase) -> bool:
        """Return whether the attack evaluates more than the case's prompt."""
        return model.is_guided(case.guidance) and (self.mode == "adversarial" or self.inverted_with == "guidance")

    def _begin(self, model: TextToImage, traces: Sequence[Trace]) -> None:
        """Start a search for each case."""
        if not traces:
            return
        targets = target_latents(model, [trace.case for trace in traces])
        seeded = model.initial_latents([trace.case.seed for trace in traces])
        seeded = seeded.to(torch.promote_types(seeded.dtype, torch.float32))
        for trace, target, noise in zip(traces, targets, seeded, strict=True):
            trace.state = NoiseSearch(target, noise, noise)

    def _predictor(
        self, model: TextToImage, traces: Sequence[Trace], *, guided: bool, empty: bool = False
    ) -> Callable[[Iterable[DDIMStep]], Predict]:
        """Return what makes the prediction, at steps in turn, for the cases' prompts or for as many empty ones."""
        cases = [trace.case for trace in traces]
        text = model.encode_prompts(["" if empty else case.prompt for case in cases])
        if not guided:
            return lambda _: lambda latents, timestep: model.predict_noise(latents, timestep, text)
        nothing = model.encode_prompts([""])
        scales = torch.tensor([max(case.guidance, UNGUIDED) for case in cases], device=model.device, dtype=model.dtype)

        def begin(steps: Iterable[DDIMStep]) -> Predict:
            guidance = model.guidance([step.number for step in steps])
            timesteps = torch.ones(len(cases), dtype=torch.int64, device=model.device)
            return lambda latents, timestep: guidance(latents, timestep * timesteps, text, nothing, scales)

        return begin

    def _descend(
        self, model: TextToImage, traces: Sequence[Trace], path: Sequence[DDIMStep], *, guided: bool
    ) -> list[Proposal]:
        """Take ``steps_per_check`` gradient steps of every search."""
        begin = self._predictor(model, traces, guided=guided)
        recompute = not (guided and remembers(model))
        states: list[NoiseSearch] = [trace.state for trace in traces]
        targets = torch.stack([state.target for state in states])
        seeded = torch.stack([state.seeded for state in states])
        noise = torch.stack([state.noise for state in states])
        project = project_to_cap if self.unit_variance else project_to_ball
        total = torch.zeros(len(states), dtype=torch.float64, device=model.device)
        for _ in range(self.steps_per_check):
            gradient, losses = picture_gradient(model, begin(path), path, noise, targets, recompute=recompute)
            total += losses
            length = self.step_size * self.radius * norms(seeded) / norms(gradient).clamp_min(1e-30)
            noise = project(noise - length * gradient, seeded, self.radius)
        proposals = []
        cost = self.steps_per_check * (1 + recompute) * len(path) * self._evaluations(model, traces, guided=guided)
        distances = energy_distance(noise).tolist()
        for trace, state, found, loss, distance in zip(traces, states, noise, total.tolist(), distances, strict=True):
            state.noise = found
            state.steps += self.steps_per_check
            proposals.append(
                Proposal(
                    trace.case.prompt,
                    loss=loss / self.steps_per_check,
                    unet_evaluations=cost,
                    noise=found,
                    variant=f"noise after {state.steps} steps",
                    measured={ENERGY: distance},
                )
            )
        return proposals

    def _invert(
        self, model: TextToImage, traces: Sequence[Trace], path: Sequence[DDIMStep], *, guided: bool
    ) -> list[Proposal]:
        """Find the noise that each case's picture comes from."""
        begin = self._predictor(model, traces, guided=guided, empty=self.inverted_with == "empty")
        targets = torch.stack([trace.state.target for trace in traces])
        asked = [step for step in reversed(path) for _ in range(self.inversion_iterations)]
        noise, residuals = invert(begin(asked), path, targets, self.inversion_iterations)
        distances = energy_distance(noise, targets, path[0].noisy).tolist()
        # After one iteration there is nothing to tell a step's error by.
        told = self.inversion_iterations > 1
        most = most_distance(noise[0].numel(), self.tolerance) if self.tolerance is not None else math.inf
        nats = (noise.double().square().flatten(1).mean(dim=1) + math.log(2 * math.pi)) / 2
        cost = self.inversion_iterations * len(path) * self._evaluations(model, traces, guided=guided)
        return [
            Proposal(
                trace.case.prompt,
                loss=loss,
                unet_evaluations=cost,
                noise=found,
                variant="inverted noise",
                counts=abs(distance) <= most,
                measured={ENERGY: distance, **({RESIDUAL: residual} if told else {})},
            )
            for trace, found, loss, residual, distance in zip(
                traces, noise, nats.tolist(), residuals.tolist(), distances, strict=True
            )
        ]

    @staticmethod
    def _evaluations(model: TextToImage, traces: Sequence[Trace], *, guided: bool) -> int:
        """Return how often the U-Net is evaluated for one prediction of cases that are guided alike."""
        return model.evaluations_per_step(traces[0].case.guidance) if guided else 1


def remembers(model: TextToImage) -> bool:
    """Return whether the model's guidance is that of a guard, which may depend on the steps before."""
    return model.guard is not None and model.guard.always_guides


def denoising_path(model: TextToImage, steps: int) -> list[DDIMStep]:
    """List the steps from noise to picture of a DDIM sampler at the timesteps of the model's own."""
    timesteps = sorted(set(model.sampling_timesteps(steps).tolist()), reverse=True)
    # Stable Diffusion's last step ends at the first abar, others' at 1.
    last = getattr(model.make_scheduler(steps), "final_alpha_cumprod", model.alphas_cumprod[0])
    levels = [*(float(model.alphas_cumprod[timestep]) for timestep in timesteps), float(last)]
    return [DDIMStep(*step) for step in zip(timesteps, levels[:-1], levels[1:], range(len(timesteps)), strict=True)]


def thinned(path: Sequence[DDIMStep], steps: int) -> list[DDIMStep]:
    """Keep ``steps`` of a path, evenly spread from its first; each goes on to the level of the next.

    Raises:
        ValueError: It has fewer.
    """
    if steps > len(path):
        raise ValueError(f"unrolled_steps is {steps}; a picture has {len(path)}: use no more.")
    kept = [path[index * len(path) // steps] for index in range(steps)]
    ends = [*(step.noisy for step in kept[1:]), path[-1].clean]
    return [replace(step, clean=end) for step, end in zip(kept, ends, strict=True)]


def ddim_move(latents: Tensor, noise: Tensor, start: float, end: float) -> Tensor:
    """Keep x0 and ``noise`` of latents at abar ``start`` and mix them as at abar ``end``; both ways alike."""
    picture = (latents - math.sqrt(1 - start) * noise) / math.sqrt(start)
    return math.sqrt(end) * picture + math.sqrt(1 - end) * noise


def picture_gradient(
    model: TextToImage,
    predict: Predict,
    path: Sequence[DDIMStep],
    noise: Tensor,
    targets: Tensor,
    *,
    recompute: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute how far the latents that noise leads to are from ``targets``, and the gradient for the noise.

    Args:
        model: Whose precision the latents have.
        predict: Its prediction for the prompts.
        path: The steps from the noise on.
        noise: float [n, c, h, w].
        targets: float [n, c, h, w].
        recompute: Predict twice at each step and keep no activations; the prediction must not depend on the steps
            before then.

    Returns:
        The gradient of the squared distance, float [n, c, h, w], and the mean squared differences, float [n]; both in
        single precision at least.

    Raises:
        NotFiniteError: They are infinite or NaN.
    """
    noise = noise.detach().requires_grad_()
    with torch.enable_grad():
        latents = noise
        for step in path:
            given = latents.to(model.dtype)
            predicted = (
                checkpoint(predict, given, step.timestep, use_reentrant=False)
                if recompute
                else predict(given, step.timestep)
            )
            latents = ddim_move(latents, predicted, step.noisy, step.clean)
        squares = (latents - targets).square().flatten(1)
        require_finite(squares.detach(), "The attack's loss", ATTACK_DIVERGED)
        (gradient,) = torch.autograd.grad(squares.sum(), noise)
        require_finite(gradient, "The gradient of the attack's loss", ATTACK_DIVERGED)
    return gradient, squares.detach().mean(dim=1)


@torch.no_grad()
def invert(predict: Predict, path: Sequence[DDIMStep], targets: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Go back along a path from the latents of pictures.

    Args:
        predict: The model's prediction; called ``iterations`` times a step.
        path: The steps from noise to picture.
        targets: float [n, c, h, w], latents of pictures.
        iterations: Of the fixed point.

    Returns:
        The noise, float [n, c, h, w], and of each the largest mean square by which a step's last iteration still
        changed it, float64 [n].
    """
    latents = targets
    residuals = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
    for step in reversed(path):
        cleaner, change = latents, torch.zeros_like(latents)
        for _ in range(iterations):
            found = ddim_move(cleaner, predict(latents, step.timestep), step.clean, step.noisy)
            latents, change = found, found - latents
        residuals = torch.maximum(residuals, change.double().square().flatten(1).mean(dim=1))
    return latents, residuals


def norms(latents: Tensor) -> Tensor:
    """Return each picture's Euclidean norm, float [n, 1, 1, 1]."""
    norm: Tensor = torch.linalg.vector_norm(latents, dim=(1, 2, 3), keepdim=True)
    return norm


def project_to_ball(points: Tensor, centres: Tensor, radius: float) -> Tensor:
    """Return the nearest points with || point - centre || <= radius || centre ||; all float [n, c, h, w]."""
    offsets = points - centres
    return centres + offsets * (radius * norms(centres) / norms(offsets).clamp_min(1e-30)).clamp_max(1)


def project_to_cap(points: Tensor, centres: Tensor, radius: float) -> Tensor:
    """Return the nearest points with the norm of their centre that lie in the ball of :func:`project_to_ball`.

    They lie on the great circle through centre and point, no further than the angle whose chord is the radius.

    Args:
        points: float [n, c, h, w], in any place but opposite to the centre.
        centres: float [n, c, h, w].
        radius: In units of the centres' norms, 2 at most.
    """
    size = norms(centres)
    along = (points * centres).sum(dim=(1, 2, 3), keepdim=True) / size
    sideways = points - along * centres / size
    aside = norms(sideways)
    angle = torch.atan2(aside, along).clamp_max(2 * math.asin(radius / 2))
    return angle.cos() * centres + angle.sin() * size * sideways / aside.clamp_min(1e-30)
